"""A very small training problem for the tests of this room: coloured squares with captions, in memory."""

import io
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from rsplatform.dataset.sampler import GlobalSampler
from rsplatform.model.mammut import Mammut, mammut_config
from rsplatform.model.tokenizer import Tokenizer
from rsplatform.train.augment import Augmentation
from rsplatform.train.loader import Loader, LoaderConfig, Share

IMAGE_SIZE, CONTEXT_LENGTH, BATCH_SIZE = 16, 16, 8
COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (20, 40, 210), "white": (230, 230, 230)}


@dataclass(frozen=True)
class TinySample:
    id: str
    image: bytes
    captions: tuple[str, ...]
    caption_weights: tuple[float, ...]
    ground_sample_distance_m: float


class TinyStore:
    """24 pictures: a colour, a bright bar on one side, two captions each (one names the side)."""

    def __init__(self, num_samples: int = 24) -> None:
        self.ids = [f"sample-{i}" for i in range(num_samples)]
        self.num_reads = 0

    def __len__(self) -> int:
        return len(self.ids)

    def captions(self, index: int) -> list[str]:
        colour = list(COLOURS)[index % len(COLOURS)]
        return [f"a {colour} field number {index}", f"{colour} land with a bar on the left, plot {index}"]

    def all_captions(self) -> list[str]:
        return [caption for index in range(len(self)) for caption in self.captions(index)]

    def read(self, indices) -> list[TinySample]:
        self.num_reads += len(indices)
        return [self._sample(int(index)) for index in indices]

    def _sample(self, index: int) -> TinySample:
        captions = tuple(self.captions(index))
        return TinySample(self.ids[index], self._png(index), captions, (1.0, 1.0), self.distance_m(index))

    @staticmethod
    def distance_m(index: int) -> float:
        """Every third sample's scale is unknown."""
        return float("nan") if index % 3 == 0 else 0.5 * (1 + index)

    def _png(self, index: int) -> bytes:
        rng = np.random.default_rng(index)
        pixels_HWC = np.empty((20, 20, 3), dtype=np.uint8)
        pixels_HWC[:] = list(COLOURS.values())[index % len(COLOURS)]
        pixels_HWC[:, :4] = 255
        pixels_HWC ^= rng.integers(0, 16, pixels_HWC.shape, dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels_HWC).save(stream, format="PNG")
        return stream.getvalue()


class DamagedStore(TinyStore):
    """The same, with samples whose bytes are no picture."""

    def __init__(self, damaged: set[str], num_samples: int = 24) -> None:
        super().__init__(num_samples)
        self.damaged = damaged

    def read(self, indices):
        samples = super().read(indices)
        return [replace(each, image=b"no picture") if each.id in self.damaged else each for each in samples]


def tiny_tokenizer() -> Tokenizer:
    return Tokenizer.train(TinyStore().all_captions(), 300)


def tiny_model(seed: int = 0, **overrides) -> Mammut:
    torch.manual_seed(seed)
    sizes = {"vision_width": 32, "text_width": 32, "vision_num_layers": 2, "text_num_layers": 2}
    sizes |= {"vision_mlp_width": 64, "text_mlp_width": 64, "patch_size": 4, "vocab_size": 320}
    sizes |= {"image_size": IMAGE_SIZE, "context_length": CONTEXT_LENGTH}
    return Mammut(mammut_config("mini", **(sizes | overrides)))


def tiny_loader(share: Share | None = None, store: TinyStore | None = None, **settings) -> Loader:
    store = store or TinyStore()
    sampler = GlobalSampler(len(store), BATCH_SIZE, seed=5)
    values = {"augmentation": Augmentation(min_crop_area=0.7), "seed": 5, "cache_gb": 0.01} | settings
    config = LoaderConfig(IMAGE_SIZE, CONTEXT_LENGTH, **values)
    return Loader(store, tiny_tokenizer(), sampler.batch, config, share)
