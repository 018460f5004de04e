"""Benchmarks: what decides a number is pinned; masks of any encoding become class ids."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rsplatform.cluster import Cluster
from rsplatform.config import ConfigError, validate
from rsplatform.evaluate.benchmarks import (
    CaptionFolderRetrieval,
    Classification,
    MaskClass,
    Segmentation,
    encode_mask,
    load_classification,
    load_retrieval,
    masked_pictures,
    spread,
)
from rsplatform.evaluate.files import squares


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    """A data root with three captioned and labelled pictures and one mask."""
    for name, colour in (("a", "red"), ("b", "green"), ("c", "blue")):
        Image.new("RGB", (32, 24), colour).save(tmp_path / f"{name}.png")
    entries = [
        {"filename": f"{name}.png", "split": "val", "sentences": [{"raw": f"{name} {i}"} for i in range(2)]}
        for name in "cab"
    ]
    (tmp_path / "captions.json").write_text(json.dumps({"images": entries}))
    (tmp_path / "labels.csv").write_text("file,label\nb.png,footballfield\na.png,port\n")
    mask = Image.new("P", (32, 24), 1)
    mask.putpalette([0, 0, 0, 60, 16, 152])
    (tmp_path / "masks").mkdir()
    mask.save(tmp_path / "masks" / "a.png")
    return Cluster(root=str(tmp_path / "root"), data_root=str(tmp_path))


def test_retrieval_order_and_pin_do_not_depend_on_the_file(cluster: Cluster, tmp_path: Path) -> None:
    benchmark = CaptionFolderRetrieval(name="r", captions="captions.json", images=".")
    data = load_retrieval(benchmark, cluster)
    assert data.texts == ["a 0", "a 1", "b 0", "b 1", "c 0", "c 1"]
    assert data.image_of_text == [0, 0, 1, 1, 2, 2]
    text = (tmp_path / "captions.json").read_text()
    (tmp_path / "captions.json").write_text(text.replace("b 1", "b one"))
    assert load_retrieval(benchmark, cluster).pin != data.pin
    with pytest.raises(ConfigError, match="split 'test'.*val"):
        load_retrieval(benchmark.model_copy(update={"split": "test"}), cluster)


def test_class_names_spell_labels_and_extra_classes_compete(cluster: Cluster) -> None:
    benchmark = Classification(
        name="c", folder=".", class_names={"footballfield": "football field"}, extra_classes=["stadium"]
    )
    data = load_classification(benchmark, cluster)
    assert data.class_names == ["football field", "port", "stadium"]
    assert data.labels == [1, 0]
    with pytest.raises(ConfigError, match="airprt"):
        load_classification(benchmark.model_copy(update={"class_names": {"airprt": "airport"}}), cluster)


def segmentation(**changes: object) -> Segmentation:
    classes = [
        MaskClass(name="land", values=["#8429F6"], prompts=["land"]),
        MaskClass(name="building", values=["#3C1098"], prompts=["buildings"]),
    ]
    values = {"name": "s", "folder": ".", "images": "a.png", "mask_replace": {"a.png": "masks/a.png"}}
    values |= {"classes": classes, "model_ground_sample_distance_m": 1.0, "image_ground_sample_distance_m": 0.5}
    return Segmentation.model_validate(values | changes)


def test_palette_masks_are_read_as_their_colours(cluster: Cluster) -> None:
    (picture,) = masked_pictures(segmentation(), cluster)
    assert picture.ground_sample_distance_m == 0.5
    assert picture.mask_HW.shape == (24, 32)
    assert (picture.mask_HW == 1).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": "*.bmp"}, "no picture matches"),
        ({"image_ground_sample_distance_m": None}, "no georeference"),
    ],
)
def test_what_is_missing_is_named(cluster: Cluster, changes: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        list(masked_pictures(segmentation(**changes), cluster))


def test_pictures_are_found_by_globs_with_folders(cluster: Cluster) -> None:
    names = ["a.png", "x/a.png", "x/y/a.png", "x/y/b.tif", "ax/a.png"]
    for pattern, expected in (
        ("*.png", ["a.png"]),
        ("x/*.png", ["x/a.png"]),
        ("?x/*", ["ax/a.png"]),
        ("**/*.png", ["a.png", "ax/a.png", "x/a.png", "x/y/a.png"]),
        ("x/**/*", ["x/a.png", "x/y/a.png", "x/y/b.tif"]),
    ):
        assert segmentation(images=pattern).pictures_of(names) == expected


def test_a_picture_without_its_mask_is_named_by_the_listing_alone(cluster: Cluster) -> None:
    benchmark = segmentation(images="p/*.jpg", mask_replace={"p/": "m/", ".jpg": ".png"})
    names = ["m/a.png", "m/b.png", "m/d.png", "p/a.jpg", "p/b.jpg"]
    assert benchmark.select_files(names) == ["p/a.jpg", "p/b.jpg", "m/a.png", "m/b.png"]
    colours = benchmark.model_copy(update={"nearest_colour_from": "q/*.jpg"})
    with pytest.raises(ConfigError, match=r"no picture matches 'q/\*\.jpg'"):
        colours.select_files(names)
    assert colours.select_files([*names, "q/a.jpg", "q/a.png"])[-2:] == ["q/a.jpg", "q/a.png"]
    with pytest.raises(ConfigError, match=r"no m/c\.png, the mask of p/c\.jpg \(1 missing\); fix `mask_replace` of s"):
        benchmark.select_files([*names, "p/c.jpg"])


def test_unnamed_mask_values_are_ignored() -> None:
    classes = [MaskClass(name="a", values=[0, 7], prompts=["a"]), MaskClass(name="b", values=[3], prompts=["b"])]
    np.testing.assert_array_equal(encode_mask(np.array([[0, 7, 3, 9]]), classes), [[0, 0, 1, 255]])


@pytest.mark.parametrize("text", ["", " "])
def test_prompts_without_words_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"r\.yaml: prompts\.1: .*an empty text asks for nothing; write one"):
        validate(MaskClass, {"name": "a", "values": [1], "prompts": ["a field", text]}, "r.yaml")
    with pytest.raises(ConfigError, match=r"r\.yaml: prompt: .*an empty text asks for nothing; write one"):
        validate(Classification, {"name": "c", "folder": "f", "prompt": text}, "r.yaml")


def test_spread_is_even_and_whole() -> None:
    assert spread(list(range(10)), 5) == [0, 2, 4, 6, 8]
    assert spread([1, 2], 5) == [1, 2]


def classification() -> Classification:
    return Classification(name="c", folder=".")


def retrieval() -> CaptionFolderRetrieval:
    return CaptionFolderRetrieval(name="r", captions="captions.json", images=".")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_missing_or_foreign_caption_files_are_named(cluster: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    for text in ('{"images": [{"filename": "a.png"}]}', '["a.png"]', "{", '{"images": 3}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"captions\.json: not RSICD's layout.*download it again or fix"):
            load_retrieval(retrieval(), cluster)
    path.unlink()
    with pytest.raises(ConfigError, match=r"captions\.json: no such file; fix the recipe or .*data_root"):
        load_retrieval(retrieval(), cluster)


def test_missing_or_incomplete_label_tables_are_named(cluster: Cluster, tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    for content, words in (
        (b"file,class\na.png,port\n", "columns file and label"),
        (b"file,label\na.png,port\nb.png\n", "line 3 lacks its file or label"),
        (b"file,label\na.png,\xff\xfe\n", "not a CSV table in UTF-8"),
    ):
        table.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"labels\.csv: .*{words}"):
            load_classification(classification(), cluster)
    table.unlink()
    with pytest.raises(ConfigError, match=r"labels\.csv: no such file; fix `folder` or `table`"):
        load_classification(classification(), cluster)


def test_pictures_that_a_table_names_in_vain_are_named(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "b.png").unlink()
    with pytest.raises(ConfigError, match=r"/b\.png: no such file; .*captions\.json names it: fix `images` of r"):
        load_retrieval(retrieval(), cluster)
    with pytest.raises(ConfigError, match=r"/b\.png: no such file; .*labels\.csv names it"):
        load_classification(classification(), cluster)
    (tmp_path / "b.png").mkdir()
    with pytest.raises(ConfigError, match=r"/b\.png: cannot be read"):
        load_classification(classification(), cluster)


def test_damaged_pictures_are_named_when_they_are_decoded(cluster: Cluster, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "b.jpg")
    cut(tmp_path / "b.jpg")
    (tmp_path / "labels.csv").write_text("file,label\na.png,port\nb.jpg,field\n")
    data = load_classification(classification(), cluster)
    pictures = squares(data.sources, data.images, 16)
    assert next(pictures).pixels_HWC.shape == (16, 16, 3)
    with pytest.raises(ConfigError, match=r"/b\.jpg: unreadable: .*replace it by the original"):
        next(pictures)
    with pytest.raises(ConfigError, match=r"/b\.jpg: unreadable: .*replace it by the original"):
        list(masked_pictures(segmentation(images="b.jpg"), cluster))


@pytest.mark.parametrize("name", ["mask.png", "mask.tif"])
def test_missing_or_damaged_masks_are_named_with_their_picture(cluster: Cluster, tmp_path: Path, name: str) -> None:
    benchmark = segmentation(mask_replace={"a.png": name})
    with pytest.raises(ConfigError, match=rf"{name}: no such file; it is the mask of .*a\.png: fix `mask_replace`"):
        list(masked_pictures(benchmark, cluster))
    noise = np.random.default_rng(0).integers(0, 256, (24, 32), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    assert len(list(masked_pictures(benchmark, cluster))) == 1
    cut(tmp_path / name)
    with pytest.raises(ConfigError, match=rf"{name}: .*it is the mask of .*a\.png"):
        list(masked_pictures(benchmark, cluster))


def test_a_damaged_geotiff_is_named(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(b"II*\x00 no raster")
    with pytest.raises(ConfigError, match=r"a\.tif: unreadable: .*replace it by the original"):
        list(masked_pictures(segmentation(images="a.tif"), cluster))
