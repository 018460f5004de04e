"""Muon beside AdamW: which weights each of them gets.

In: a model and its parameter groups. Out: torch's own optimizers over them. Muon replaces the update of a matrix by the
nearest matrix whose singular values are all alike (by Newton-Schulz steps), so that rare directions learn as fast as
common ones; it keeps one moment instead of two. It needs whole matrices: engines that shard them cannot run it.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from rsplatform.model.mammut import Mammut


def hidden_matrices(model: Mammut) -> set[torch.Tensor]:
    """The weights that Muon is meant for [F, Jordan 2024]: all linear maps but the first, which reads pixels.

    Embeddings, positions, the vocabulary, the pooling's folded query and key, and all vectors stay AdamW's.
    """
    layers = [
        layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not model.vision.patch_embedding
    ]
    return {layer.weight for layer in layers}


def split_groups(
    groups: Collection[dict[str, Any]], matrices: Collection[torch.Tensor], rate_factor: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The groups without and with the `matrices`, whose rates are `rate_factor` times the others'."""
    chosen = {id(parameter) for parameter in matrices}
    others, muons = [], []
    for group in groups:
        rest = [parameter for parameter in group["params"] if id(parameter) not in chosen]
        own = [parameter for parameter in group["params"] if id(parameter) in chosen]
        if rest:
            others.append(group | {"params": rest})
        if own:
            muons.append(group | {"params": own, "rate_factor": group["rate_factor"] * rate_factor})
    return others, muons


def muon(groups: list[dict[str, Any]]) -> torch.optim.Muon:
    """Updates of the size of AdamW's (root mean square 0.2 of the rate; arXiv 2502.16982 [F]), so that they share
    a schedule and its weight decay."""
    return torch.optim.Muon(groups, lr=0.0, adjust_lr_fn="match_rms_adamw")
