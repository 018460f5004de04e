"""The only way to vectors: pictures or texts in, unit float32 embeddings out; also patch features for localization.

In: image bytes or uint8 arrays, strings, or a folder that save_model wrote. Out: numpy (I, E) / (T, E), or
PatchFeatures on the model's device. Training-time evaluation, index, evaluation, localization and serving use it.
Does not train: gradients are off (Mammut.patch_features keeps them).
Shapes: I images, T texts, E embedding, B batch, H W pixels or patch grid, D width, K pooling heads.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rsplatform.model.float32_products import use_onednn_products
from rsplatform.model.mammut import Mammut
from rsplatform.model.normalise import normalise
from rsplatform.model.preprocess import Square, read_square, square
from rsplatform.model.tokenizer import Tokenizer
from rsplatform.model.vision_encoder import PatchFeatures
from rsplatform.model.weights import load_model


class Embedder:
    """A model and its tokenizer, ready to embed. `batch_size` bounds memory and does not change results.

    With a model on a CPU this process multiplies float32 through oneDNN from now on (float32_products.py).
    """

    def __init__(self, model: Mammut, tokenizer: Tokenizer, batch_size: int = 128):
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        if self.device.type == "cpu":
            use_onednn_products()

    @classmethod
    def load(cls, folder: Path | str, device: str | torch.device = "cpu", batch_size: int = 128) -> "Embedder":
        """Read a folder that `save_model` wrote, in float32 whatever its files hold, and move the model to `device`."""
        model, tokenizer = load_model(Path(folder))
        return cls(model.float().to(device), tokenizer, batch_size)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.log_logit_scale.device

    @property
    def image_size(self) -> int:
        """Side in pixels of the square that pictures are resized and cropped to."""
        return self.model.config.vision.image_size

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.model.config.vision.patch_size

    @property
    def embedding_width(self) -> int:
        """E."""
        return self.model.config.embedding_width

    @cached_property
    def model_hash(self) -> str:
        """SHA-256 over config, tokenizer and weights (not file bytes): the same model, the same hash."""
        digest = hashlib.sha256(json.dumps(self.model.config.to_dict(), sort_keys=True).encode())
        digest.update(self.tokenizer.to_json().encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            values = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
            digest.update(memoryview(values.flatten().view(torch.uint8).numpy()))
        return digest.hexdigest()

    def embed_images(
        self, images: Sequence[bytes | np.ndarray], ground_sample_distances_m: Sequence[float] | None = None
    ) -> np.ndarray:
        """Unit embeddings (I, E) float32 of encoded pictures or uint8 (H, W, 3) arrays of any size.

        Distances are metres per pixel of the pictures as they come here, NaN (or no list) where unknown.

        Raises:
            ImageError: bytes that are no acceptable picture.
            ValueError: another number of distances than of pictures.
        """
        distances_m = [math.nan] * len(images) if ground_sample_distances_m is None else ground_sample_distances_m
        pairs = list(zip(images, distances_m, strict=True))
        rows = [np.empty((0, self.embedding_width), dtype=np.float32)]
        for start in range(0, len(pairs), self.batch_size):
            squares = [self._square(image, distance_m) for image, distance_m in pairs[start : start + self.batch_size]]
            images_BHWC = torch.from_numpy(np.stack([seen.pixels_HWC for seen in squares]))
            distance_m_B = torch.tensor([seen.ground_sample_distance_m for seen in squares], device=self.device)
            with _inference(self.model):
                vectors_BE = self.model.encode_image(self._normalised(images_BHWC), distance_m_B)
                rows.append(vectors_BE.float().cpu().numpy())
        return np.concatenate(rows)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit embeddings (T, E) float32; a text longer than the model's context is cut."""
        if isinstance(texts, str):
            raise TypeError("embed_texts takes a list of texts, not one string")
        rows = [np.empty((0, self.embedding_width), dtype=np.float32)]
        context_length = self.model.config.text.context_length
        for start in range(0, len(texts), self.batch_size):
            chunk = texts[start : start + self.batch_size]
            tokens = self.tokenizer.encode(chunk, context_length, pad_to_longest=True)
            with _inference(self.model):
                tokens_BT = torch.from_numpy(tokens).to(self.device)
                rows.append(self.model.encode_text(tokens_BT).float().cpu().numpy())
        return np.concatenate(rows)

    def patch_features(
        self, images_BHWC: Tensor, ground_sample_distance_m: float | Sequence[float] = math.nan
    ) -> PatchFeatures:
        """Pooling values (B, H, W, D) and scores (B, K, H, W) or None, of uint8 pictures at their own size.

        Height and width are multiples of the patch, else ValueError; positions are interpolated to the grid. The
        distance is that of these pixels, one for all pictures or one for each; NaN where unknown.
        """
        distance_m = torch.tensor(ground_sample_distance_m, dtype=torch.float32, device=self.device)
        distance_m_B = distance_m.expand(len(images_BHWC))
        with _inference(self.model):
            return self.model.patch_features(self._normalised(images_BHWC), distance_m_B)

    def head(self, values_D: Tensor) -> Tensor:
        """Pooled values (..., D) to unit embeddings (..., E), as `embed_images` does after its own pooling."""
        with _inference(self.model):
            return self.model.head(values_D)

    def _square(self, image: bytes | np.ndarray, distance_m: float) -> Square:
        if isinstance(image, np.ndarray):
            return square(image, self.image_size, distance_m)
        return read_square(image, self.image_size, distance_m)

    def _normalised(self, images_BHWC: Tensor) -> Tensor:
        vision = self.model.config.vision
        return normalise(images_BHWC.to(self.device), vision.pixel_mean, vision.pixel_std)


def driver_device() -> str:
    """Where a job that embeds in its own process puts its model: the GPU that Torch sees, if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def granted_device(num_gpus: float) -> str:
    """Where an actor or replica puts its model that was granted `num_gpus` (or a part of one) by the placement.

    Not what Torch sees: beside granted ones, a process without a grant sees the GPUs of its machine as well.
    """
    return "cuda" if num_gpus > 0 else "cpu"


@contextmanager
def _inference(model: Mammut) -> Iterator[None]:
    """No gradients, eval mode; a model in training goes back to training afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
