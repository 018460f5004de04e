"""Batches ahead of the training step: reading and decoding in threads, with a cache of small pictures.

In: a store of samples and the global batches' sample indices by step. Out: `Batch` objects in step order. What
is in a batch depends on (seed, step, rank, world size) alone, never on the timing of threads. The store is
anything with `ids`, `captions(i)` and `read(indices)`; this module opens no files and moves nothing to a device.
Shapes: H W pixels, C channels.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch

from rsplatform.model.preprocess import ImageError, Square, decode_image, square
from rsplatform.model.tokenizer import Tokenizer
from rsplatform.train.augment import Augmentation, augment, pad_tokens, sample_rng
from rsplatform.train.batch import Batch
from rsplatform.train.curriculum import RecipeMismatchError


class EncodedSample(Protocol):
    """A picture as bytes, with its id and the metres that a pixel of it covers (NaN where unknown)."""

    @property
    def id(self) -> str: ...

    @property
    def image(self) -> bytes: ...

    @property
    def ground_sample_distance_m(self) -> float: ...


class SampleSource(Protocol):
    """What the loader needs of a dataset; `rsplatform.dataset.store.SampleStore` is one."""

    ids: list[str]

    def captions(self, index: int) -> Sequence[str]: ...

    def read(self, indices: Sequence[int]) -> Sequence[EncodedSample]: ...


@dataclass(frozen=True)
class LoaderConfig:
    """Sizes and choices of the loader. `cache_gb` bounds decoded, resized pictures kept in memory (0: none).

    `phases`: (number of steps, image size) of each phase where a curriculum changes the size; `image_size` holds
    where they end. Pictures are decoded and kept at the largest of the sizes.
    """

    image_size: int
    context_length: int
    phases: tuple[tuple[int, int], ...] = ()
    seed: int = 0
    augmentation: Augmentation = field(default_factory=Augmentation)
    cache_gb: float = 0.0
    decode_threads: int = 2
    prefetch_batches: int = 3

    @property
    def source_size(self) -> int:
        """Side in pixels that pictures are kept at before augmentation."""
        return self.augmentation.source_size(max([self.image_size, *(size for _, size in self.phases)]))

    def size_at(self, step: int) -> int:
        """Side in pixels of the pictures of a step."""
        for num_steps, size in self.phases:
            if step < num_steps:
                return size
            step -= num_steps
        return self.image_size


@dataclass(frozen=True)
class Share:
    """Which rows of a global batch a process takes: `[rank::world_size]`."""

    rank: int = 0
    world_size: int = 1


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
        self._cache: dict[int, Square] = {}
        self._cache_slots = int(config.cache_gb * 1e9 / (3 * self._source_size**2))
        self._cache_lock = threading.Lock()

    def batches(self, start_step: int, end_step: int) -> Generator[Batch]:
        """Batches of steps start_step … end_step - 1, made ahead by background threads."""
        pending: deque[Future[Batch]] = deque()
        next_step = start_step
        with (
            ThreadPoolExecutor(self.config.decode_threads, "decode") as decoders,
            ThreadPoolExecutor(1, "assemble") as assembler,
        ):
            try:
                while pending or next_step < end_step:
                    while next_step < end_step and len(pending) < self.config.prefetch_batches:
                        pending.append(assembler.submit(self.batch, next_step, decoders))
                        next_step += 1
                    yield pending.popleft().result()
            finally:  # the consumer stopped early: what has not begun need not be made
                for future in pending:
                    future.cancel()

    def batch(self, step: int, decoders: ThreadPoolExecutor) -> Batch:
        """This process's share of global batch `step`.

        Raises:
            RecipeMismatchError: the global batch does not divide among the processes.
            ImageError: a sample's bytes are no picture; the message names the sample.
        """
        rows = self.plan(step)
        if len(rows) % self.share.world_size:
            raise RecipeMismatchError(
                f"batch_size {len(rows)} does not divide among {self.share.world_size} workers; "
                "change batch_size in the recipe or train.num_workers in the cluster file"
            )
        positions = range(self.share.rank, len(rows), self.share.world_size)
        indices = [int(rows[position]) for position in positions]
        squares = self._squares(indices, decoders)
        views = list(decoders.map(self._view, [step] * len(indices), positions, indices, [squares] * len(indices)))
        captions = [view.caption for view in views]
        return Batch(
            images_BHWC=torch.from_numpy(np.stack([view.pixels_HWC for view in views])),
            tokens_BT=pad_tokens(captions, self.tokenizer, self.config.context_length),
            sample_ids=tuple(self.source.ids[index] for index in indices),
            ground_sample_distance_m_B=torch.tensor([view.ground_sample_distance_m for view in views]),
        )

    def _view(self, step: int, position: int, index: int, squares: dict[int, Square]) -> View:
        rng = sample_rng(self.config.seed, step, position)
        captions = self.source.captions(index)
        caption = captions[int(rng.integers(len(captions)))]
        source, config = squares[index], self.config
        pixels_HWC, covered = augment(source.pixels_HWC, config.size_at(step), config.augmentation, caption, rng)
        return View(caption, pixels_HWC, source.ground_sample_distance_m * covered)

    def _squares(self, indices: Sequence[int], decoders: ThreadPoolExecutor) -> dict[int, Square]:
        """The decoded squares of all `indices`, from the cache or freshly read; the cache never changes pixels."""
        squares = {index: self._cache[index] for index in indices if index in self._cache}
        missing = [index for index in dict.fromkeys(indices) if index not in squares]
        if missing:
            samples = self.source.read(missing)
            squares |= dict(zip(missing, decoders.map(self._square, samples), strict=True))
            with self._cache_lock:
                for index in missing[: max(0, self._cache_slots - len(self._cache))]:
                    self._cache[index] = squares[index]
        return squares

    def _square(self, sample: EncodedSample) -> Square:
        try:
            image_HWC = decode_image(sample.image)
        except ImageError as error:
            raise ImageError(error.reason, f"sample {sample.id}: {error.detail}") from error
        return square(image_HWC, self._source_size, sample.ground_sample_distance_m)
