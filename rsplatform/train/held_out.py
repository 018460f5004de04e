"""A run's validation: which held-out samples, in which batches and pieces.

In: a recipe and where its worker runs. Out: a call that measures the engine's model. What is measured depends on the
recipe and its dataset alone: not on the number of processes, nor on the micro-batches (but by rounding).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from rsplatform.dataset.store import SampleStore
from rsplatform.model.tokenizer import Tokenizer
from rsplatform.train.augment import NO_AUGMENTATION
from rsplatform.train.engine import Engine
from rsplatform.train.loader import Loader, LoaderConfig, Share
from rsplatform.train.recipe import PretrainConfig
from rsplatform.train.step import StepConfig
from rsplatform.train.validate import HeldOut, validation_losses

# Enough held-out samples for a steady loss, few enough to cost a small part of the training.
VALIDATION_SAMPLES = 1024


@dataclass(frozen=True)
class HeldOutPlace:
    """The root of the artifacts, the run's tokenizer, the settings of its training loader, this process's share.

    `micro_batch_size`: what the training has in memory at once, None: its whole share of a batch.
    """

    root: str
    tokenizer: Tokenizer
    loader: LoaderConfig
    share: Share
    micro_batch_size: int | None = None


def held_out_batches(batch_size: int, num_samples: int) -> tuple[int, int]:
    """(size, number) of the validation's batches: the training's size where VALIDATION_SAMPLES hold one, else one
    batch of all of them."""
    size = min(batch_size, num_samples, VALIDATION_SAMPLES)
    return size, min(num_samples, VALIDATION_SAMPLES) // size


def held_out_validation(
    config: PretrainConfig, engine: Engine, place: HeldOutPlace, look: Callable[[HeldOut], None] | None = None
) -> Callable[[], dict[str, float]] | None:
    """The validation of a run, None without a split for it. No more samples at once than a training step has."""
    if config.validation_split is None:
        return None
    store = SampleStore(place.root, config.dataset, config.validation_split)
    batch_size, num_batches = held_out_batches(config.batch_size, len(store))
    order = torch.randperm(len(store), generator=torch.Generator().manual_seed(0)).numpy()
    settings = LoaderConfig(
        place.loader.image_size,
        place.loader.context_length,
        augmentation=NO_AUGMENTATION,
        cache_gb=place.loader.cache_gb,
        decode_threads=place.loader.decode_threads,
    )
    loader = Loader(store, place.tokenizer, lambda step: order[step * batch_size : (step + 1) * batch_size], settings)
    own_samples = config.batch_size // place.share.world_size
    at_once = min(own_samples, place.micro_batch_size or own_samples)
    step = StepConfig(config.loss, config.precision, micro_batch_size=at_once)
    return partial(validation_losses, engine, loader.batches, num_batches, step, look)
