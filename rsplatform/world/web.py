"""Makes the web pairs of a world: a count in, rows of (picture file, alt-text, truth) out, in order, by any worker.

Whether row i is a picture from above is drawn from (seed, set, i) alone. Pictures from above are cells of lands that
no scene shows; each set has its own lands. `truth` and `alt_truth` are for metrics and tests only.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from rsplatform.world.alt_text import describe_ground, describe_overhead, draw_text_sort, make_alt_text
from rsplatform.world.canvas import Grid
from rsplatform.world.diagrams import draw_diagram
from rsplatform.world.encoding import LARGEST_SIDE_PX, Envelope, draw_envelope, encode
from rsplatform.world.ground_pictures import draw_ground_picture
from rsplatform.world.land import Feature
from rsplatform.world.layout import lay_out
from rsplatform.world.palettes import CLASS_NAMES
from rsplatform.world.render import Bytes, draw_look, render, to_bytes, visible_features

PAIR_SETS = {"pairs": 4, "train_pairs": 5}  # also part of the seeds, so the two sets share no picture
TRUTH_SHARES = {
    "pairs": {"overhead": 0.45, "ground": 0.37, "diagram": 0.18},
    "train_pairs": {"overhead": 0.5, "ground": 0.34, "diagram": 0.16},
}
DAMAGE_SHARE = 0.04
CELLS_PER_SIDE = 5
OTHERS_PER_TASK = 48


@dataclass(frozen=True)
class PairTask:
    """A few rows that one worker makes at once: the cells of one land, or other pictures (`land` is then -1)."""

    world_seed: int
    pair_set: str
    land: int
    rows: tuple[tuple[int, str], ...]  # (row number, truth)


def plan_pairs(world_seed: int, pair_set: str, num_pairs: int) -> list[PairTask]:
    """Tasks that together make every row once."""
    shares = TRUTH_SHARES[pair_set]
    rng = np.random.default_rng((world_seed, PAIR_SETS[pair_set], 0))
    truths = [str(truth) for truth in rng.choice(list(shares), size=num_pairs, p=list(shares.values()))]
    overhead = [(row, truth) for row, truth in enumerate(truths) if truth == "overhead"]
    others = [(row, truth) for row, truth in enumerate(truths) if truth != "overhead"]
    cells = CELLS_PER_SIDE**2
    return [
        PairTask(world_seed, pair_set, land, tuple(overhead[start : start + cells]))
        for land, start in enumerate(range(0, len(overhead), cells))
    ] + [
        PairTask(world_seed, pair_set, -1, tuple(others[start : start + OTHERS_PER_TASK]))
        for start in range(0, len(others), OTHERS_PER_TASK)
    ]


def make_pairs(task: PairTask) -> list[dict[str, Any]]:
    """The rows of one task, each with its number under `row`."""
    land = _draw_land(task) if task.land >= 0 else None
    rows: list[dict[str, Any]] = []
    for position, (row, truth) in enumerate(task.rows):
        seeds = (task.world_seed, PAIR_SETS[task.pair_set], 1, row)
        envelope = draw_envelope(np.random.default_rng((*seeds, 0)), DAMAGE_SHARE if task.pair_set == "pairs" else 0.0)
        rng = np.random.default_rng((*seeds, 1))
        if land is not None:
            pixels_HWC, words = land.cell(rng, position, envelope)
        elif truth == "ground":
            pixels_HWC, words = draw_ground_picture(rng, (envelope.width, envelope.height))
        else:
            pixels_HWC, words = draw_diagram(rng, (envelope.width, envelope.height))
        good = words if land is not None else describe_ground(rng, words)
        rows.append(
            _row(
                task.pair_set,
                row,
                envelope,
                {"truth": truth, "good": good, "image": encode(pixels_HWC, envelope)},
            )
        )
        rows[-1].update(_texts(np.random.default_rng((*seeds, 2)), good))
    return rows


def _row(pair_set: str, row: int, envelope: Envelope, made: dict[str, Any]) -> dict[str, Any]:
    extension = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[envelope.image_format]
    return {
        "row": row,
        "id": f"{'web' if pair_set == 'pairs' else 'label'}-{row:06d}",
        "image": made["image"],
        "url": f"https://pictures.example.com/{row % 97:02d}/{row:06d}.{extension}",
        "truth": "broken" if envelope.damage else made["truth"],
        "is_overhead": made["truth"] == "overhead",
    }


def _texts(rng: np.random.Generator, good: str) -> dict[str, str]:
    sort = draw_text_sort(rng)
    return {"alt_text": make_alt_text(rng, sort, good), "alt_truth": sort}


@dataclass(frozen=True)
class _Land:
    """One drawn land, of which each cell becomes one picture."""

    features: list[Feature]
    grid: Grid
    rgb_HWC: Bytes
    classes_HW: Bytes
    cells_per_side: int

    def cell(self, rng: np.random.Generator, position: int, envelope: Envelope) -> tuple[Bytes, str]:
        """A cut of one cell, turned or mirrored, and a true sentence on it."""
        turned = bool(rng.random() < 0.5)
        width, height = (envelope.height, envelope.width) if turned else (envelope.width, envelope.height)
        row, column = divmod(position, self.cells_per_side)
        top = row * LARGEST_SIDE_PX + int(rng.integers(0, LARGEST_SIDE_PX - height + 1))
        left = column * LARGEST_SIDE_PX + int(rng.integers(0, LARGEST_SIDE_PX - width + 1))
        window = np.s_[top : top + height, left : left + width]
        pixels_HWC = self.rgb_HWC[window]
        shares = np.bincount(self.classes_HW[window].ravel(), minlength=len(CLASS_NAMES)) / (width * height)
        gsd = self.grid.ground_sample_distance_m
        cut = Grid(self.grid.left_m + left * gsd, self.grid.top_m - top * gsd, gsd, width, height)
        names: dict[str, list[str]] = {}
        for feature in visible_features(self.features, cut):
            if feature.name:
                names.setdefault(CLASS_NAMES[feature.class_id], []).append(feature.name)
        words = describe_overhead(rng, dict(zip(CLASS_NAMES, shares.tolist(), strict=True)), names)
        pixels_HWC = np.rot90(pixels_HWC) if turned else pixels_HWC
        return np.ascontiguousarray(pixels_HWC[:, :: int(rng.choice([-1, 1]))]), words


def _draw_land(task: PairTask) -> _Land:
    """A land with just enough cells for the task's rows, at its own scale (1.2-3 m a pixel)."""
    seeds = (task.world_seed, PAIR_SETS[task.pair_set], 2, task.land)
    rng = np.random.default_rng(seeds)
    cells_per_side = math.ceil(math.sqrt(len(task.rows)))
    side_px = cells_per_side * LARGEST_SIDE_PX
    gsd = float(rng.uniform(1.2, 3.0))
    half_m = side_px * gsd / 2
    features = lay_out(seeds, half_m + 60)
    grid = Grid(-half_m, half_m, gsd, side_px, side_px)
    rgb_HWC, classes_HW = render(features, grid, draw_look(rng), int(rng.integers(1 << 30)))
    return _Land(features, grid, to_bytes(rgb_HWC), classes_HW, cells_per_side)
