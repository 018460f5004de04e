"""The overhead classifier: pixels in, the probability that the picture looks straight down out; and its training.

A small convolutional net on 64-px crops. It sees pixels only, after crops, rescaling, blur and re-encoding that are
drawn alike for both classes, so size, aspect, EXIF, sharpness and file features cannot help it. [D] in RECIPE.md is an
embedding with a logistic head; a net of its own needs no earlier model (our default).
Shapes: B batch, H W pixels, C channels.
"""

import io
import itertools
import json
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from safetensors.torch import load, save
from torch import Tensor, nn

from rsplatform import storage
from rsplatform.config import ConfigError
from rsplatform.model.normalise import normalise
from rsplatform.model.preprocess import resize_crop

IMAGE_SIZE_PX = 64
# Training pictures are kept at this size; crops are taken from it.
BASE_SIZE_PX = 112
WEIGHTS, DESCRIPTION = "overhead.safetensors", "overhead.json"
_MEAN, _STD = (0.45, 0.45, 0.45), (0.25, 0.25, 0.25)


class OverheadNet(nn.Module):
    """Four strided convolutions, mean and maximum pooling, one logit."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        blocks = [
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in itertools.pairwise(widths)
        ]
        self.blocks = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(2 * widths[-1], 1)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits (B,)."""
        features_BCHW = self.blocks(images_BCHW)
        pooled_BD = torch.cat([features_BCHW.mean((2, 3)), features_BCHW.amax((2, 3))], dim=1)
        return self.head(self.dropout(pooled_BD))[:, 0]


def prepare(image_HWC: np.ndarray) -> np.ndarray:
    """What the classifier sees of a picture: its centre square at IMAGE_SIZE_PX, uint8."""
    return resize_crop(image_HWC, IMAGE_SIZE_PX)


def augment(base_HWC: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A random square crop, rescaled through a random resolution, re-encoded as JPEG, mirrored; (64, 64, 3)."""
    picture = Image.fromarray(base_HWC)
    side = float(generator.uniform(0.45, 1.0)) * BASE_SIZE_PX
    left, top = generator.uniform(0, BASE_SIZE_PX - side, size=2)
    between = int(generator.integers(28, IMAGE_SIZE_PX + 33))
    kernel = generator.choice([Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
    box = (left, top, left + side, top + side)
    picture = picture.resize((between, between), Image.Resampling(int(kernel)), box=box)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=int(generator.integers(35, 96)))
    picture = Image.open(buffer, formats=("JPEG",)).resize((IMAGE_SIZE_PX, IMAGE_SIZE_PX), Image.Resampling.BILINEAR)
    values = np.asarray(picture).astype(np.float32) * generator.uniform(0.8, 1.2, size=3) + generator.uniform(-20, 20)
    values = values[:, ::-1] if generator.random() < 0.5 else values
    return values.clip(0, 255).astype(np.uint8)


def train(bases_NHWC: np.ndarray, labels_N: np.ndarray, *, epochs: int, seed: int) -> tuple[OverheadNet, list[float]]:
    """Fit the net on pictures of BASE_SIZE_PX; gives it and the mean loss of each epoch. Both classes weigh alike."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = np.random.default_rng(seed)
        model = OverheadNet().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
        batch_size = 64
        num_batches = max(1, len(labels_N) // batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * num_batches)
        num_overhead = max(1.0, float(labels_N.sum()))
        balance = torch.tensor((len(labels_N) - num_overhead) / num_overhead).clamp(0.1, 10)
        losses = []
        for _ in track(range(epochs), "train overhead filter", transient=True):
            order = generator.permutation(len(labels_N))
            total = 0.0
            for rows in np.array_split(order, num_batches):
                crops = np.stack([augment(bases_NHWC[row], generator) for row in rows])
                logits_B = model(normalise(torch.from_numpy(crops), _MEAN, _STD))
                targets_B = torch.from_numpy(labels_N[rows]).float()
                loss = nn.functional.binary_cross_entropy_with_logits(logits_B, targets_B, pos_weight=balance)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += float(loss.detach())
            losses.append(total / num_batches)
    return model.eval(), losses


@torch.inference_mode()
def scores(model: OverheadNet, crops: Sequence[np.ndarray]) -> np.ndarray:
    """Probabilities (N,) that prepared pictures are overhead; mean of the picture and its mirror image."""
    found = []
    for start in range(0, len(crops), 256):
        images_BCHW = normalise(torch.from_numpy(np.stack(crops[start : start + 256])), _MEAN, _STD)
        both = torch.sigmoid(model(images_BCHW)) + torch.sigmoid(model(images_BCHW.flip(3)))
        found.append((both / 2).numpy())
    return np.concatenate(found) if found else np.zeros(0, np.float32)


def average_precision(scores_N: np.ndarray, labels_N: np.ndarray) -> float:
    """Area under precision over recall; equal scores are ranked with the negatives first, against the model."""
    order = np.lexsort((labels_N, -scores_N))
    hits = labels_N[order].astype(bool)
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float(precision[hits].mean()) if hits.any() else 0.0


def pick_threshold(scores_N: np.ndarray, labels_N: np.ndarray, min_precision: float) -> float:
    """The lowest score from which on precision reaches `min_precision` on held-out pictures.

    Raises:
        ConfigError: no score does.
    """
    for threshold in np.unique(scores_N):
        chosen = scores_N >= threshold
        if labels_N[chosen].mean() >= min_precision:
            return float(threshold)
    raise ConfigError(
        f"min_precision: no threshold reaches {min_precision} on the held-out pictures; lower it or give more pictures"
    )


def save_overhead(model: OverheadNet, uri: str, description: Mapping[str, object]) -> None:
    """Write the weights, and the description with the threshold, below `uri`."""
    storage.write_bytes(
        f"{uri}/{WEIGHTS}", save({name: value.contiguous() for name, value in model.state_dict().items()})
    )
    storage.write_bytes(f"{uri}/{DESCRIPTION}", json.dumps(description, indent=1).encode())


class OverheadScorer:
    """A trained classifier, loaded once."""

    def __init__(self, uri: str):
        self._model = OverheadNet()
        self._model.load_state_dict(load(storage.read_bytes(f"{uri}/{WEIGHTS}")))
        self._model.eval()
        description = storage.read_json(f"{uri}/{DESCRIPTION}")
        self.threshold = float(description["threshold"])
        self.training_hashes = frozenset(description["training_hashes"])

    def score(self, crops: Sequence[np.ndarray]) -> np.ndarray:
        """Probabilities (N,) of pictures as `prepare` gives them."""
        return scores(self._model, crops)
