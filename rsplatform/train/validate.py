"""Losses and recall on held-out samples: what a sweep minimises and a run reports while it trains.

In: an engine and a loader over the held-out split. Out: mean losses, recall among all of them and its chance. The same
samples, captions and batches each time, run in pieces that change no metric but by rounding. One caption a picture:
pinned benchmarks belong to the evaluation stage.
Shapes: B batch, T tokens, E embedding.
"""

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from rsplatform.model.losses import mammut_loss
from rsplatform.model.recall import chance_recall, recall_at_k
from rsplatform.train.batch import Batch
from rsplatform.train.engine import Engine
from rsplatform.train.guard import DamagedDataError
from rsplatform.train.step import StepConfig, outputs_without_graph

# What a validation measures and a recipe may keep the best checkpoint by.
VALIDATION_METRICS = (
    *("val_loss", "val_contrastive", "val_caption"),
    *(f"val_{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)),
    "val_mean_recall",
)


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
    config: StepConfig,
    look: Callable[[HeldOut], None] | None = None,
) -> dict[str, float]:
    """The means in `VALIDATION_METRICS`, recalls (recall.py) in percent and with `val_chance_…` beside each.

    Each batch's contrastive loss is that of all its pairs, however small `config.micro_batch_size` is; the model runs
    in the steps' precision. Every process computes all of it (stage 3 needs each). `look` is shown what they were
    computed from.

    Raises:
        DamagedDataError: there is a batch without pictures.
    """
    sums: dict[str, float] = {}
    images, texts, tokens, sample_ids = [], [], [], []
    engine.model.eval()
    try:
        with torch.no_grad():
            for batch in batches(0, num_batches):
                if math.isinf(batch.undecodable):
                    raise DamagedDataError("the held-out pictures cannot be decoded; the log names them")
                output = outputs_without_graph(engine, batch, 0, config)
                _, parts = mammut_loss(output, batch.tokens_BT.to(engine.device), config.loss)
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
