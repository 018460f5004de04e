"""One round's task of self-training: the pictures, the prompts, the teacher's labels, and the loss that learns them.

In: a chips table, the captions of a dataset, a teacher. Out: labelled pictures and a loss of (model, step). It opens
these two tables and nothing else.
Shapes: B pictures, C classes (background first), H W pixels or patches, D width, E embedding, P prompts, T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import Field

from rsplatform.config import ChipsArtifact, ConfigError, DatasetArtifact, ModelArtifact, StageConfig, Text
from rsplatform.dataset.holdout import Holdout
from rsplatform.dataset.sampler import GlobalSampler
from rsplatform.dataset.store import SAMPLES_TABLE, open_table
from rsplatform.localize.pseudo_labels import PseudoLabelRule, class_weights, map_loss
from rsplatform.localize.run import Sought
from rsplatform.localize.smooth_attention import smooth_attention
from rsplatform.localize.teacher import TeacherLabels, teach
from rsplatform.localize.window import SmoothWindow
from rsplatform.model.draws import sample_keys
from rsplatform.model.embedder import Embedder
from rsplatform.model.mammut import Mammut
from rsplatform.model.normalise import normalise
from rsplatform.model.preprocess import ImageError, Square, read_square
from rsplatform.train.augment import sample_rng, square_symmetry
from rsplatform.train.optimizer import OptimizerConfig
from rsplatform.train.step import AuxiliaryLoss

MIN_CHIPS = 20
HELD_OUT_EVERY = 10
NO_DECAY = OptimizerConfig(weight_decay=0.0)


class LessonConfig(StageConfig):
    """What the rounds of a course share. All numbers are our defaults: the published recipe gives none.

    `validation_split` is that of `dataset` whose mean recall a round may not lower by more than a point below the first
    teacher's; None: recall is not measured. `dataset` feeds the original losses, `chips` the unlabelled pictures (train
    split only, one in ten held out to measure agreement). `captions_rule_out`: a class that none of a chip's captions
    in `dataset` names is not in it. Say so only of captions that list all that is seen, as templates over complete
    landmarks do. A class that no caption of these chips names is novel, and never ruled out, whatever the dataset's
    other pictures are called.
    """

    model: ModelArtifact
    dataset: DatasetArtifact
    validation_split: str | None = None
    chips: ChipsArtifact
    classes: list[Sought] = Field(min_length=1)
    background_prompts: list[Text] = Field(min_length=1)
    captions_rule_out: bool = False
    steps_per_round: int = Field(default=150, ge=1)
    batch_size: int = Field(default=64, ge=2)
    learning_rate: float = Field(default=1e-4, gt=0)
    optimizer: OptimizerConfig = NO_DECAY
    patch_loss_weight: float = Field(default=0.5, gt=0)
    ema_decay: float = Field(default=0.99, gt=0, lt=1)
    window: SmoothWindow = 3
    max_chips: int = Field(default=1000, ge=MIN_CHIPS)
    seed: int = 0

    @property
    def prompts(self) -> list[str]:
        """The background's prompts, then those of the classes."""
        return [*self.background_prompts, *(prompt for item in self.classes for prompt in item.prompts)]

    @property
    def class_of_prompt(self) -> tuple[int, ...]:
        """0 for the background, then the classes from 1."""
        classes = [index for index, item in enumerate(self.classes, 1) for _ in item.prompts]
        return (*([0] * len(self.background_prompts)), *classes)


@dataclass(frozen=True)
class Pictures:
    """Unlabelled pictures at the model's size: those that are taught from, and those that measure agreement.

    `possible_BC`: which classes each picture of `train` can show; None: nothing is known.
    """

    train: list[Square]
    held_out: list[Square]
    possible_BC: torch.Tensor | None = None


@dataclass(frozen=True)
class Lesson:
    """One round's task: prompts, the pictures and their pseudo-labels."""

    prompts: list[str]
    rule: PseudoLabelRule
    pictures: list[Square]
    labels: TeacherLabels


def chip_pictures(config: LessonConfig, root: str, image_size: int) -> Pictures:
    """Train-split chips at the model's size, evenly thinned to `max_chips`; every tenth measures agreement.

    Raises:
        ConfigError: fewer than 20 chips, or one whose picture cannot be read.
    """
    table = open_table(root, config.chips)
    rows = np.flatnonzero(np.array(table.to_table(columns=["split"])["split"].to_pylist()) == "train")
    if len(rows) < MIN_CHIPS:
        raise ConfigError(f"{config.chips} has {len(rows)} chips in split train; self-training needs at least 20")
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), config.max_chips)).astype(int)]
    chips = table.take(rows.tolist(), columns=["id", "image", "ground_sample_distance_m"])
    distances_m = chips["ground_sample_distance_m"].to_numpy()  # NaN where unknown
    pairs = zip(chips.to_pylist(), distances_m, strict=True)
    squares = [_square(config.chips, chip, float(distance_m), image_size) for chip, distance_m in pairs]
    is_train = [index for index in range(len(squares)) if index % HELD_OUT_EVERY]
    possible_BC = None
    if config.captions_rule_out:
        ids = chips["id"].to_pylist()
        possible_BC = possible_classes(config.classes, captions_by_id(root, config), [ids[index] for index in is_train])
    return Pictures([squares[index] for index in is_train], squares[::HELD_OUT_EVERY], possible_BC)


def _square(chips_ref: str, chip: dict[str, Any], distance_m: float, image_size: int) -> Square:
    try:
        return read_square(chip["image"], image_size, distance_m)
    except ImageError as error:
        raise ConfigError(
            f"{chips_ref}: the picture of chip {chip['id']!r} is {error}; make the chips again under another version"
        ) from error


def captions_by_id(root: str, config: LessonConfig) -> dict[str, list[str]]:
    """The captions of the dataset's samples that are chips of `chips`, whichever of these the lesson takes."""
    rows = open_table(root, config.dataset, SAMPLES_TABLE).to_table(columns=["id", "captions", "table"]).to_pylist()
    return {row["id"]: row["captions"] for row in rows if row["table"] == config.chips}


def possible_classes(
    classes: Sequence[Sought], captions: Mapping[str, Sequence[str]], ids: Sequence[str]
) -> torch.Tensor:
    """possible_BC (bool): all classes in a picture without captions, else those that its captions name.

    A caption names a class by the words of its name, singular or plural (holdout.py). A class that no caption at all
    names is novel: silence says nothing of it.
    """
    columns = [torch.ones(len(ids), dtype=torch.bool)]
    for item in classes:
        words = Holdout([item.name])
        is_known = any(words.reason((), texts) for texts in captions.values())
        shown = [not is_known or i not in captions or words.reason((), captions[i]) is not None for i in ids]
        columns.append(torch.tensor(shown, dtype=torch.bool))
    return torch.stack(columns, dim=1)


def give_lesson(
    config: LessonConfig, teacher: Embedder, pictures: list[Square], possible_BC: torch.Tensor | None = None
) -> Lesson:
    """The teacher's labels of pictures."""
    rule = PseudoLabelRule(config.class_of_prompt, temperature=1 / float(teacher.model.logit_scale().detach()))
    texts_PE = torch.from_numpy(teacher.embed_texts(config.prompts))
    labels = teach(teacher, pictures, texts_PE, rule, config.window, possible_BC)
    return Lesson(config.prompts, rule, pictures, labels)


def lesson_loss(config: LessonConfig, embedder: Embedder, lesson: Lesson, number: int) -> AuxiliaryLoss:
    """The patch loss of one batch of labelled pictures, weighted; a pure function of (model, step).

    Each picture comes in one of the 8 symmetries of the square, its labels with it. Taught is every patch by itself
    and smooth attention's map alike, so that what is found with and without smoothing comes to agree.
    """
    vision, temperature = embedder.model.config.vision, lesson.rule.temperature
    seed = config.seed + 1000 + number
    sampler = GlobalSampler(len(lesson.pictures), config.batch_size, seed)
    tokens = embedder.tokenizer.encode(lesson.prompts, embedder.model.config.text.context_length, pad_to_longest=True)
    tokens_PT = torch.from_numpy(tokens).to(embedder.device)
    weights_C = class_weights(lesson.labels.labels_BHW, max(lesson.rule.class_of_prompt) + 1).to(embedder.device)

    def loss(model: Mammut, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        images_BHWC, labels_BHW, distances_m = turned_batch(lesson, sampler.batch(step), (seed, step))
        images_BCHW = normalise(images_BHWC.to(embedder.device), vision.pixel_mean, vision.pixel_std)
        keys_B = sample_keys(seed, step, torch.arange(len(labels_BHW), device=embedder.device))
        features = model.patch_features(images_BCHW, images_BCHW.new_tensor(distances_m), keys_B)
        texts_PE = model.encode_text(tokens_PT)
        maps_BPHW = smooth_attention(
            features.values_BHWD, texts_PE, head=model.head, scores_BHW=features.scores_BKHW, window=config.window
        )
        raw_BPHW = (model.head(features.values_BHWD) @ texts_PE.T).movedim(-1, 1)
        labels_BHW, classes = labels_BHW.to(embedder.device), lesson.rule.class_of_prompt
        raw, smooth = (map_loss(maps, labels_BHW, classes, temperature, weights_C) for maps in (raw_BPHW, maps_BPHW))
        parts = {"patch": raw.detach(), "patch_smooth": smooth.detach()}
        return config.patch_loss_weight * (raw + smooth) / 2, parts

    return loss


def turned_batch(
    lesson: Lesson, rows: np.ndarray, seeds: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """uint8 images_BHWC, labels_BHW and distances of some pictures, each turned or mirrored at random."""
    turns = [int(sample_rng(*seeds, position).integers(8)) for position in range(len(rows))]
    chosen = list(zip(rows.tolist(), turns, strict=True))
    images = [square_symmetry(lesson.pictures[row].pixels_HWC, turn) for row, turn in chosen]
    labels = [square_symmetry(lesson.labels.labels_BHW[row].numpy(), turn) for row, turn in chosen]
    distances_m = [lesson.pictures[row].ground_sample_distance_m for row in rows]
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels)), distances_m
