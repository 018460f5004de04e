"""The filter without Ray: bad pictures and copies are dropped with a reason, and nothing it was trained on gets in."""

import io
import struct
import zlib
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rsplatform import storage
from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster
from rsplatform.config import ConfigError, load_config
from rsplatform.curate.filter_web import (
    FilterWebConfig,
    ReadCandidates,
    drop_repeats,
    make_pipeline,
    make_shards,
    store_evaluation_hashes,
)
from rsplatform.curate.overhead import LabelledSource, OverheadTest, TrainOverheadConfig, score_tests
from rsplatform.curate.overhead_model import OverheadNet, average_precision, pick_threshold
from rsplatform.curate.picture_hash import NearIndex, content_hash, difference_hash
from rsplatform.curate.pipeline import run_plain
from rsplatform.ledger import read_drops
from rsplatform.sources.web import ParquetCandidates, PictureFolderCandidates, count_candidates, read_candidates

REPOSITORY = Path(__file__).resolve().parents[3]


def encoded(image_HWC: np.ndarray, image_format: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, image_format, **options)
    return buffer.getvalue()


def smooth_picture(seed: int) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 255, (9, 9, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(small).resize((120, 100), Image.Resampling.BICUBIC))


def bomb() -> bytes:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    body = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def test_each_bad_picture_is_a_drop_and_the_rest_goes_on(tmp_path: Path) -> None:
    good, evaluation = smooth_picture(0), smooth_picture(1)
    jpeg = encoded(good, "JPEG", quality=90)
    text = "an aerial view of a harbour"
    rows = [
        ("good", jpeg, text),
        ("empty", b"", text),
        ("cut", jpeg[: len(jpeg) // 3], text),
        ("bomb", bomb(), text),
        ("absent", None, text),
        ("copy", encoded(evaluation, "JPEG", quality=60), text),
        ("junk", jpeg, "IMG_1234.jpg of the day"),
    ]
    ids, images, texts = zip(*rows, strict=True)
    path = tmp_path / "pairs.parquet"
    pq.write_table(pa.table({"id": ids, "image": pa.array(images, pa.binary()), "alt_text": texts}), path)
    hashes = [["val/1", content_hash(evaluation), difference_hash(evaluation).hex()]]
    storage.write_json(str(tmp_path / "hashes.json"), hashes)
    source = ParquetCandidates(path=str(path))
    config = FilterWebConfig(output="web_pairs/t/v1", overhead="overhead/t/v1", candidates=[source])
    read = ReadCandidates(config, Cluster(root=str(tmp_path)), str(tmp_path / "hashes.json"))
    table = read({"shard": "0", "source": 0, "start": 0, "stop": len(rows)})
    reasons = dict(zip(table["id"].to_pylist(), table["drop_reason"].to_pylist(), strict=True))
    expected = ["empty", "unreadable", "too_many_pixels", "no_image", "evaluation_image", "file_name"]
    assert reasons == dict(zip(ids, [None, *expected], strict=True))


def test_without_a_classifier_pictures_of_every_view_are_kept(tmp_path: Path) -> None:
    """The rules of text and copies still hold, inputs = kept + dropped, and the score is null."""
    pictures = [smooth_picture(seed) for seed in (0, 1, 2)]
    images = [encoded(picture, "JPEG", quality=90) for picture in (*pictures, pictures[0])]
    texts = ["a bridge over a river", "fields in spring", "IMG_1234.jpg", "a bridge over a river"]
    pq.write_table(pa.table({"id": list("abcd"), "image": images, "alt_text": texts}), tmp_path / "pairs.parquet")
    config = FilterWebConfig(
        output="web_pairs/all/v1", candidates=[ParquetCandidates(path=str(tmp_path / "pairs.parquet"))]
    )
    cluster, artifact = Cluster(root=str(tmp_path)), Artifact(str(tmp_path), "web_pairs/all/v1")
    store_evaluation_hashes(config, cluster, artifact)
    counts = run_plain(make_pipeline(config, cluster, artifact), make_shards(config, cluster))
    repeats = drop_repeats(artifact, config.max_text_repeats)
    kept = lance.dataset(artifact.path("web_pairs.lance")).to_table(columns=["id", "overhead_score"]).to_pylist()
    assert kept == [{"id": "a", "overhead_score": None}, {"id": "b", "overhead_score": None}]
    assert [drop.reason for drop in repeats] == ["duplicate"]
    assert counts["inputs"] == 4 == len(kept) + len(repeats) + sum(counts["dropped"].values())


def test_the_split_of_a_row_depends_on_its_id_alone(tmp_path: Path) -> None:
    ids = [f"web-{number}" for number in range(400)]
    picture = encoded(smooth_picture(0), "PNG")
    storage.write_json(str(tmp_path / "hashes.json"), [])

    def splits(order: list[str], step: int, fraction: float) -> dict[str, str]:
        path = tmp_path / f"{len(order)}-{step}-{fraction}.parquet"
        columns = {"id": order, "image": [picture] * len(order), "alt_text": ["a lake and a road"] * len(order)}
        pq.write_table(pa.table(columns), path)
        source = ParquetCandidates(path=str(path))
        changes = {"candidates": [source], "validation_fraction": fraction}
        config = FilterWebConfig.model_validate({"output": "web_pairs/t/v1", "overhead": "overhead/t/v1"} | changes)
        read = ReadCandidates(config, Cluster(root=str(tmp_path)), str(tmp_path / "hashes.json"))
        tables = [read({"source": 0, "start": i, "stop": i + step}) for i in range(0, len(order), step)]
        return {row["id"]: row["split"] for table in tables for row in table.select(["id", "split"]).to_pylist()}

    found = splits(ids, 400, 0.1)
    assert 20 <= sum(split == "val" for split in found.values()) <= 60
    shuffled = ids[::-1][:200]
    assert splits(shuffled, 64, 0.1) == {name: found[name] for name in shuffled}
    more = splits(ids, 400, 0.3)
    assert all(more[name] == "val" for name, split in found.items() if split == "val"), "more hold those of fewer"
    assert set(splits(ids, 400, 0.0).values()) == {"train"}


def test_evaluation_pictures_that_protect_nothing_are_in_the_ledger(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "good.jpg").write_bytes(encoded(smooth_picture(1), "JPEG"))
    (folder / "cut.jpg").write_bytes(encoded(smooth_picture(2), "JPEG")[:200])
    (folder / "empty.png").write_bytes(b"")
    source = PictureFolderCandidates(path=str(folder))
    values = {"overhead": "overhead/t/v1", "candidates": [source], "evaluation_images": [source, source]}
    config = FilterWebConfig.model_validate({"output": "web_pairs/t/v1"} | values)
    artifact = Artifact(str(tmp_path), config.output)
    found = store_evaluation_hashes(config, Cluster(root=str(tmp_path)), artifact)
    assert found == {"inputs": 6, "kept": 2, "dropped": {"empty": 2, "unreadable": 2}}
    rows = read_drops(artifact).to_pylist()
    assert {(row["id"], row["stage"]) for row in rows} == {
        (f"pictures/{name}", "evaluation_images") for name in ("cut.jpg", "empty.png")
    }


def test_pictures_that_a_test_of_the_classifier_lost_are_in_the_ledger(tmp_path: Path) -> None:
    broken = {"above": (b"", "empty"), "other": (b"no picture", "unreadable")}
    pictures = []
    for seed, (name, (data, _)) in enumerate(broken.items()):
        (tmp_path / name).mkdir()
        (tmp_path / name / "good.png").write_bytes(encoded(smooth_picture(seed), "PNG"))
        (tmp_path / name / "bad.png").write_bytes(data)
        source = PictureFolderCandidates(path=str(tmp_path / name))
        pictures.append(LabelledSource(source=source, is_overhead=name == "above"))
    artifact, tests = Artifact(str(tmp_path), "overhead/t/v1"), [OverheadTest(name="held", pictures=pictures)]
    metrics, funnels = score_tests(OverheadNet().eval(), tests, Cluster(root=str(tmp_path)), artifact)
    assert 0 < metrics["held_average_precision"] <= 1
    assert funnels == {"test_held": {"inputs": 4, "kept": 2, "dropped": {"empty": 1, "unreadable": 1}}}
    rows = read_drops(artifact).to_pylist()
    assert {(row["id"], row["stage"], row["reason"]) for row in rows} == {
        (f"{name}/bad.png", "test_held", reason) for name, (_, reason) in broken.items()
    }


def test_near_copies_are_found_and_other_pictures_are_not() -> None:
    index = NearIndex()
    for seed in range(30):
        index.add(str(seed), difference_hash(smooth_picture(seed)))
    picture = Image.open(io.BytesIO(encoded(smooth_picture(7), "JPEG", quality=40))).resize((90, 75))
    assert index.find(difference_hash(np.asarray(picture))) == "7"
    assert index.find(difference_hash(smooth_picture(99))) is None


def test_average_precision_counts_ties_against_the_model() -> None:
    labels = np.array([True, False, True, False])
    assert average_precision(np.array([0.9, 0.2, 0.8, 0.1]), labels) == 1.0
    assert average_precision(np.full(4, 0.5), labels) == pytest.approx((1 / 3 + 2 / 4) / 2)
    assert pick_threshold(np.array([0.9, 0.2, 0.8, 0.85]), labels, 0.6) == 0.2 + 0.6
    with pytest.raises(ConfigError, match=r"min_precision: no threshold reaches 0\.9.*lower it"):
        pick_threshold(np.array([0.1, 0.9]), np.array([True, False]), 0.9)


def test_training_pictures_of_the_real_recipe_are_not_among_its_candidates(data_root: Path) -> None:
    cluster = Cluster(root="unused", data_root=str(data_root))
    training = load_config(TrainOverheadConfig, REPOSITORY / "configs/train_overhead/real.yaml")
    filtering = load_config(FilterWebConfig, REPOSITORY / "configs/filter_web/real.yaml")

    def contents(sources: list) -> set[bytes]:
        found = set()
        for source in sources:
            num = count_candidates(source, cluster.resolve)
            found |= {item.image or b"" for item in read_candidates(source, cluster.resolve, 0, num)}
        return found

    trained_on = contents([item.source for item in training.training])
    candidates = contents(filtering.candidates)
    assert len(trained_on) >= 600 and len(candidates) >= 3700
    assert not trained_on & candidates
