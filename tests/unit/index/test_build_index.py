"""What an index is made of: chips of several sizes, folders of pictures, an earlier index without some scenes."""

import shutil
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pytest
import shapely
from index_rows import build_plain
from PIL import Image
from tiny_service import CAPTIONS, CHIPS, GSD_M, INDEX, MODEL, SCENE, finish, make_all, make_model, tiny_cluster

from rsplatform.artifacts import Artifact
from rsplatform.config import ConfigError, validate
from rsplatform.index.build import BuildIndexConfig
from rsplatform.index.check import check_base
from rsplatform.index.embed import load_embedder
from rsplatform.index.pictures import Pictures
from rsplatform.index.sources import SIDES, WINDOW
from rsplatform.index.store import ChipIndex
from rsplatform.index.table import TABLE_PATH
from rsplatform.ledger import read_drops

WIDE = "chips/wide/v1"
# NaN in rows of a folder, and no NaN equals another.
UNKNOWN = ["ground_sample_distance_m", *SIDES, *WINDOW]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny service, the same chips once more as if they were of another size, and a folder of pictures."""
    place = tmp_path_factory.mktemp("root")
    make_all(str(place))
    shutil.copytree(place / CHIPS, place / WIDE)
    finish(str(place), WIDE)
    for name, colour in (("red.png", (200, 20, 20)), ("deep/er/blue.jpg", (20, 20, 200))):
        path = place / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((90, 120, 3), colour, np.uint8)).save(path)
    (place / "photos" / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    (place / "photos" / "readme.txt").write_text("no picture either")
    return str(place)


def test_chips_of_several_sizes_share_one_index(root: str) -> None:
    sizes = [{"chips": CHIPS, "captions": CAPTIONS}, {"chips": WIDE, "id_suffix": "~wide"}]
    index, counts = build_plain(root, "index/sizes/v1", chips=sizes)
    assert counts == {"inputs": 128, "kept": 128, "dropped": {}}
    both = index.search(index.vector(f"{SCENE}-0007"), 2)
    assert {hit.id: (hit.table, hit.row, hit.caption) for hit in both} == {
        f"{SCENE}-0007": (CHIPS, 7, "chip 7"),
        f"{SCENE}-0007~wide": (WIDE, 7, ""),
    }
    pictures = Pictures(root, tiny_cluster(root).resolve).read(both)
    assert pictures[0] == pictures[1] == lance.dataset(f"{root}/{CHIPS}/chips.lance").take([7])["image"][0].as_py()
    with pytest.raises(ConfigError, match=r"0000 comes twice.*id_suffix"):
        build_plain(root, "index/alike/v1", chips=[{"chips": CHIPS}, {"chips": WIDE}])


def test_geometry_is_the_turned_outline_that_the_scenes_grid_gives(root: str) -> None:
    rows = lance.dataset(f"{root}/{INDEX}/{TABLE_PATH}").to_table().to_pylist()
    for row in rows[::9]:
        outline = shapely.from_wkb(row["geometry"])
        assert len(outline.exterior.coords) == 5 and outline.is_valid
        assert np.allclose(outline.bounds, [row["west"], row["south"], row["east"], row["north"]], atol=1e-7)
        box = shapely.box(*outline.bounds)
        assert 0.9 * box.area < outline.area < box.area  # UTM's north is not the map's
    assert {row["ground_sample_distance_m"] for row in rows} == {GSD_M}
    assert {row["model_hash"] for row in rows} == {load_embedder(root, MODEL).model_hash}


def test_any_folder_of_pictures_is_an_input(root: str) -> None:
    folders = [{"path": f"{root}/photos", "scene": "photos", "ground_sample_distance_m": 0.3}]
    index, counts = build_plain(root, "index/photos/v1", folders=folders)
    assert counts == {"inputs": 3, "kept": 2, "dropped": {"unreadable": 1}}
    assert read_drops(Artifact(root, "index/photos/v1"))["id"].to_pylist() == ["photos:broken.jpg"]
    hit = index.get(["photos:deep:er:blue.jpg"])["photos:deep:er:blue.jpg"]
    assert (hit.scene, hit.file, hit.row) == ("photos", "deep/er/blue.jpg", -1)
    assert np.isnan(hit.bounds_lonlat).all() and hit.ground_sample_distance_m == pytest.approx(0.3)
    data = (Path(root) / "photos/deep/er/blue.jpg").read_bytes()
    assert Pictures(root, tiny_cluster(root).resolve).read([hit]) == [data]
    embedder = load_embedder(root, MODEL)
    assert index.search(embedder.embed_images([data], [0.3])[0], 1)[0].id == hit.id
    with pytest.raises(ConfigError, match=r"folders\.0\.path: no JPEG"):
        build_plain(root, "index/none/v1", folders=[{"path": f"{root}/scenes", "scene": "none"}])


def test_an_index_grows_and_shrinks_by_its_next_version(root: str) -> None:
    """Rows that stay keep their very vectors; the next version equals the one that is built anew of what is left."""
    photos = [{"path": f"{root}/photos", "scene": "photos"}]
    grown, counts = build_plain(root, "index/grown/v2", base=INDEX, folders=photos)
    assert counts == {"inputs": 67, "kept": 66, "dropped": {"unreadable": 1}}
    base = ChipIndex(f"{root}/{INDEX}", grown.meta.model_hash)
    assert (grown.vector(f"{SCENE}-0009") == base.vector(f"{SCENE}-0009")).all()
    without, counts = build_plain(root, "index/grown/v3", base="index/grown/v2", remove_scenes=["town_*"])
    assert counts == {"inputs": 66, "kept": 2, "dropped": {"scene_removed": 64}}
    anew, _ = build_plain(root, "index/anew/v1", folders=photos)
    assert without.meta == anew.meta
    tables = [lance.dataset(f"{root}/index/{name}/{TABLE_PATH}").to_table() for name in ("grown/v3", "anew/v1")]
    assert tables[0].drop(UNKNOWN).equals(tables[1].drop(UNKNOWN))
    assert len(lance.dataset(f"{root}/index/grown/v2/{TABLE_PATH}").get_fragments()) == 1  # five shards, compacted
    replaced, counts = build_plain(
        root, "index/grown/v4", base="index/grown/v2", remove_scenes=[SCENE], chips=WIDE, folders=[]
    )
    assert replaced.meta.num_rows == 66 and replaced.get([f"{SCENE}-0001"])[f"{SCENE}-0001"].table == WIDE


def test_a_base_that_does_not_fit_is_refused(root: str) -> None:
    with pytest.raises(ConfigError, match=r"'sea_\*' matches no scene.*town_north"):
        build_plain(root, "index/bad/v1", base=INDEX, remove_scenes=["sea_*"])
    with pytest.raises(ConfigError, match=r"0000 comes twice.*remove_scenes"):
        build_plain(root, "index/bad/v1", base=INDEX, chips=CHIPS)
    make_model(root, "model/other/v1", seed=1)
    other = load_embedder(root, "model/other/v1").model_hash
    with pytest.raises(ConfigError, match="built with model"):
        check_base(INDEX, [], root, other)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({}, "nothing to index"),
        ({"chips": [{"chips": CHIPS}], "captions": CAPTIONS}, "list of chips"),
        ({"chips": CHIPS, "remove_scenes": ["a"]}, "from a base"),
    ],
)
def test_recipes_that_say_nothing_or_too_much_are_refused(sources: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(BuildIndexConfig, {"output": "index/a/v1", "model": MODEL} | sources, "test")
