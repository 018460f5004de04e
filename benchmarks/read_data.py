"""Samples per second of our loader against Ray Data's `iter_batches`, and how long a real training step waits for data.

In: RSICD as its users download it (RSICD_images/ and dataset_rsicd.json). Out: of pictures and captions written as one
dataset artifact, samples/s of both over an epoch, taken in turn in one run, and the median ratio; then the data wait
in per cent of a tiny model's training time at 64 px. Both decode, augment and tokenise with the same functions, and
keep no decoded picture. Ray's part is left out with a word where Ray is missing.
Run: `python benchmarks/read_data.py …/rsicd`
"""

import argparse
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import torch
from rsicd import IMAGE_SIZE, EncodedPicture, Settings, Split, loop_config, make_model

from rsplatform import artifacts
from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster
from rsplatform.dataset.sampler import GlobalSampler
from rsplatform.dataset.store import IMAGE_TABLES, SAMPLES_TABLE, SampleStore
from rsplatform.model.float32_products import use_onednn_products
from rsplatform.model.preprocess import read_square
from rsplatform.model.tokenizer import Tokenizer
from rsplatform.records import SAMPLE_SCHEMA, WEB_PAIR_SCHEMA
from rsplatform.train.augment import Augmentation, augment, draw_caption, pad_tokens, sample_rng
from rsplatform.train.engine import PlainEngine
from rsplatform.train.loader import Loader, LoaderConfig
from rsplatform.train.optimizer import OptimizerConfig
from rsplatform.train.pretrain import Hooks, fit

PAIRS, DATASET, CONTEXT_LENGTH = "web_pairs/rsicd/v1", "dataset/rsicd/v1", 32
AUGMENTATION = Augmentation(symmetries=True, min_crop_area=0.6)


def write_dataset(root: str, split: Split, num_pictures: int) -> None:
    """The split's first pictures as the stages before training leave them: one table of them, one of samples."""
    samples = split.read(range(min(num_pictures, len(split))))
    pairs = [{"id": each.id, "image": each.image, "captions": each.captions, "split": "train"} for each in samples]
    rows = [_sample(each, row) for row, each in enumerate(samples)]
    for ref, table, values, schema in (
        (PAIRS, IMAGE_TABLES["web_pairs"], pairs, WEB_PAIR_SCHEMA),
        (DATASET, SAMPLES_TABLE, rows, SAMPLE_SCHEMA),
    ):
        artifact, recipe = Artifact(root, ref), artifacts.identity({"output": ref}, {})
        artifacts.begin(artifact, recipe)
        lance.write_dataset(pa.Table.from_pylist(values, schema=schema), artifact.path(table))
        artifacts.commit(artifact, recipe, counts={}, metrics={}, run_id="none")


def _sample(picture: EncodedPicture, row: int) -> dict[str, Any]:
    return {
        "id": picture.id,
        "table": PAIRS,
        "row": row,
        "source": "web_pairs",
        "captions": picture.captions,
        "caption_weights": [1.0] * len(picture.captions),
        "split": "train",
        "weight": 1.0,
        "ground_sample_distance_m": float("nan"),
    }


def our_loader(root: str, tokenizer: Tokenizer, batch_size: int, threads: int) -> Loader:
    """The training's own loader, without its cache."""
    store = SampleStore(root, DATASET, "train")
    config = LoaderConfig(IMAGE_SIZE, CONTEXT_LENGTH, augmentation=AUGMENTATION, decode_threads=threads)
    return Loader(store, tokenizer, GlobalSampler(len(store), batch_size, 0).batch, config)


def our_samples(loader: Loader, batch_size: int) -> Iterator[int]:
    """Sizes of the loader's batches of an epoch."""
    for batch in loader.batches(0, len(loader.source) // batch_size):
        yield len(batch.images_BHWC)


def prepared(rows: dict[str, np.ndarray], tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """What the loader does to a batch, for Ray Data's `map_batches`."""
    pictures, captions = [], []
    for position, (image, texts) in enumerate(zip(rows["image"], rows["captions"], strict=True)):
        rng = sample_rng(0, 0, position)
        captions.append(draw_caption(texts, (), rng))
        source_HWC = read_square(image, AUGMENTATION.source_size(IMAGE_SIZE)).pixels_HWC
        pictures.append(augment(source_HWC, IMAGE_SIZE, AUGMENTATION, captions[-1], rng)[0])
    tokens_BT = pad_tokens(captions, tokenizer, CONTEXT_LENGTH).numpy()
    whole_BT = np.zeros((len(tokens_BT), CONTEXT_LENGTH), dtype=np.int64)  # Ray's blocks want one width
    whole_BT[:, : tokens_BT.shape[1]] = tokens_BT
    return {"images": np.stack(pictures), "tokens": whole_BT}


def ray_samples(root: str, tokenizer: Tokenizer, batch_size: int) -> Iterator[int]:
    """Sizes of Ray Data's batches of an epoch: read from Lance, prepared by tasks, shuffled within a buffer."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.read_lance(Artifact(root, PAIRS).path(IMAGE_TABLES["web_pairs"]), columns=["image", "captions"])
    # 64 rows a task, so that the first batch waits for no whole table
    dataset = dataset.repartition(target_num_rows_per_block=64)
    prepare: Any = partial(prepared, tokenizer=tokenizer)
    dataset = dataset.map_batches(prepare, batch_size=64)
    batches = dataset.iter_torch_batches(
        batch_size=batch_size, local_shuffle_buffer_size=4 * batch_size, prefetch_batches=3, drop_last=True
    )
    for batch in batches:
        yield len(batch["images"])


def samples_per_s(sizes: Iterator[int]) -> float:
    """Of a whole epoch with its start: what a reader has made ahead by its first batch would else be a gift to it."""
    started = time.perf_counter()
    total = sum(sizes)
    return total / (time.perf_counter() - started)


def compare(root: str, tokenizer: Tokenizer, arguments: argparse.Namespace) -> None:
    """Both readers in turn, `pairs` times."""
    loader = our_loader(root, tokenizer, arguments.batch_size, arguments.threads)
    if importlib.util.find_spec("ray") is None:
        pace = samples_per_s(our_samples(loader, arguments.batch_size))
        print(f"our loader: {pace:.0f} samples/s; Ray Data is left out, as ray is not installed")
        return
    from rsplatform.runtime import ray_runtime

    ours, theirs = [], []
    with ray_runtime(Cluster(root=root, num_cpus=arguments.threads)):
        for _ in range(arguments.pairs):
            ours.append(samples_per_s(our_samples(loader, arguments.batch_size)))
            theirs.append(samples_per_s(ray_samples(root, tokenizer, arguments.batch_size)))
    print(f"our loader: {statistics.median(ours):.0f} samples/s")
    ratio = statistics.median(own / other for own, other in zip(ours, theirs, strict=True))
    print(f"Ray Data: {statistics.median(theirs):.0f} samples/s; ours is {ratio:.2f} x as fast")


def measure_wait(root: str, tokenizer: Tokenizer, arguments: argparse.Namespace) -> None:
    """The share of a training's time that its steps wait for a batch, after the first report."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = make_model(Settings(batch_size=arguments.batch_size))
    waits: list[dict[str, float]] = []

    def report(metrics: dict[str, float], step: int) -> None:
        waits.append(metrics)

    settings = Settings(samples=arguments.steps * arguments.batch_size, batch_size=arguments.batch_size)
    config = loop_config("joint", 0, settings)
    loader = our_loader(root, tokenizer, arguments.batch_size, threads=arguments.threads)

    hooks = Hooks(report, lambda tensors, progress: None)
    fit(PlainEngine(model, OptimizerConfig()), loader.batches, lambda step: 1e-4, config, hooks)
    later = waits[1:] or waits
    wait = statistics.mean(metrics["data_wait_fraction"] for metrics in later)
    pace = statistics.mean(metrics["samples_per_s"] for metrics in later)
    print(f"training at {pace:.0f} samples/s waits for data {100 * wait:.2f} % of the time (bar: 3 %)")


def main() -> None:
    """Write the dataset, compare the readers, train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(os.environ.get("RSPLATFORM_TEST_DATA", "../shared/data"))
    parser.add_argument("rsicd", type=Path, nargs="?", default=data / "rsicd")
    for name, value in {"threads": 2, "batch_size": 128, "pictures": 4096, "pairs": 3, "steps": 60}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    arguments = parser.parse_args()
    if not (arguments.rsicd / "dataset_rsicd.json").exists():
        print(f"skipped: {arguments.rsicd} holds no dataset_rsicd.json; name the folder of RSICD")
        return
    split = Split(arguments.rsicd, "train")
    tokenizer = Tokenizer.train(split.all_captions(), 2048)
    use_onednn_products()  # as our training processes do
    with tempfile.TemporaryDirectory() as root:
        write_dataset(root, split, arguments.pictures)
        compare(root, tokenizer, arguments)
        measure_wait(root, tokenizer, arguments)


if __name__ == "__main__":
    main()
