"""Mean intersection over union of predicted class maps against masks, one picture at a time.

In: maps of how well each prompt fits each patch, and masks of class ids. Out: IoU by class and their mean.
The decision rule reads the maps only, and is one for raw and smooth maps: same upsampling, same argmax,
nothing chosen from masks.
Shapes: P prompts, HxW patches or pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rsplatform.config import ConfigError
from rsplatform.localize.decide import NO_DATA, label_pixels
from rsplatform.localize.smooth_attention import upsample


@dataclass(frozen=True)
class SegmentationScores:
    """IoU in percent of every class that occurs in the masks, and their mean."""

    iou_by_class: dict[int, float]
    mean_iou: float


class ConfusionMatrix:
    """Counts of (true class, predicted class) over any number of pictures in constant memory."""

    def __init__(self, num_classes: int, ignore_id: int = NO_DATA) -> None:
        """Classes are 0…num_classes - 1; pixels whose mask is `ignore_id` count nowhere."""
        if num_classes < 2 or 0 <= ignore_id < num_classes:
            raise ValueError(f"need two classes and an ignore_id that is none, got {num_classes} and {ignore_id}")
        self.num_classes = num_classes
        self.ignore_id = ignore_id
        self.counts = np.zeros((num_classes, num_classes), dtype=np.int64)

    def update(self, predicted_HW: np.ndarray, mask_HW: np.ndarray) -> None:
        """Add one picture. Raises ValueError if the shapes differ or an id is no class."""
        if predicted_HW.shape != mask_HW.shape:
            raise ValueError(f"prediction {predicted_HW.shape} and mask {mask_HW.shape} differ in shape")
        counted = mask_HW != self.ignore_id
        true, predicted = mask_HW[counted].astype(np.int64), predicted_HW[counted].astype(np.int64)
        for name, ids in (("mask", true), ("prediction", predicted)):
            if ids.size and not 0 <= ids.min() <= ids.max() < self.num_classes:
                raise ValueError(f"{name} holds {ids.min()}…{ids.max()}, classes are 0…{self.num_classes - 1}")
        pairs = np.bincount(true * self.num_classes + predicted, minlength=self.num_classes**2)
        self.counts += pairs.reshape(self.num_classes, self.num_classes)

    def scores(self) -> SegmentationScores:
        """IoU over all pictures together; an absent class has none (its false alarms cost the rest).

        Raises ConfigError if no pixel was counted: there is no mean of nothing.
        """
        if not self.counts.any():
            raise ConfigError(
                "masks: no pixel was counted: they are empty or wholly ignored; give masks that show a class"
            )
        hits = self.counts.diagonal()
        unions = self.counts.sum(axis=0) + self.counts.sum(axis=1) - hits
        present = np.flatnonzero(self.counts.sum(axis=1))
        iou_by_class = {int(label): float(100 * hits[label] / unions[label]) for label in present}
        return SegmentationScores(
            iou_by_class=iou_by_class,
            mean_iou=sum(iou_by_class.values()) / len(iou_by_class),
        )


def decide(maps_PHW: torch.Tensor | np.ndarray, class_of_prompt: Sequence[int], size: tuple[int, int]) -> np.ndarray:
    """Each pixel gets the class of its best prompt: uint8 labels of `size` (height, width).

    Several prompts may stand for one class, above all for the background (class 0). Maps are upsampled before
    the argmax; a tie goes to the lower class, so to the background first. Our default: no threshold is
    fitted.
    """
    maps = torch.as_tensor(maps_PHW, dtype=torch.float32)
    if maps.ndim != 3 or not torch.isfinite(maps).all():
        raise ValueError(f"maps must be (P, H, W) without NaN or infinity, got shape {tuple(maps.shape)}")
    return label_pixels(upsample(maps[None], size)[0].numpy(), class_of_prompt)
