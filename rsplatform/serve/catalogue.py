"""The scenes behind the chips: `scenes.json` of chips artifacts, and where on Earth a part of a chip lies.

In: the catalogues as ingest wrote them, chips of the index. Out: lon/lat of fractions of a chip, scene summaries for
the page. Opens no raster (tiles.py does).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rsplatform.artifacts import open_artifact
from rsplatform.config import ConfigError
from rsplatform.geo import BoundsLonLat, Grid
from rsplatform.index.store import Hit
from rsplatform.sources.scenes import scene_from_json
from rsplatform.storage import exists, read_json

CATALOGUE_FILE = "scenes.json"

LonLat = tuple[float, float]
# Longitude and latitude of a position in a picture, given as fractions (row, column) from its top left.
Place = Callable[[float, float], LonLat]


@dataclass(frozen=True)
class SceneEntry:
    """One scene of the catalogue; `uri` is where its raster lies."""

    id: str
    uri: str
    grid: Grid
    ground_sample_distance_m: float
    datetime: str
    attribution: str  # of the imagery and of the maps
    bands: tuple[int, ...]
    stretch: tuple[tuple[float, float], ...] | None  # value range per band that became 0…255 in the chips

    @property
    def bounds_lonlat(self) -> BoundsLonLat:
        """Bounds of the whole raster."""
        return self.grid.bounds_lonlat(0, 0, self.grid.height, self.grid.width)

    def summary(self) -> dict[str, Any]:
        """What the page needs to show the scene; the raster's place is not told."""
        return {
            "id": self.id,
            "bounds_lonlat": self.bounds_lonlat,
            "ground_sample_distance_m": self.ground_sample_distance_m,
            "datetime": self.datetime,
            "attribution": self.attribution,
        }


class Catalogue:
    """Scenes by id, from the parsed scenes.json; `resolve` turns its URIs into places that can be opened.

    A scene of several dates is shown by its first.

    Raises:
        KeyError: an entry without one of the fields that ingest writes.
    """

    def __init__(self, entries: list[dict[str, Any]], resolve: Callable[[str], str]) -> None:
        self.scenes = {entry["id"]: _scene(entry, resolve) for entry in entries}

    def place_of(self, hit: Hit) -> Place | None:
        """Where the parts of a chip lie; None for a picture whose place nobody knows."""
        if any(math.isnan(side) for side in hit.bounds_lonlat):
            return None
        return lambda row_fraction, column_fraction: self.place(hit, row_fraction, column_fraction)

    def place(self, hit: Hit, row_fraction: float, column_fraction: float) -> LonLat:
        """Longitude and latitude of a position in a chip, as fractions from its top left."""
        row, column, height, width = hit.window_px
        scene = self.scenes.get(hit.scene)
        if scene:
            return scene.grid.lonlat(row + row_fraction * height, column + column_fraction * width)
        west, south, east, north = hit.bounds_lonlat  # a scene that left the catalogue: its chip is north-up
        return west + column_fraction * (east - west), north - row_fraction * (north - south)


def read_catalogue(root: str, chips_refs: Sequence[str], resolve: Callable[[str], str]) -> Catalogue:
    """The scenes of several chips artifacts together; chips that came without a catalogue add none.

    Raises:
        ArtifactError: an artifact is missing or unfinished.
        ConfigError: two of them call scenes of different grids alike.
    """
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for ref in chips_refs:
        uri = open_artifact(root, ref).path(CATALOGUE_FILE)
        for entry in read_json(uri) if exists(uri) else []:
            first, known = found.setdefault(entry["id"], (ref, entry))
            if known["grid"] != entry["grid"]:
                raise ConfigError(
                    f"scene {entry['id']} of {first} and that of {ref} are different rasters; "
                    "ingest one of them under another name, or serve them apart"
                )
            credits = [*known.get("landmark_attributions", []), *entry.get("landmark_attributions", [])]
            found[entry["id"]] = first, known | {"landmark_attributions": list(dict.fromkeys(credits))}
    return Catalogue([entry for _, entry in found.values()], resolve)


def corners(place: Place) -> list[LonLat]:
    """Top left, top right, bottom right, bottom left of a picture."""
    return [place(row, column) for row, column in ((0, 0), (0, 1), (1, 1), (1, 0))]


def box(place: Place, box_fraction: tuple[float, float, float, float]) -> BoundsLonLat:
    """(west, south, east, north) that hold the part (top, left, bottom, right) of a picture."""
    top, left, bottom, right = box_fraction
    points = [place(row, column) for row in (top, bottom) for column in (left, right)]
    longitudes, latitudes = zip(*points, strict=True)
    return min(longitudes), min(latitudes), max(longitudes), max(latitudes)


def _scene(entry: dict[str, Any], resolve: Callable[[str], str]) -> SceneEntry:
    scene = scene_from_json(entry)
    return SceneEntry(
        id=scene.id,
        uri=resolve(scene.uri),
        grid=scene.grid,
        ground_sample_distance_m=entry["ground_sample_distance_m"],
        datetime=scene.datetime,
        attribution="; ".join(filter(None, (scene.attribution, *entry.get("landmark_attributions", [])))),
        bands=scene.visits[0].bands,
        stretch=scene.visits[0].stretch,
    )
