"""The losses on held-out samples: what a sweep minimises and a run reports while it trains.

In: an engine and a loader over the held-out split. Out: mean losses. The same samples, captions and batches each
time. Recall belongs to the evaluation stage, not here. Shapes: B batch, C channels, H W pixels, T tokens.
"""

from collections.abc import Callable, Generator

import torch

from rsplatform.model.losses import LossConfig, mammut_loss
from rsplatform.model.normalise import normalise
from rsplatform.train.batch import Batch
from rsplatform.train.engine import Engine


def validation_losses(
    engine: Engine, batches: Callable[[int, int], Generator[Batch]], num_batches: int, loss: LossConfig
) -> dict[str, float]:
    """Mean `val_loss`, `val_contrastive`, `val_caption`; every process computes all of it (stage 3 needs each)."""
    vision = engine.model.config.vision
    sums: dict[str, float] = {}
    engine.model.eval()
    try:
        with torch.no_grad():
            for batch in batches(0, num_batches):
                tokens_BT = batch.tokens_BT.to(engine.device)
                images_BHWC = batch.images_BHWC.to(engine.device)
                images_BCHW = normalise(images_BHWC, vision.pixel_mean, vision.pixel_std)
                distance_m_B = batch.distances_on(engine.device)
                output = engine.forward(images_BCHW, tokens_BT, distance_m_B, loss.z_loss_weight)
                _, parts = mammut_loss(output, tokens_BT, loss)
                for name in ("loss", "contrastive", "caption"):
                    sums[name] = sums.get(name, 0.0) + float(parts[name])
    finally:
        engine.model.train()
    return {f"val_{name}": value / num_batches for name, value in sums.items()}
