"""Front door `self_train`: a model teaches itself where things are, from unlabelled chips and the original losses.

Rounds of: an EMA teacher's pseudo-labels (teacher.py) → training with the patch loss + MaMMUT's losses, so nothing
is forgotten → agreement on held-out chips and, if asked for, recall on held-out samples; it stops when agreement falls
by more than chance explains, or recall by more than a point. Each round is an artifact of its own, which other jobs can
take as their model. Never reads a mask.
"""

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pydantic import Field
from rich.progress import track

from rsplatform import storage
from rsplatform.artifacts import Artifact, open_artifact
from rsplatform.cluster import Cluster
from rsplatform.dataset.sampler import GlobalSampler
from rsplatform.dataset.store import SampleStore
from rsplatform.ledger import counts
from rsplatform.localize.forgetting import MAX_LOSS, held_out_recall
from rsplatform.localize.lesson import Lesson, LessonConfig, chip_pictures, give_lesson, lesson_loss
from rsplatform.model.embedder import Embedder, driver_device
from rsplatform.model.losses import LossConfig
from rsplatform.model.mammut import Mammut
from rsplatform.model.weights import save_model
from rsplatform.stage import Stage, finished, open_stage
from rsplatform.train.allocator import keep_freed_memory
from rsplatform.train.batch import Batch
from rsplatform.train.checkpoint import CheckpointFolder
from rsplatform.train.engine import PlainEngine
from rsplatform.train.loader import Loader, LoaderConfig
from rsplatform.train.pretrain import EMA, Hooks, LoopConfig, Progress, fit

ROUND = "round.json"
CHECKPOINT_EVERY_STEPS = 100


class SelfTrainConfig(LessonConfig):
    """Rounds of self-training; the artifact holds the model of the last round that was kept.

    Round n is `output` with -round{n} behind its version, a finished artifact also where it was rejected.
    """

    rounds: int = Field(default=3, ge=1)


class RoundConfig(LessonConfig):
    """One round: `model` is its teacher, the model of the round before. `first_recall` is the mean recall of the
    course's first teacher, None in the first round and where it is not measured."""

    round: int = Field(ge=1)
    first_recall: float | None = None


def round_ref(output: str, number: int) -> str:
    """The artifact of a course's round."""
    return f"{output}-round{number}"


def self_train(config: SelfTrainConfig, cluster: Cluster) -> Artifact:
    """Let a model teach itself where things are, without a single mask."""
    done = finished(config, cluster)
    if done:
        return done
    with open_stage(config, cluster) as stage:
        model, history = config.model, []
        for number in range(1, config.rounds + 1):
            first_recall = history[0]["mean_recall_before"] if history else None
            taught = _teach_round(_round_config(config, number, model, first_recall), cluster)
            entry: dict[str, Any] = storage.read_json(taught.path(ROUND))
            if number == 1:
                stage.log({"held_out_agreement": entry["held_out_agreement_before"]}, 0)
            history.append(entry)
            shown = ("held_out_agreement", "labelled_fraction", "mean_recall")
            stage.log({key: entry[key] for key in shown if entry[key] is not None}, number)
            if entry["rejected"]:
                break
            model = taught.ref
        with storage.local_folder(open_artifact(cluster.root, model).path("model")) as folder:
            storage.upload_folder(folder, stage.artifact.path("model"))
        storage.write_json(stage.artifact.path("rounds.json"), history)
        reasons = [entry["rejected"] for entry in history if entry["rejected"]]
        stage.counts = counts(len(history), len(history) - len(reasons), reasons)
    return stage.artifact


def _round_config(config: SelfTrainConfig, number: int, model: str, first_recall: float | None) -> RoundConfig:
    shared = config.model_dump(exclude={"rounds", "output", "model"})
    own = {"output": round_ref(config.output, number), "model": model, "round": number, "first_recall": first_recall}
    return RoundConfig.model_validate(shared | own)


def _teach_round(config: RoundConfig, cluster: Cluster) -> Artifact:
    """One round as an artifact and a child run; `rejected` in its round.json says why it is not to be gone on from."""
    done = finished(config, cluster)
    if done:
        return done
    keep_freed_memory()
    with open_stage(config, cluster) as stage:
        with _embedder(cluster.root, config.model) as teacher:
            pictures = chip_pictures(config, cluster.root, teacher.image_size)
            before = give_lesson(config, teacher, pictures.held_out).labels
            recall_before = _recall(config, teacher, cluster.root)
            lesson = give_lesson(config, teacher, pictures.train, pictures.possible_BC)
            student = _learn(config, teacher, lesson, stage)
        after, recall = give_lesson(config, student, pictures.held_out).labels, _recall(config, student, cluster.root)
        first_recall = recall_before if config.first_recall is None else config.first_recall
        entry = {
            "round": config.round,
            "held_out_agreement_before": before.agreement,
            "held_out_agreement": after.agreement,
            "labelled_fraction": lesson.labels.labelled_fraction,
            "mean_recall_before": recall_before,
            "mean_recall": recall,
            "rejected": rejection(before.agreement_B, after.agreement_B, first_recall, recall),
        }
        stage.log({key: float(value) for key, value in entry.items() if isinstance(value, int | float)}, config.round)
        with TemporaryDirectory() as temporary:
            save_model(Path(temporary), student.model, student.tokenizer)
            storage.upload_folder(Path(temporary), stage.artifact.path("model"))
        storage.write_json(stage.artifact.path(ROUND), entry)
        stage.counts = {"inputs": len(pictures.train), "kept": len(pictures.train), "dropped": {}}
    return stage.artifact


def has_fallen(before_B: torch.Tensor, after_B: torch.Tensor) -> bool:
    """Whether the same pictures agree less than before, by more than twice the standard error of the mean difference.

    A hundred chips know their mean to a few points: a smaller fall is as likely chance. Our default.
    """
    differences_B = (after_B - before_B).double()
    error = float(differences_B.std(correction=1)) / len(differences_B) ** 0.5 if len(differences_B) > 1 else 0.0
    return float(differences_B.mean()) < -2 * error


def rejection(
    before_B: torch.Tensor, after_B: torch.Tensor, first_recall: float | None, recall: float | None
) -> str | None:
    """Why a round is not to be gone on from, None if it is."""
    if has_fallen(before_B, after_B):
        return "agreement_fell"
    if recall is not None and first_recall is not None and recall < first_recall - MAX_LOSS:
        return "recall_fell"
    return None


def _recall(config: RoundConfig, embedder: Embedder, root: str) -> float | None:
    split = config.validation_split
    return None if split is None else held_out_recall(embedder, root, config.dataset, split)


@contextmanager
def _embedder(root: str, ref: str) -> Iterator[Embedder]:
    with storage.local_folder(open_artifact(root, ref).path("model")) as folder:
        yield Embedder.load(folder, driver_device())


def _learn(config: RoundConfig, teacher: Embedder, lesson: Lesson, stage: Stage) -> Embedder:
    """Train a copy of the teacher on the lesson and the original losses; its moving average is the next teacher."""
    student = Mammut(teacher.model.config).to(teacher.device)
    student.load_state_dict(teacher.model.state_dict())
    checkpoints = CheckpointFolder(stage.artifact.path("checkpoints"))
    averaged: dict[str, torch.Tensor] = {}

    def save(tensors: dict[str, torch.Tensor], progress: Progress) -> None:
        checkpoints.save(tensors, progress)
        averaged.update({key.removeprefix(EMA): value for key, value in tensors.items() if key.startswith(EMA)})

    loader = _loader(config, teacher, stage.artifact.root)

    def batches(start: int, end: int) -> Generator[Batch]:
        with closing(loader.batches(start, end)) as stream:
            yield from track(stream, f"self-training round {config.round}", end - start, transient=True)

    loss = LossConfig("sigmoid" if student.config.logit_bias else "softmax")
    # no ramp: the average begins at a good teacher, not at random weights
    loop = LoopConfig(
        config.steps_per_round,
        config.seed + config.round,
        loss,
        ema_decay=config.ema_decay,
        ema_ramps=False,
        checkpoint_every_steps=CHECKPOINT_EVERY_STEPS,
    )
    engine = PlainEngine(student, config.optimizer)
    auxiliary_loss = lesson_loss(config, teacher, lesson, config.round)
    hooks = Hooks(stage.run.log_metrics, save, auxiliary_loss=auxiliary_loss)
    resume = checkpoints.latest()
    if resume and resume[1].step == config.steps_per_round:  # killed between the last step and the round's end
        save(*resume)
    else:
        fit(engine, batches, lambda step: config.learning_rate, loop, hooks, resume)
    student.load_state_dict({**student.state_dict(), **averaged})
    return Embedder(student.eval(), teacher.tokenizer)


def _loader(config: RoundConfig, teacher: Embedder, root: str) -> Loader:
    vision, seed = teacher.model.config, config.seed + config.round
    store = SampleStore(root, config.dataset, "train")
    sampler = GlobalSampler(len(store), config.batch_size, seed)
    sizes = LoaderConfig(vision.vision.image_size, vision.text.context_length, seed=seed)
    return Loader(store, teacher.tokenizer, sampler.batch, sizes)
