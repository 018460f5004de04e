"""An exported index, read as its users would: GeoParquet by geopandas, items by pystac, vectors by pyarrow."""

import json
from pathlib import Path
from typing import Any

import geopandas
import lance
import numpy as np
import pyarrow.parquet as pq
import pystac
import pytest
import shapely
from index_rows import build_plain
from PIL import Image
from tiny_service import CHIPS, INDEX, SCENE, make_all, tiny_cluster

from rsplatform.artifacts import Artifact
from rsplatform.config import validate
from rsplatform.index.export import ExportIndexConfig, export_index
from rsplatform.index.table import TABLE_PATH
from rsplatform.ledger import read_drops


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The export of the tiny service's index."""
    root = str(tmp_path_factory.mktemp("root"))
    make_all(root)
    config = validate(ExportIndexConfig, {"output": "export/tiny/v1", "index": INDEX, "licence": "CC-BY-4.0"}, "test")
    return export_index(config, tiny_cluster(root))


def index_rows(export: Artifact) -> list[dict[str, Any]]:
    return lance.dataset(f"{export.root}/{INDEX}/{TABLE_PATH}").to_table().to_pylist()


def test_the_embeddings_are_geoparquet(export: Artifact) -> None:
    path, rows = export.path("embeddings.parquet"), index_rows(export)
    frame = geopandas.read_parquet(path)
    assert frame.crs is not None and frame.crs.name.startswith("WGS 84")
    assert frame["id"].tolist() == [row["id"] for row in rows]
    assert [shapely.to_wkb(shape) for shape in frame.geometry] == [row["geometry"] for row in rows]
    first = rows[0]
    inside = geopandas.read_parquet(path, bbox=(first["west"], first["south"], first["east"], first["north"]))
    assert first["id"] in set(inside["id"]) and len(inside) < len(frame) / 4  # by the covering column
    table = pq.read_table(path)
    vectors = np.stack(table["embedding"].to_numpy())
    assert vectors.dtype == np.float32
    assert (vectors == np.array([row["vector"] for row in rows], dtype=np.float32)).all()
    metadata = table.schema.metadata
    assert json.loads(metadata[b"emb"]) == {
        "emb:type": "chip",
        "emb:dimensions": vectors.shape[1],
        "data_type": "float32",
    }
    assert json.loads(metadata[b"geo"])["version"] == "1.1.0"
    assert table["caption"].to_pylist() == [row["caption"] for row in rows]


def test_the_collection_tells_what_the_extension_requires(export: Artifact) -> None:
    document = json.loads(Path(export.path("collection.json")).read_text())
    collection = pystac.Collection.from_dict(document)
    rows = index_rows(export)
    assert (collection.license, document["emb:type"], document["data_type"]) == ("CC-BY-4.0", "chip", "float32")
    assert document["emb:dimensions"] == len(rows[0]["vector"]) and document["emb:chip_layout"]["layout_type"]
    links = {link["rel"]: link["href"] for link in document["links"]}
    assert links["emb:source-data"] == f"../../../{CHIPS}" and "emb:model" in links
    west, south, east, north = document["extent"]["spatial"]["bbox"][0]
    assert west == pytest.approx(min(row["west"] for row in rows)) and north == pytest.approx(
        max(row["north"] for row in rows)
    )
    assert south < north and west < east


def test_the_items_are_stac_items(export: Artifact) -> None:
    table = pq.read_table(export.path("items.parquet"))
    frame = geopandas.read_parquet(export.path("items.parquet"))
    row, rows = table.to_pylist()[0], index_rows(export)
    assert table.num_rows == 1 and frame.geometry.iloc[0].covers(shapely.from_wkb(rows[5]["geometry"]).centroid)
    names = ("type", "stac_version", "stac_extensions", "id", "links", "assets", "collection")
    properties = {key: row[key] for key in row if key not in (*names, "geometry", "bbox") and row[key] is not None}
    properties["datetime"] = row["datetime"].isoformat()
    document = {key: row[key] for key in names} | {
        "geometry": shapely.geometry.mapping(frame.geometry.iloc[0]),
        "bbox": list(row["bbox"].values()),
        "properties": properties,
    }
    item = pystac.Item.from_dict(document)
    assert (item.id, item.collection_id) == (SCENE, "tiny-v1") and item.datetime is not None
    assert item.assets["embeddings"].href == "./embeddings.parquet"
    assert item.properties["emb:quantization"]["quantized_dtype"] == "float16"
    about = json.loads(table.schema.metadata[b"stac-geoparquet"])
    assert set(about["collections"]) == {"tiny-v1"}


def test_pictures_without_place_and_date_are_exported_but_are_no_item(export: Artifact, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "black.png")
    folders = [{"path": str(tmp_path), "scene": "photos"}]
    build_plain(export.root, "index/tiny/v2", base=INDEX, folders=folders)
    config = validate(ExportIndexConfig, {"output": "export/tiny/v2", "index": "index/tiny/v2"}, "test")
    made = export_index(config, tiny_cluster(export.root))
    frame = geopandas.read_parquet(made.path("embeddings.parquet"))
    assert len(frame) == 65 and frame.geometry.isna().sum() == 1
    assert read_drops(made).to_pylist()[0]["reason"] == "no_datetime"
    assert made.manifest()["counts"]["scenes"] == {"inputs": 2, "kept": 1, "dropped": {"no_datetime": 1}}
