"""Losses and recall on held-out samples: what a sweep minimises and a run reports while it trains.

In: an engine and a loader over the held-out split. Out: mean losses, recall among all of them and its chance. The same
samples, captions and batches each time. One caption a picture: pinned benchmarks belong to the evaluation stage.
Shapes: B batch, C channels, H W pixels, T tokens, E embedding.
"""

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from rsplatform.model.losses import LossConfig, mammut_loss
from rsplatform.model.normalise import normalise
from rsplatform.model.recall import chance_recall, recall_at_k
from rsplatform.train.batch import Batch
from rsplatform.train.engine import Engine
from rsplatform.train.guard import DamagedDataError


@dataclass(frozen=True)
class HeldOut:
    """What a validation has seen: row i of the embeddings (float64) is sample i with the caption of its tokens."""

    images_BE: Tensor
    texts_BE: Tensor
    tokens_T: list[Tensor]
    sample_ids: list[str]


def validation_losses(
    engine: Engine,
    batches: Callable[[int, int], Generator[Batch]],
    num_batches: int,
    loss: LossConfig,
    look: Callable[[HeldOut], None] | None = None,
) -> dict[str, float]:
    """Mean `val_loss`, `val_contrastive`, `val_caption`, and in percent `val_i2t_r1` … `val_mean_recall` (recall.py)
    with `val_chance_…` beside each; every process computes all of it (stage 3 needs each). `look` is shown what they
    were computed from. Raises DamagedDataError if there is a batch without pictures."""
    vision = engine.model.config.vision
    sums: dict[str, float] = {}
    images, texts, tokens, sample_ids = [], [], [], []
    engine.model.eval()
    try:
        with torch.no_grad():
            for batch in batches(0, num_batches):
                if math.isinf(batch.undecodable):
                    raise DamagedDataError("the held-out pictures cannot be decoded; the log names them")
                tokens_BT = batch.tokens_BT.to(engine.device)
                images_BHWC = batch.images_BHWC.to(engine.device)
                images_BCHW = normalise(images_BHWC, vision.pixel_mean, vision.pixel_std)
                distance_m_B = batch.distances_on(engine.device)
                output = engine.forward(images_BCHW, tokens_BT, distance_m_B, loss.z_loss_weight)
                _, parts = mammut_loss(output, tokens_BT, loss)
                images.append(output.image_embeddings_BE.double().cpu())
                texts.append(output.text_embeddings_BE.double().cpu())
                tokens += batch.tokens_BT
                sample_ids += batch.sample_ids
                for name in ("loss", "contrastive", "caption"):
                    sums[name] = sums.get(name, 0.0) + float(parts[name])
    finally:
        engine.model.train()
    seen = HeldOut(torch.cat(images), torch.cat(texts), tokens, sample_ids)
    if look is not None:
        look(seen)
    means = {name: value / num_batches for name, value in sums.items()}
    return {f"val_{name}": value for name, value in (means | _recalls(seen.images_BE, seen.texts_BE)).items()}


def _recalls(images_BE: Tensor, texts_BE: Tensor) -> dict[str, float]:
    """Recall among these pairs; the text of a row is its picture's."""
    recalls = recall_at_k(images_BE.numpy(), texts_BE.numpy(), range(len(texts_BE)))
    chance = chance_recall(len(images_BE), len(texts_BE))
    return recalls | {f"chance_{name}": value for name, value in chance.items()}
