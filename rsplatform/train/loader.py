"""Batches ahead of the training step: reading and decoding in threads, with a cache of small pictures.

In: a store of samples and the global batches' sample indices by step. Out: `Batch` objects in step order. What
is in a batch depends on (seed, step, rank, world size) alone, never on the timing of threads. The store is
anything with a length and a `read(indices)` that threads may call; this module opens no files and moves nothing to a
device.
Shapes: H W pixels, C channels.
"""

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch

from rsplatform.model.preprocess import ImageError, Square, read_square
from rsplatform.model.tokenizer import Tokenizer
from rsplatform.train.augment import Augmentation, augment, draw_caption, pad_tokens, sample_rng
from rsplatform.train.batch import Batch
from rsplatform.train.curriculum import RecipeMismatchError

# So many samples in a row that cannot be decoded are no accident: the batch is given up instead of searched on for.
MOST_REPLACED_IN_A_ROW = 32
# Batches that are made at once: one is read while another is decoded. With other work beside, 1.3 times as many
# samples/s where a read takes 0.15 s, as from an object store, no fewer from a local disk; the first batch takes a
# decode longer.
NUM_ASSEMBLERS = 2

logger = logging.getLogger("rsplatform.train")


class EncodedSample(Protocol):
    """A picture as bytes, with its id, its captions with their weights (none: alike) and the metres that a pixel of
    it covers (NaN where unknown)."""

    @property
    def id(self) -> str: ...

    @property
    def image(self) -> bytes: ...

    @property
    def captions(self) -> Sequence[str]: ...

    @property
    def caption_weights(self) -> Sequence[float]: ...

    @property
    def ground_sample_distance_m(self) -> float: ...


class SampleSource(Protocol):
    """What the loader needs of a dataset; `rsplatform.dataset.store.SampleStore` is one."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> Sequence[EncodedSample]: ...


class LoaderPhase(NamedTuple):
    """How pictures look for so many steps: pixels of a side, and how they are varied (None: as the recipe says)."""

    num_steps: int
    image_size: int
    augmentation: Augmentation | None = None


@dataclass(frozen=True)
class LoaderConfig:
    """Sizes and choices of the loader. `cache_gb` bounds decoded, resized pictures kept in memory (0: none).

    `phases`: those of a curriculum; `image_size` and `augmentation` hold where they end. Pictures are decoded and kept
    at the largest size that any of them needs.
    """

    image_size: int
    context_length: int
    phases: tuple[LoaderPhase, ...] = ()
    seed: int = 0
    augmentation: Augmentation = field(default_factory=Augmentation)
    cache_gb: float = 0.0
    decode_threads: int = 2
    prefetch_batches: int = 3

    @property
    def source_size(self) -> int:
        """Side in pixels that pictures are kept at before augmentation."""
        looks = [(self.image_size, self.augmentation), *(self._look(phase) for phase in self.phases)]
        return max(augmentation.source_size(size) for size, augmentation in looks)

    def look_at(self, step: int) -> tuple[int, Augmentation]:
        """Side in pixels of the pictures of a step, and how they are varied."""
        for phase in self.phases:
            if step < phase.num_steps:
                return self._look(phase)
            step -= phase.num_steps
        return self.image_size, self.augmentation

    def _look(self, phase: LoaderPhase) -> tuple[int, Augmentation]:
        return phase.image_size, phase.augmentation or self.augmentation


@dataclass(frozen=True)
class Share:
    """Which rows of a global batch a process takes: `[rank::world_size]`."""

    rank: int = 0
    world_size: int = 1


class Decoded(NamedTuple):
    """A sample whose picture is pixels. `undecodable`: how many others were tried before it, in whose place it is;
    infinite if none was found, and this is no sample at all."""

    id: str
    captions: Sequence[str]
    caption_weights: Sequence[float]
    square: Square
    undecodable: float = 0


class View(NamedTuple):
    """What one place of a batch gets of its sample."""

    caption: str
    pixels_HWC: np.ndarray
    ground_sample_distance_m: float


class Loader:
    """Makes the batches of one process. `plan(step)` gives the sample indices of the whole global batch."""

    def __init__(
        self,
        source: SampleSource,
        tokenizer: Tokenizer,
        plan: Callable[[int], np.ndarray],
        config: LoaderConfig,
        share: Share | None = None,
    ) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.plan = plan
        self.config = config
        self.share = share or Share()
        self._source_size = config.source_size
        self._cache: dict[int, Decoded] = {}
        self._cache_slots = int(config.cache_gb * 1e9 / (3 * self._source_size**2))
        self._cache_lock = threading.Lock()

    def batches(self, start_step: int, end_step: int) -> Generator[Batch]:
        """Batches of steps start_step … end_step - 1, made ahead by background threads."""
        pending: deque[Future[Batch]] = deque()
        next_step = start_step
        with (
            ThreadPoolExecutor(self.config.decode_threads, "decode") as decoders,
            ThreadPoolExecutor(NUM_ASSEMBLERS, "assemble") as assemblers,
        ):
            try:
                while pending or next_step < end_step:
                    while next_step < end_step and len(pending) < self.config.prefetch_batches:
                        pending.append(assemblers.submit(self.batch, next_step, decoders))
                        next_step += 1
                    yield pending.popleft().result()
            finally:  # the consumer stopped early: what has not begun need not be made
                for future in pending:
                    future.cancel()

    def batch(self, step: int, decoders: ThreadPoolExecutor) -> Batch:
        """This process's share of global batch `step`.

        A sample whose picture cannot be decoded is replaced by the next of the dataset that can, each time it is
        drawn, and counted: the loop stops a run with too many of them on all processes at once.

        Raises:
            RecipeMismatchError: the global batch does not divide among the processes.
        """
        rows = self.plan(step)
        if len(rows) % self.share.world_size:
            raise RecipeMismatchError(
                f"batch_size {len(rows)} does not divide among {self.share.world_size} workers; "
                "change batch_size in the recipe or train.num_workers in the cluster file"
            )
        positions = range(self.share.rank, len(rows), self.share.world_size)
        indices = [int(rows[position]) for position in positions]
        decoded = self._decoded(indices, decoders)
        samples = [decoded[index] for index in indices]
        views = list(decoders.map(self._view, [step] * len(indices), positions, samples))
        captions = [view.caption for view in views]
        return Batch(
            images_BHWC=torch.from_numpy(np.stack([view.pixels_HWC for view in views])),
            tokens_BT=pad_tokens(captions, self.tokenizer, self.config.context_length),
            sample_ids=tuple(sample.id for sample in samples),
            places_B=torch.tensor(positions),
            ground_sample_distance_m_B=torch.tensor([view.ground_sample_distance_m for view in views]),
            undecodable=sum(sample.undecodable for sample in samples),
        )

    def _view(self, step: int, position: int, sample: Decoded) -> View:
        rng = sample_rng(self.config.seed, step, position)
        caption = draw_caption(sample.captions, sample.caption_weights, rng)
        source, (size, augmentation) = sample.square, self.config.look_at(step)
        pixels_HWC, covered = augment(source.pixels_HWC, size, augmentation, caption, rng)
        return View(caption, pixels_HWC, source.ground_sample_distance_m * covered)

    def _decoded(self, indices: Sequence[int], decoders: ThreadPoolExecutor) -> dict[int, Decoded]:
        """The decoded samples of all `indices`, from the cache or freshly read; the cache never changes pixels."""
        decoded = {index: self._cache[index] for index in indices if index in self._cache}
        missing = [index for index in dict.fromkeys(indices) if index not in decoded]
        if missing:
            samples = self.source.read(missing)
            fresh = dict(zip(missing, decoders.map(self._decode, samples), strict=True))
            decoded |= {index: sample or self._replacement(index) for index, sample in fresh.items()}
            with self._cache_lock:
                for index in missing[: max(0, self._cache_slots - len(self._cache))]:
                    self._cache[index] = decoded[index]
        return decoded

    def _decode(self, sample: EncodedSample) -> Decoded | None:
        try:
            seen = read_square(sample.image, self._source_size, sample.ground_sample_distance_m)
        except ImageError as error:
            logger.warning("sample %s: %s; the next of the dataset stands in for it", sample.id, error)
            return None
        return Decoded(sample.id, sample.captions, sample.caption_weights, seen)

    def _replacement(self, index: int) -> Decoded:
        """The next sample that can be decoded after `index`, the first following the last: always the same one.

        Nothing, if too many in a row cannot: the loop ends the run on all processes before it trains on that. An error
        here would end this process alone, and Ray Train would start all of them again to meet it again.
        """
        for tried in range(1, MOST_REPLACED_IN_A_ROW):
            found = self._decode(*self.source.read([(index + tried) % len(self.source)]))
            if found is not None:
                return found._replace(undecodable=tried)
        logger.error("sample %d and the %d after it cannot be decoded", index, MOST_REPLACED_IN_A_ROW - 1)
        nothing_HWC = np.zeros((self._source_size, self._source_size, 3), dtype=np.uint8)
        return Decoded("", [""], (), Square(nothing_HWC, math.nan), math.inf)
