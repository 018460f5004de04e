"""Thresholds of classes from image-level labels alone: which chips name a class, and how well it fits them at best.

In: chips, with captions or landmarks, and a model. Out: for each class by how much it must beat the background where it
fits best, for an image to show it: so a region stands only if its best pixel does. The outline of a region stays where
class and background meet, because image-level labels say what is there and not how far it reaches (our default; asked
of each pixel, such a threshold cuts objects down to their cores). No mask enters here: there is no argument through
which one could.
Shapes: C classes, I images, P prompts, H W patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field

from rsplatform.config import CaptionsArtifact, ChipsArtifact, Config, ConfigError
from rsplatform.curate.pipeline import DROP_FIELDS, Shard, replace_column
from rsplatform.dataset.holdout import Holdout
from rsplatform.dataset.store import open_table
from rsplatform.localize.picture import Scale, averaged_maps
from rsplatform.localize.score_scenes import ScoreRecipe, load_model
from rsplatform.model.preprocess import ImageError, decode_image

MARGIN_SCHEMA = pa.schema([("id", pa.string()), ("named", pa.list_(pa.bool_())), ("margins", pa.list_(pa.float32()))])
CAPTION_TABLE = "captions.lance"
IMAGES_PER_SHARD = 128


class Calibration(Config):
    """Chips of split train whose captions (or, without `captions`, landmarks) say which classes they show.

    At most `max_images` are looked at, evenly spread; a class needs `min_images` that name it and as many that do not
    (our defaults).
    """

    chips: ChipsArtifact
    captions: CaptionsArtifact | None = None
    max_images: int = Field(default=1000, ge=20)
    min_images: int = Field(default=10, ge=1)


@dataclass(frozen=True)
class Words:
    """What a chip's text must contain to name each class, found as holdout.py finds it."""

    of_class: tuple[tuple[str, ...], ...]

    def named(self, texts: Sequence[str]) -> list[bool]:
        """For each class whether any of the texts names it."""
        return [Holdout(words).reason((), texts) is not None for words in self.of_class]


def calibration_shards(root: str, calibration: Calibration) -> list[Shard]:
    """The chosen rows of the chips table, some at a time.

    Raises:
        ConfigError: the table has no chip of split train.
    """
    splits = np.array(open_table(root, calibration.chips).to_table(columns=["split"])["split"].to_pylist())
    rows = np.flatnonzero(splits == "train")
    if not len(rows):
        raise ConfigError(f"calibration.chips: {calibration.chips} has no chips of split train")
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), calibration.max_images)).astype(int)].tolist()
    return [
        {"shard": f"calibration_{start:06d}", "rows": rows[start : start + IMAGES_PER_SHARD]}
        for start in range(0, len(rows), IMAGES_PER_SHARD)
    ]


@dataclass(frozen=True)
class ReadImages:
    """Reads the chips of a shard, and which classes each names."""

    root: str
    calibration: Calibration
    words: Words

    def __call__(self, shard: Shard) -> pa.Table:
        columns = ["id", "image", "ground_sample_distance_m", "landmarks"]
        rows = open_table(self.root, self.calibration.chips).take(shard["rows"], columns=columns).to_pylist()
        captions = self._captions([row["id"] for row in rows])
        for row in rows:
            kinds = [item["kind"] for item in row.pop("landmarks") or []]
            row["named"] = self.words.named(captions.get(row["id"], []) if self.calibration.captions else kinds)
        fields = [pa.field("image", pa.binary()), pa.field("ground_sample_distance_m", pa.float32())]
        return pa.Table.from_pylist(rows, schema=pa.schema([*MARGIN_SCHEMA, *fields, *DROP_FIELDS]))

    def _captions(self, ids: list[str]) -> dict[str, list[str]]:
        if self.calibration.captions is None:
            return {}
        quoted = ", ".join("'" + text.replace("'", "''") + "'" for text in ids)
        table = open_table(self.root, self.calibration.captions, CAPTION_TABLE)
        found = table.to_table(columns=["id", "captions"], filter=f"id IN ({quoted})").to_pylist()
        return {row["id"]: row["captions"] or [] for row in found}


class ImageScorer:
    """Table operation: by how much each class beats the background where it fits a chip best."""

    def __init__(
        self, root: str, model_ref: str, recipe: ScoreRecipe, class_of_prompt: Sequence[int], device: str = "cpu"
    ):
        self._embedder = load_model(root, model_ref, device)
        self._texts_PE = torch.from_numpy(self._embedder.embed_texts(recipe.prompts))
        self._recipe, self._class_of_prompt = recipe, list(class_of_prompt)

    def __call__(self, table: pa.Table) -> pa.Table:
        """The rows with their margins; a picture that cannot be read becomes a drop."""
        margins, drops = [], []
        pairs = zip(table["image"].to_pylist(), table["ground_sample_distance_m"].to_pylist(), strict=True)
        for image, distance_m in pairs:
            try:
                margins.append(self._margins(decode_image(image), distance_m).tolist())
                drops.append((None, None))
            except ImageError as error:
                margins.append([])
                drops.append((error.reason, error.detail))
        table = replace_column(table, "margins", pa.array(margins, MARGIN_SCHEMA.field("margins").type))
        for index, name in enumerate(("drop_reason", "drop_detail")):
            table = replace_column(table, name, pa.array([drop[index] for drop in drops], pa.string()))
        return table

    def _margins(self, image_HWC: np.ndarray, distance_m: float | None) -> np.ndarray:
        wanted_m = self._recipe.ground_sample_distance_m
        factor = distance_m / wanted_m if distance_m else 1.0
        scale = Scale(factor, wanted_m)
        maps_PHW = averaged_maps(self._embedder, image_HWC, self._texts_PE, self._recipe.looks, scale)
        return class_margins(maps_PHW.numpy(), self._class_of_prompt).max(axis=(1, 2))


def class_margins(maps_PHW: np.ndarray, class_of_prompt: Sequence[int]) -> np.ndarray:
    """By how much the best prompt of each class (1, 2, …) beats the background's best, (C, H, W)."""
    owners = np.array(class_of_prompt)
    best = [maps_PHW[owners == label].max(axis=0) for label in range(max(class_of_prompt) + 1)]
    return np.stack(best[1:]) - best[0]


def best_threshold(margins_I: np.ndarray, named_I: np.ndarray) -> tuple[float, float]:
    """The threshold at which "the margin is above it" agrees best with "the image names the class", and that F1.

    Halfway between two neighbouring margins; of equal F1 the lowest threshold. Best F1 and not the share of named
    images, because captions leave things out, which moves a share and not where hits and misses part (our default).
    Needs an image that names the class, else ValueError.
    """
    if not named_I.any():
        raise ValueError("no image names the class")
    order = np.argsort(-margins_I, kind="stable")
    margins_I, named_I = margins_I[order].astype(np.float64), named_I[order]
    hits = np.cumsum(named_I)
    f1_I = 2 * hits / (np.arange(1, len(hits) + 1) + named_I.sum())
    ends = np.flatnonzero(np.append(margins_I[:-1] > margins_I[1:], True))  # equal margins pass together
    below = np.append(margins_I[1:], margins_I[-1] - 1e-3)
    thresholds = (margins_I[ends] + below[ends]) / 2
    best = f1_I[ends].max()
    return float(thresholds[f1_I[ends] == best].min()), float(best)


def thresholds(rows: pa.Table, class_names: Sequence[str], calibration: Calibration) -> list[dict[str, Any]]:
    """For each class its threshold and what it rests on.

    Raises:
        ConfigError: a class that too few images name, or too few do not.
    """
    named_IC, margins_IC = np.array(rows["named"].to_pylist()), np.array(rows["margins"].to_pylist())
    found = []
    for index, name in enumerate(class_names):
        named_I, margins_I = named_IC[:, index], margins_IC[:, index]
        num_named = int(named_I.sum())
        if min(num_named, len(named_I) - num_named) < calibration.min_images:
            raise ConfigError(
                f"calibration: {num_named} of {len(named_I)} images of {calibration.chips} name {name!r}, at least "
                f"{calibration.min_images} must and must not; give the class's `words`, other chips or more images"
            )
        threshold, f1 = best_threshold(margins_I, named_I)
        passing = float((margins_I > threshold).mean())
        numbers = {"images": len(named_I), "named": num_named, "f1": f1, "passing_share": passing}
        found.append({"name": name, "threshold": threshold, "f1_at_0": _f1(margins_I > 0, named_I), **numbers})
    return found


def _f1(passing_I: np.ndarray, named_I: np.ndarray) -> float:
    return float(2 * (passing_I & named_I).sum() / (passing_I.sum() + named_I.sum()))
