"""Rows for benchmarks/search.py: real embeddings, copied and jittered up to a number of rows, at places on a map.

In: a model's folder and RSICD. Out: unit vectors (N, E) float16, bounds (N, 4), and texts as queries (Q, E).
Copies lie as far from their original as its tenth real neighbour does (the median over the originals). A model of
another width is turned into `width` dimensions by a random rotation, which keeps every distance.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rsplatform.index.finish import TEXT_QUERIES
from rsplatform.model.embedder import Embedder

EARTH = (-180.0, -80.0, 180.0, 80.0)
CHIP_DEGREES = 0.005
CHIPS_PER_SCENE = 400
CHUNK = 50_000


class Data(NamedTuple):
    """Rows, queries, and the distance of the jitter."""

    vectors_NE: np.ndarray
    bounds_N4: np.ndarray
    texts_QE: np.ndarray
    tuning_texts_QE: np.ndarray  # other captions, which the index may choose its parameters with
    neighbour_distance: float
    num_real: int


def make_data(model: Path, rsicd: Path, rows: int, width: int, queries: int, pictures: int) -> Data:
    """Embed RSICD's training pictures and captions of its val split, and make `rows` of them."""
    entries = json.loads((rsicd / "dataset_rsicd.json").read_text())["images"]
    embedder = Embedder.load(model)
    names = [entry["filename"] for entry in entries if entry["split"] == "train"][:pictures]
    real = embedder.embed_images([(rsicd / "RSICD_images" / name).read_bytes() for name in names])
    captions = dict.fromkeys(entry["sentences"][0]["raw"] for entry in entries if entry["split"] == "val")
    texts = embedder.embed_texts(list(captions)[: queries + TEXT_QUERIES])
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(width, real.shape[1])))[0].T.astype(np.float32)
    real, texts = real @ rotation, texts @ rotation
    distance = tenth_neighbour_distance(real)
    vectors = np.empty((rows, width), np.float16)
    for start in range(0, rows, CHUNK):
        part = real[rng.integers(0, len(real), min(CHUNK, rows - start))]
        if start + len(part) > len(real):
            part = part + rng.normal(size=part.shape).astype(np.float32) * distance / np.sqrt(width)
        else:
            part = real[start : start + len(part)]
        vectors[start : start + len(part)] = part / np.linalg.norm(part, axis=1, keepdims=True)
    return Data(vectors, make_bounds(rows, rng), texts[:queries], texts[queries:], distance, len(real))


def kept_data(folder: Path, wanted: tuple[Path, Path, int, int, int, int]) -> Data:
    """`make_data(*wanted)`, from the folder if a run has left it there, else left there for the next."""
    described = [str(each) for each in wanted]
    note = folder / "made.json"
    if not note.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in make_data(*wanted)._asdict().items():
            np.save(folder / f"{name}.npy", value)
        note.write_text(json.dumps(described))
    if json.loads(note.read_text()) != described:
        raise ValueError(f"{folder} holds rows of {note.read_text()}; give another --data")
    parts = {name: np.load(folder / f"{name}.npy") for name in Data._fields}
    return Data(
        **parts | {"neighbour_distance": float(parts["neighbour_distance"]), "num_real": int(parts["num_real"])}
    )


def tenth_neighbour_distance(unit_NE: np.ndarray) -> float:
    """Median distance of a vector to its tenth neighbour."""
    cosines = unit_NE @ unit_NE.T
    tenth = -np.partition(-cosines, 10, axis=1)[:, 10]
    return float(np.median(np.sqrt(np.maximum(0, 2 - 2 * tenth))))


def make_bounds(rows: int, rng: np.random.Generator) -> np.ndarray:
    """Chips side by side in scenes, which lie anywhere on the map, in the order of the scenes."""
    scenes = -(-rows // CHIPS_PER_SCENE)
    corner = rng.uniform(EARTH[:2], (EARTH[2] - 1, EARTH[3] - 1), (scenes, 2)).repeat(CHIPS_PER_SCENE, axis=0)[:rows]
    number, side = np.arange(rows) % CHIPS_PER_SCENE, int(np.sqrt(CHIPS_PER_SCENE))
    west_south = corner + np.stack([number % side, number // side], axis=1) * CHIP_DEGREES
    return np.concatenate([west_south, west_south + CHIP_DEGREES], axis=1)


def random_box(bounds_N4: np.ndarray, fraction: float, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A box that holds between 10 rows and `fraction` of them, as near to that as a few tries come."""
    west, south, east, north = EARTH
    scale = np.sqrt(fraction)
    while True:
        width, height = (east - west) * scale, (north - south) * scale
        left, low = rng.uniform(west, east - width), rng.uniform(south, north - height)
        box = (left, low, left + width, low + height)
        held = int(inside(bounds_N4, box).sum())
        if 10 <= held <= fraction * len(bounds_N4):
            return box
        scale *= 0.98 if held else 1.0


def inside(bounds_N4: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    """Which rows lie within a box."""
    west, south, east, north = box
    return (
        (bounds_N4[:, 0] >= west) & (bounds_N4[:, 2] <= east) & (bounds_N4[:, 1] >= south) & (bounds_N4[:, 3] <= north)
    )
