"""Text→image retrieval on RSICD val after a small budget of training from scratch on RSICD train, over seeds.

In: RSICD as its users download it (RSICD_images/ and dataset_rsicd.json). Out: one JSON a run, and a table: recall
both ways with all captions of the val split, ties counted against, mean and spread over the seeds. The variants
ask MaMMUT's question (arXiv 2303.16839): joint, contrastive only, captioning only, at equal steps. A run that was
stopped goes on from its checkpoint; a finished one is not repeated, and one of other settings is refused.
Needs torch, Pillow and simplejpeg; no Ray.
Run: `python benchmarks/rsicd.py …/rsicd --out results --seeds 0 1 2 --variants joint contrastive generative`
"""

import argparse
import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from rsplatform.dataset.sampler import GlobalSampler
from rsplatform.model.embedder import Embedder
from rsplatform.model.float32_products import use_onednn_products
from rsplatform.model.losses import LossConfig
from rsplatform.model.mammut import Mammut, mammut_config
from rsplatform.model.recall import chance_recall, recall_at_k
from rsplatform.model.tokenizer import Tokenizer
from rsplatform.train.allocator import keep_freed_memory
from rsplatform.train.augment import Augmentation
from rsplatform.train.checkpoint import CheckpointFolder
from rsplatform.train.engine import PlainEngine
from rsplatform.train.loader import Loader, LoaderConfig
from rsplatform.train.optimizer import OptimizerConfig, Schedule
from rsplatform.train.pretrain import Hooks, LoopConfig, fit

WEIGHTS = {"joint": (1.0, 1.0), "contrastive": (1.0, 0.0), "generative": (0.0, 1.0)}
IMAGE_SIZE = 64


@dataclass(frozen=True)
class Settings:
    """The run's numbers, all our defaults; `samples` and `minutes` bound it, whichever comes first."""

    samples: int = 86_000
    minutes: float = 15.0
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup_steps: int = 60
    weight_decay: float = 0.2
    optimizer: Literal["adamw", "muon"] = "muon"
    muon_rate_factor: float = 4.0
    min_crop_area: float = 0.6
    patch_dropout: float = 0.5
    vocab_size: int = 2048
    pooling: str = "map"
    precision: Literal["float32", "bfloat16"] = "float32"
    caption_weight: float = 1.0
    size: str = "tiny"


@dataclass(frozen=True)
class EncodedPicture:
    """A picture's bytes, name and captions, repeats included; RSICD does not say how many metres a pixel covers."""

    id: str
    image: bytes
    captions: list[str]
    caption_weights: tuple[float, ...] = ()
    ground_sample_distance_m: float = math.nan


class Split:
    """One split of RSICD in memory: the loader's source of samples."""

    def __init__(self, folder: Path, split: str) -> None:
        entries = json.loads((folder / "dataset_rsicd.json").read_text())["images"]
        chosen = [entry for entry in entries if entry["split"] == split]
        self.ids = [entry["filename"] for entry in chosen]
        self._captions = [[sentence["raw"].strip() for sentence in entry["sentences"]] for entry in chosen]
        self._images = [(folder / "RSICD_images" / name).read_bytes() for name in self.ids]

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, indices: Sequence[int]) -> list[EncodedPicture]:
        """Encoded pictures by index."""
        return [EncodedPicture(self.ids[i], self._images[i], self._captions[i]) for i in indices]

    def all_captions(self) -> list[str]:
        """Every caption of the split."""
        return [caption for captions in self._captions for caption in captions]


def make_model(settings: Settings) -> Mammut:
    """A MaMMUT for pictures of IMAGE_SIZE with new weights."""
    return Mammut(
        mammut_config(
            settings.size,
            vision_pooling=settings.pooling,
            image_size=IMAGE_SIZE,
            patch_size=8,
            vocab_size=settings.vocab_size,
            patch_dropout=settings.patch_dropout,
        )
    )


def make_loader(split: Split, tokenizer: Tokenizer, context_length: int, seed: int, settings: Settings) -> Loader:
    """Batches of the split in the seed's order, cropped and turned at random."""
    augmentation = Augmentation(symmetries=True, min_crop_area=settings.min_crop_area)
    config = LoaderConfig(
        IMAGE_SIZE, context_length, seed=seed, augmentation=augmentation, cache_gb=1.0, decode_threads=1
    )
    return Loader(split, tokenizer, GlobalSampler(len(split.ids), settings.batch_size, seed).batch, config)


def loop_config(variant: str, seed: int, settings: Settings) -> LoopConfig:
    """How long to train, and on which losses."""
    contrastive_weight, caption_weight = WEIGHTS[variant]
    return LoopConfig(
        settings.samples // settings.batch_size,
        seed,
        LossConfig(contrastive_weight=contrastive_weight, caption_weight=caption_weight * settings.caption_weight),
        settings.precision,
        max_minutes=settings.minutes,
        checkpoint_every_minutes=2.0,
        report_every_steps=20,
    )


class Place(NamedTuple):
    """Where a run's checkpoints lie, and what it computes on; no part of its settings."""

    folder: Path
    device: str


def train(split: Split, tokenizer: Tokenizer, variant: str, seed: int, settings: Settings, place: Place) -> Embedder:
    """One model from scratch, or on from its newest checkpoint below the place's folder."""
    torch.manual_seed(seed)
    model = make_model(settings).to(place.device)  # made on the CPU: the same first weights everywhere
    loader = make_loader(split, tokenizer, model.config.text.context_length, seed, settings)
    loop, schedule = loop_config(variant, seed, settings), Schedule(settings.learning_rate, settings.warmup_steps)
    checkpoints = CheckpointFolder(str(place.folder))

    def report(metrics: dict[str, float], step: int) -> None:
        shown = ", ".join(f"{name} {metrics[name]:.3f}" for name in ("contrastive", "caption", "samples_per_s"))
        print(f"{variant} {seed}: step {step}/{loop.num_steps}  {shown}", flush=True)

    optimizer = OptimizerConfig(settings.optimizer, settings.muon_rate_factor, weight_decay=settings.weight_decay)
    progress = fit(
        PlainEngine(model, optimizer),
        loader.batches,
        lambda step: schedule.at(step, loop.num_steps),
        loop,
        Hooks(report, checkpoints.save),
        checkpoints.latest(),
    )
    samples, minutes = progress.step * settings.batch_size, progress.elapsed_s / 60
    print(f"{variant} {seed}: {samples:,} samples in {minutes:.1f} min {progress.stopped}")
    return Embedder(model.eval(), tokenizer)


def evaluate(embedder: Embedder, split: Split) -> dict[str, float]:
    """Recall in per cent both ways, every caption a query; ties count against."""
    images_IE = embedder.embed_images([picture.image for picture in split.read(range(len(split.ids)))])
    owners = [index for index in range(len(split.ids)) for _ in split.read([index])[0].captions]
    return recall_at_k(images_IE, embedder.embed_texts(split.all_captions()), owners)


def begin(path: Path, settings: Settings) -> dict[str, float] | None:
    """The recall that a run of these settings has left in its JSON; None, with the settings noted, if it has none.

    Raises:
        SystemExit: the run was begun with other settings; it names them.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"settings": asdict(settings)}))
    known, asked = json.loads(path.read_text()), asdict(settings)
    stored = known["settings"]
    names = sorted(name for name in stored.keys() | asked if stored.get(name) != asked.get(name))
    if names:
        found = ", ".join(f"{name} {stored.get(name)} (asked: {asked.get(name)})" for name in names)
        raise SystemExit(f"{path} is of a run with other settings: {found}; ask for those, or name a new --out")
    return known.get("recall")


def main() -> None:
    """Parse, run what is not finished, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(os.environ.get("RSPLATFORM_TEST_DATA", "../shared/data"))
    parser.add_argument("rsicd", type=Path, nargs="?", default=data / "rsicd")
    parser.add_argument("--out", type=Path, default=Path("artifacts/benchmarks/rsicd"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variants", nargs="+", default=["joint"], choices=list(WEIGHTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = parser.parse_args()
    if not (arguments.rsicd / "dataset_rsicd.json").exists():
        print(f"skipped: {arguments.rsicd} holds no dataset_rsicd.json; name the folder of RSICD")
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; leave --device out to train on the CPU")
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    if arguments.device == "cpu":
        use_onednn_products()
    settings = replace(Settings(), **{name: getattr(arguments, name) for name in asdict(Settings())})
    train_split, val_split = Split(arguments.rsicd, "train"), Split(arguments.rsicd, "val")
    tokenizer = Tokenizer.train(train_split.all_captions(), settings.vocab_size)
    for variant in arguments.variants:
        recalls = []
        for seed in arguments.seeds:
            path = arguments.out / f"{variant}_{seed}.json"
            recall = begin(path, settings)
            if recall is None:
                place = Place(path.with_suffix(""), arguments.device)
                embedder = train(train_split, tokenizer, variant, seed, settings, place)
                recall = evaluate(embedder, val_split)
                path.write_text(json.dumps({"settings": asdict(settings), "recall": recall}))
            recalls.append(recall)
        print_table(variant, recalls, chance_recall(len(val_split.ids), len(val_split.all_captions())))


def print_table(variant: str, recalls: list[dict[str, float]], chance: dict[str, float]) -> None:
    """Mean and spread (largest minus smallest) of every recall over the seeds, in per cent, beside chance."""
    print(f"{variant}, {len(recalls)} seeds")
    for name in recalls[0]:
        values = [recall[name] for recall in recalls]
        mean, spread = statistics.mean(values), max(values) - min(values)
        times = f"  {mean / chance[name]:5.1f} × chance" if name in chance else ""
        print(f"  {name:12} {mean:6.2f} ± {spread / 2:.2f}{times}")


if __name__ == "__main__":
    main()
