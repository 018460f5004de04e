"""Front door `self_train`: a model teaches itself where things are, from unlabelled chips and the original losses.

Rounds of: an EMA teacher's pseudo-labels (teacher.py) → training with the patch loss + MaMMUT's losses, so nothing
is forgotten → agreement on held-out chips; it stops when that falls. Never reads a mask.
"""

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from pydantic import Field
from rich.progress import track

from rsplatform import storage, tracking
from rsplatform.artifacts import Artifact, open_artifact
from rsplatform.cluster import Cluster
from rsplatform.config import ChipsArtifact, ConfigError, DatasetArtifact, ModelArtifact, StageConfig
from rsplatform.dataset.sampler import GlobalSampler
from rsplatform.dataset.store import SampleStore, open_table
from rsplatform.localize.pseudo_labels import PseudoLabelRule, patch_loss
from rsplatform.localize.run import Sought
from rsplatform.localize.teacher import TeacherLabels, teach
from rsplatform.localize.window import SmoothWindow
from rsplatform.model.draws import sample_keys
from rsplatform.model.embedder import Embedder, driver_device
from rsplatform.model.losses import LossConfig
from rsplatform.model.mammut import Mammut
from rsplatform.model.normalise import normalise
from rsplatform.model.preprocess import ImageError, Square, read_square
from rsplatform.model.weights import save_model
from rsplatform.stage import Stage, finished, open_stage
from rsplatform.train.allocator import keep_freed_memory
from rsplatform.train.batch import Batch
from rsplatform.train.checkpoint import CheckpointFolder
from rsplatform.train.engine import PlainEngine
from rsplatform.train.loader import Loader, LoaderConfig
from rsplatform.train.optimizer import OptimizerConfig
from rsplatform.train.pretrain import EMA, Hooks, LoopConfig, Progress, fit


class SelfTrainConfig(StageConfig):
    """Rounds of self-training. All numbers are our defaults: the published recipe gives none.

    `dataset` feeds the original losses, `chips` the unlabelled pictures (train split only, one in ten held out to
    measure agreement).
    """

    model: ModelArtifact
    dataset: DatasetArtifact
    chips: ChipsArtifact
    classes: list[Sought] = Field(min_length=1)
    background_prompts: list[str] = Field(min_length=1)
    rounds: int = Field(default=3, ge=1)
    steps_per_round: int = Field(default=150, ge=1)
    batch_size: int = Field(default=64, ge=2)
    learning_rate: float = Field(default=1e-4, gt=0)
    patch_loss_weight: float = Field(default=0.5, gt=0)
    ema_decay: float = Field(default=0.99, gt=0, lt=1)
    window: SmoothWindow = 3
    max_chips: int = Field(default=1000, ge=20)
    seed: int = 0


@dataclass(frozen=True)
class Pictures:
    """Unlabelled pictures at the model's size: those that are taught from, and those that measure agreement."""

    train: list[Square]
    held_out: list[Square]


@dataclass(frozen=True)
class Lesson:
    """One round's task: prompts, the pictures and their pseudo-labels."""

    prompts: list[str]
    rule: PseudoLabelRule
    pictures: list[Square]
    labels: TeacherLabels


@dataclass
class Course:
    """What the rounds share and what they leave: the best model so far and its held-out agreement."""

    config: SelfTrainConfig
    store: SampleStore
    pictures: Pictures
    stage: Stage
    teacher: Embedder
    agreement: float
    history: list[dict[str, Any]] = field(default_factory=list)


def self_train(config: SelfTrainConfig, cluster: Cluster) -> Artifact:
    """Let a model teach itself where things are, without a single mask."""
    done = finished(config, cluster)
    if done:
        return done
    keep_freed_memory()
    with open_stage(config, cluster) as stage:
        with storage.local_folder(open_artifact(cluster.root, config.model).path("model")) as folder:
            teacher = Embedder.load(folder, driver_device())
        pictures = chip_pictures(config, cluster, teacher.image_size)
        course = Course(config, SampleStore(cluster.root, config.dataset, "train"), pictures, stage, teacher, 0.0)
        course.agreement = _held_out_agreement(course, teacher)
        stage.log({"held_out_agreement": course.agreement}, 0)
        for number in range(1, config.rounds + 1):
            if not _round(course, number):
                break
        _save(course.teacher, stage.artifact, "model")
        storage.write_json(stage.artifact.path("rounds.json"), course.history)
        kept = sum(entry["kept"] for entry in course.history)
        dropped = {"agreement_fell": len(course.history) - kept} if kept < len(course.history) else {}
        stage.counts = {"inputs": len(course.history), "kept": kept, "dropped": dropped}
    return stage.artifact


def chip_pictures(config: SelfTrainConfig, cluster: Cluster, image_size: int) -> Pictures:
    """Train-split chips at the model's size, evenly thinned to `max_chips`; every tenth measures agreement.

    Raises:
        ConfigError: fewer than 20 chips, or one whose picture cannot be read.
    """
    table = open_table(cluster.root, config.chips)
    rows = np.flatnonzero(np.array(table.to_table(columns=["split"])["split"].to_pylist()) == "train")
    if len(rows) < 20:
        raise ConfigError(f"{config.chips} has {len(rows)} chips in split train; self-training needs at least 20")
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), config.max_chips)).astype(int)]
    chips = table.take(rows.tolist(), columns=["id", "image", "ground_sample_distance_m"])
    distances_m = chips["ground_sample_distance_m"].to_numpy()  # NaN where unknown
    pairs = zip(chips.to_pylist(), distances_m, strict=True)
    squares = [_square(config.chips, chip, float(distance_m), image_size) for chip, distance_m in pairs]
    held_out = squares[::10]
    return Pictures([picture for index, picture in enumerate(squares) if index % 10], held_out)


def _square(chips_ref: str, chip: dict[str, Any], distance_m: float, image_size: int) -> Square:
    try:
        return read_square(chip["image"], image_size, distance_m)
    except ImageError as error:
        raise ConfigError(
            f"{chips_ref}: the picture of chip {chip['id']!r} is {error}; make the chips again under another version"
        ) from error


def _prompts(config: SelfTrainConfig) -> tuple[list[str], tuple[int, ...]]:
    sought = [(index, prompt) for index, item in enumerate(config.classes, 1) for prompt in item.prompts]
    classes = [0] * len(config.background_prompts) + [index for index, _ in sought]
    return [*config.background_prompts, *(prompt for _, prompt in sought)], tuple(classes)


def _lesson(course: Course, teacher: Embedder, pictures: list[Square]) -> Lesson:
    prompts, classes = _prompts(course.config)
    rule = PseudoLabelRule(classes, temperature=1 / float(teacher.model.logit_scale().detach()))
    texts_PE = torch.from_numpy(teacher.embed_texts(prompts))
    return Lesson(prompts, rule, pictures, teach(teacher, pictures, texts_PE, rule, course.config.window))


def _held_out_agreement(course: Course, model: Embedder) -> float:
    return _lesson(course, model, course.pictures.held_out).labels.agreement


def _round(course: Course, number: int) -> bool:
    """One round as a child run; False if held-out agreement fell, and then the model before it stays."""
    config, root = course.config, course.stage.artifact.root
    name, tags = f"round {number}", {"round": str(number), "ref": config.output}
    note = course.stage.artifact.path(f"work/round_{number}_run.json")
    resume = storage.read_json(note)["run_id"] if storage.exists(note) else None
    run = tracking.start_run(root, config.pipeline, name, {"round": number}, tags=tags, resume=resume)
    storage.write_json(note, {"run_id": run.run_id})
    try:
        lesson = _lesson(course, course.teacher, course.pictures.train)
        student = _learn(course, lesson, run, number)
        agreement = _held_out_agreement(course, student)
    except BaseException:
        run.fail()
        raise
    is_kept = agreement >= course.agreement
    entry = {
        "round": number,
        "held_out_agreement_before": course.agreement,
        "held_out_agreement": agreement,
        "labelled_fraction": lesson.labels.labelled_fraction,
        "kept": is_kept,
    }
    course.history.append(entry)
    run.log_metrics({key: float(value) for key, value in entry.items()}, number)
    course.stage.log({"held_out_agreement": agreement, "labelled_fraction": lesson.labels.labelled_fraction}, number)
    run.end("FINISHED")
    if is_kept:
        _save(student, course.stage.artifact, f"rounds/{number}")
        course.teacher, course.agreement = student, agreement
    return is_kept


def _learn(course: Course, lesson: Lesson, run: tracking.Run, number: int) -> Embedder:
    """Train a copy of the teacher on the lesson and the original losses; its moving average is the next teacher."""
    config, teacher = course.config, course.teacher
    student = Mammut(teacher.model.config).to(teacher.device)
    student.load_state_dict(teacher.model.state_dict())
    checkpoints = CheckpointFolder(course.stage.artifact.path(f"checkpoints/round_{number}"))
    averaged: dict[str, torch.Tensor] = {}

    def save(tensors: dict[str, torch.Tensor], progress: Progress) -> None:
        checkpoints.save(tensors, progress)
        averaged.update({key.removeprefix(EMA): value for key, value in tensors.items() if key.startswith(EMA)})

    loader = _loader(course, number)

    def batches(start: int, end: int) -> Generator[Batch]:
        with closing(loader.batches(start, end)) as stream:
            yield from track(stream, f"self-training round {number}", end - start, transient=True)

    loss = LossConfig("sigmoid" if student.config.logit_bias else "softmax")
    # no ramp: the average begins at a good teacher, not at random weights
    loop = LoopConfig(config.steps_per_round, config.seed + number, loss, ema_decay=config.ema_decay, ema_ramps=False)
    engine = PlainEngine(student, OptimizerConfig(weight_decay=0.0))
    hooks = Hooks(run.log_metrics, save, auxiliary_loss=lesson_loss(config, teacher, lesson, number))
    resume = checkpoints.latest()
    if resume and resume[1].step == config.steps_per_round:  # killed between the last step and the round's end
        save(*resume)
    else:
        fit(engine, batches, lambda step: config.learning_rate, loop, hooks, resume)
    student.load_state_dict({**student.state_dict(), **averaged})
    return Embedder(student.eval(), teacher.tokenizer)


def _loader(course: Course, number: int) -> Loader:
    config, vision = course.config, course.teacher.model.config
    sampler = GlobalSampler(len(course.store), config.batch_size, config.seed + number)
    sizes = LoaderConfig(vision.vision.image_size, vision.text.context_length, seed=config.seed + number)
    return Loader(course.store, course.teacher.tokenizer, sampler.batch, sizes)


def lesson_loss(config: SelfTrainConfig, embedder: Embedder, lesson: Lesson, number: int) -> Any:
    """The patch loss of one batch of labelled pictures, weighted; a pure function of (model, step)."""
    vision, temperature = embedder.model.config.vision, lesson.rule.temperature
    seed = config.seed + 1000 + number
    sampler = GlobalSampler(len(lesson.pictures), config.batch_size, seed)
    tokens = embedder.tokenizer.encode(lesson.prompts, embedder.model.config.text.context_length, pad_to_longest=True)
    tokens_PT = torch.from_numpy(tokens).to(embedder.device)

    def loss(model: Mammut, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        rows = sampler.batch(step)
        pictures = [lesson.pictures[row] for row in rows]
        images_BHWC = torch.from_numpy(np.stack([picture.pixels_HWC for picture in pictures])).to(embedder.device)
        distances_m = [picture.ground_sample_distance_m for picture in pictures]
        images_BCHW = normalise(images_BHWC, vision.pixel_mean, vision.pixel_std)
        keys_B = sample_keys(seed, step, torch.arange(len(rows), device=embedder.device))
        values_BHWD = model.patch_features(images_BCHW, images_BCHW.new_tensor(distances_m), keys_B).values_BHWD
        texts_PE = model.encode_text(tokens_PT)
        labels_BHW = lesson.labels.labels_BHW[rows].to(embedder.device)
        value = patch_loss(model.head(values_BHWD), texts_PE, labels_BHW, temperature, lesson.rule.class_of_prompt)
        return config.patch_loss_weight * value, {"patch": value.detach()}

    return loss


def _save(embedder: Embedder, artifact: Artifact, folder: str) -> None:
    with TemporaryDirectory() as temporary:
        save_model(Path(temporary), embedder.model, embedder.tokenizer)
        storage.upload_folder(Path(temporary), artifact.path(folder))
