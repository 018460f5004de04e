"""An index as STAC: a Collection with the fields of the Embedding extension, and an Item for each scene.

In: facts of an index. Out: documents as the specifications write them (STAC 1.0.0, Embedding v0.0.1, stac-geoparquet
1.1). Reads and writes no files.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import shapely
from shapely.geometry.base import BaseGeometry

EMBEDDING = "https://stac-extensions.github.io/embeddings/v0.0.1/schema.json"
PROCESSING = "https://stac-extensions.github.io/processing/v1.2.0/schema.json"
STAC_VERSION = "1.0.0"
EMBEDDINGS_FILE, ITEMS_FILE, COLLECTION_FILE = "embeddings.parquet", "items.parquet", "collection.json"
PARQUET = "application/vnd.apache.parquet"
TIME = pa.timestamp("us", "UTC")
BBOX = pa.struct([(name, pa.float64()) for name in ("xmin", "ymin", "xmax", "ymax")])
# As this platform stores them; an export holds them as float32, which every reader of Parquet knows.
QUANTIZATION = {"method": "rounding", "original_dtype": "float32", "quantized_dtype": "float16"}

ITEM_SCHEMA = pa.schema(
    [
        ("type", pa.string()),
        ("stac_version", pa.string()),
        ("stac_extensions", pa.list_(pa.string())),
        ("id", pa.string()),
        ("geometry", pa.binary()),
        ("bbox", BBOX),
        ("links", pa.list_(pa.struct([("href", pa.string()), ("rel", pa.string()), ("type", pa.string())]))),
        (
            "assets",
            pa.struct(
                [
                    (
                        "embeddings",
                        pa.struct([("href", pa.string()), ("type", pa.string()), ("roles", pa.list_(pa.string()))]),
                    )
                ]
            ),
        ),
        ("collection", pa.string()),
        ("datetime", TIME),
        ("start_datetime", TIME),
        ("end_datetime", TIME),
        ("gsd", pa.float64()),
        ("processing:datetime", pa.string()),
        ("emb:quantization", pa.struct([(name, pa.string()) for name in QUANTIZATION])),
    ]
)


@dataclass(frozen=True)
class SceneFacts:
    """What an Item tells of a scene: the hull of its chips, their dates and scales (metres), and how many they are."""

    hull: BaseGeometry | None = None
    first: datetime | None = None
    last: datetime | None = None
    finest_m: float | None = None
    num_chips: int = 0

    def with_chips(self, chips: list[dict[str, Any]]) -> "SceneFacts":
        """The facts with more rows of the index's table."""
        outlines = [shapely.from_wkb(row["geometry"]) for row in chips if row["geometry"] is not None]
        parts = [*outlines, *([self.hull] if self.hull is not None else [])]
        times = [row["datetime"] for row in chips if row["datetime"]]
        scales = [row["ground_sample_distance_m"] for row in chips]
        scales = [*(float(m) for m in scales if m is not None and np.isfinite(m)), *_known(self.finest_m)]
        return replace(
            self,
            hull=shapely.convex_hull(shapely.GeometryCollection(parts)) if parts else None,
            first=min([*times, *_known(self.first)], default=None),
            last=max([*times, *_known(self.last)], default=None),
            finest_m=min(scales, default=None),
            num_chips=self.num_chips + len(chips),
        )


def collection(
    name: str, facts: Iterable[SceneFacts], width: int, licence: str, model: str, sources: list[str]
) -> dict[str, Any]:
    """The Collection of an index; `model` and `sources` are links to what made it."""
    scenes = list(facts)
    hulls = [scene.hull.bounds for scene in scenes if scene.hull is not None]
    sides = np.array(hulls or [(-180.0, -90.0, 180.0, 90.0)])
    bbox = [*sides[:, :2].min(axis=0).tolist(), *sides[:, 2:].max(axis=0).tolist()]
    first = min([scene.first for scene in scenes if scene.first], default=None)
    last = max([scene.last for scene in scenes if scene.last], default=None)
    scales = [scene.finest_m for scene in scenes if scene.finest_m is not None]
    links = [{"rel": "emb:model", "href": model}, *({"rel": "emb:source-data", "href": source} for source in sources)]
    return {
        "type": "Collection",
        "stac_version": STAC_VERSION,
        "stac_extensions": [EMBEDDING],
        "id": name,
        "description": f"Embeddings of {sum(scene.num_chips for scene in scenes)} chips for search by text and picture",
        "license": licence,
        "extent": {"spatial": {"bbox": [bbox]}, "temporal": {"interval": [[_rfc3339(first), _rfc3339(last)]]}},
        "emb:type": "chip",
        "emb:dimensions": width,
        "emb:chip_layout": {"layout_type": "variable_grid"},
        "emb:fit_for_use": ["retrieval"],
        "data_type": "float32",
        **({"gsd": min(scales)} if scales else {}),
        "links": links,
        "assets": {"embeddings": {"href": EMBEDDINGS_FILE, "type": PARQUET, "roles": ["data"]}},
        "item_assets": {"embeddings": {"type": PARQUET, "roles": ["data"]}},
    }


def item(scene: str, facts: SceneFacts, collection_id: str, processed: str) -> dict[str, Any]:
    """A row of ITEM_SCHEMA: one scene's Item, whose chips are those of its name in the embeddings' file."""
    is_moment = facts.first == facts.last
    bounds = None if facts.hull is None else dict(zip(BBOX.names, facts.hull.bounds, strict=True))
    return {
        "type": "Feature",
        "stac_version": STAC_VERSION,
        "stac_extensions": [EMBEDDING, PROCESSING],
        "id": scene,
        "geometry": None if facts.hull is None else shapely.to_wkb(facts.hull),
        "bbox": bounds,
        "links": [{"href": f"./{COLLECTION_FILE}", "rel": "collection", "type": "application/json"}],
        "assets": {"embeddings": {"href": f"./{EMBEDDINGS_FILE}", "type": PARQUET, "roles": ["data"]}},
        "collection": collection_id,
        "datetime": facts.first if is_moment else None,
        "start_datetime": None if is_moment else facts.first,
        "end_datetime": None if is_moment else facts.last,
        "gsd": facts.finest_m,
        "processing:datetime": processed,
        "emb:quantization": QUANTIZATION,
    }


def geo_metadata(geometry_types: list[str]) -> dict[str, Any]:
    """GeoParquet 1.1: WKB in OGC:CRS84 (its default), with the `bbox` column as covering."""
    covering = {"bbox": {name: ["bbox", name] for name in BBOX.names}}
    column = {"encoding": "WKB", "geometry_types": geometry_types, "covering": covering}
    return {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}


def _known(value: Any) -> list[Any]:
    return [] if value is None else [value]


def _rfc3339(time: datetime | None) -> str | None:
    return None if time is None else f"{time:%Y-%m-%dT%H:%M:%SZ}"
