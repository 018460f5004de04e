"""Front door `train_overhead`: labelled pictures in, the overhead classifier with its threshold out.

A part of the labelled pictures is held out: the threshold is picked on it for a precision of at least 0.9 (RECIPE [D]),
and each named test of pictures never trained on gets its average precision. Whether a picture is real remote sensing
rather than a map is a second output of the recipe that is not built yet.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field

from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster
from rsplatform.config import Config, ConfigError, StageConfig
from rsplatform.curate.contact_sheet import log_contact_sheets
from rsplatform.curate.overhead_model import (
    BASE_SIZE_PX,
    OverheadNet,
    average_precision,
    pick_threshold,
    prepare,
    save_overhead,
    scores,
    train,
)
from rsplatform.curate.picture_hash import content_hash
from rsplatform.ledger import Drop, counts, write_drops
from rsplatform.model.preprocess import ImageError, decode_image, resize_crop
from rsplatform.sources.web import CandidateSource, all_candidates
from rsplatform.stage import finished, open_stage


class LabelledSource(Config):
    """Pictures that are all overhead or all not; `is_overhead: null` takes the source's own label column."""

    source: CandidateSource
    is_overhead: bool | None = None


class OverheadTest(Config):
    """A named test: pictures that take no part in training or in picking the threshold."""

    name: str = Field(pattern=r"^\w+$")
    pictures: list[LabelledSource] = Field(min_length=1)


class TrainOverheadConfig(StageConfig):
    """Labelled pictures, the share held out for the threshold, and the tests. (All numbers are our defaults.)"""

    training: list[LabelledSource] = Field(min_length=1)
    tests: list[OverheadTest] = Field(default_factory=list)
    held_out_fraction: float = Field(default=0.25, gt=0, lt=1)
    min_precision: float = Field(default=0.9, gt=0, le=1)
    epochs: int = Field(default=20, ge=1)
    seed: int = 0


@dataclass(frozen=True)
class LabelledPictures:
    """Decoded pictures: bases for training, crops as the classifier sees them, labels, hashes, and what was dropped."""

    bases_NHWC: np.ndarray
    crops_NHWC: np.ndarray
    labels_N: np.ndarray
    hashes: list[str]
    images: list[bytes]
    drops: list[Drop]

    def counts(self) -> dict[str, Any]:
        """The funnel of these pictures."""
        reasons = [drop.reason for drop in self.drops]
        return counts(len(self.labels_N) + len(reasons), len(self.labels_N), reasons)


def train_overhead(config: TrainOverheadConfig, cluster: Cluster) -> Artifact:
    """Train the classifier that tells pictures from above from all others, on their pixels alone."""
    done = finished(config, cluster)
    if done:
        return done
    with open_stage(config, cluster) as stage:
        pictures = load_labelled(config.training, cluster)
        write_drops(stage.artifact, "train_overhead", "training", pictures.drops)
        is_held_out = _held_out(pictures.labels_N, config)
        fit, held = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
        model, losses = train(pictures.bases_NHWC[fit], pictures.labels_N[fit], epochs=config.epochs, seed=config.seed)
        for epoch, loss in enumerate(losses):
            stage.log({"loss": loss}, step=epoch)
        held_scores = scores(model, list(pictures.crops_NHWC[held]))
        held_labels = pictures.labels_N[held]
        threshold = pick_threshold(held_scores, held_labels, config.min_precision)
        chosen = held_scores >= threshold
        metrics = {
            "threshold": threshold,
            "held_out_average_precision": average_precision(held_scores, held_labels),
            "held_out_precision": float(held_labels[chosen].mean()),
            "held_out_recall": float(chosen[held_labels].mean()),
        }
        precisions, test_counts = score_tests(model, config.tests, cluster, stage.artifact)
        metrics |= precisions
        stage.log(metrics)
        stage.counts = pictures.counts() | test_counts
        description = metrics | {"training_hashes": pictures.hashes}
        save_overhead(model, stage.artifact.uri, description)
        labelled = [(pictures.images[row], f"{score:.2f}") for row, score in zip(held, held_scores, strict=True)]
        log_contact_sheets(
            stage.run,
            [item for item, score in zip(labelled, held_scores, strict=True) if score >= threshold],
            [item for item, score in zip(labelled, held_scores, strict=True) if score < threshold],
        )
    return stage.artifact


def score_tests(
    model: OverheadNet, tests: list[OverheadTest], cluster: Cluster, artifact: Artifact
) -> tuple[dict[str, float], dict[str, Any]]:
    """Average precision of each named test, and the funnel of its pictures; drops go to the ledger under its name."""
    metrics, funnels = {}, {}
    for test in tests:
        part = f"test_{test.name}"
        tested = load_labelled(test.pictures, cluster)
        write_drops(artifact, part, part, tested.drops)
        found = scores(model, list(tested.crops_NHWC))
        metrics[f"{test.name}_average_precision"] = average_precision(found, tested.labels_N)
        funnels[part] = tested.counts()
    return metrics, funnels


def load_labelled(sources: list[LabelledSource], cluster: Cluster) -> LabelledPictures:
    """Decode every picture of some sources; one that cannot be decoded or has no label is a drop."""
    bases, crops, labels, hashes, images, drops = [], [], [], [], [], []
    for item in sources:
        for candidate in all_candidates(item.source, cluster.resolve, "read labelled pictures"):
            label = candidate.label if item.is_overhead is None else item.is_overhead
            try:
                if candidate.problem or candidate.image is None:
                    raise ImageError(candidate.problem or "no_image", "")
                image_HWC = decode_image(candidate.image)
            except ImageError as error:
                drops.append(Drop(candidate.id, error.reason, error.detail))
                continue
            if label is None:
                drops.append(Drop(candidate.id, "no_label", "set is_overhead or the source's label_column"))
                continue
            bases.append(resize_crop(image_HWC, BASE_SIZE_PX))
            crops.append(prepare(image_HWC))
            labels.append(label)
            hashes.append(content_hash(image_HWC))
            images.append(candidate.image)
    labels_N = np.array(labels, dtype=bool)
    if labels_N.all() or not labels_N.any():
        raise ConfigError(f"{len(labels)} pictures of one class only; give overhead pictures and others")
    return LabelledPictures(np.stack(bases), np.stack(crops), labels_N, hashes, images, drops)


def _held_out(labels_N: np.ndarray, config: TrainOverheadConfig) -> np.ndarray:
    """bool (N,): the same share of each class, by the recipe's seed."""
    generator = np.random.default_rng(config.seed)
    is_held_out = np.zeros(len(labels_N), dtype=bool)
    for label in (False, True):
        rows = generator.permutation(np.flatnonzero(labels_N == label))
        is_held_out[rows[: max(1, round(len(rows) * config.held_out_fraction))]] = True
    return is_held_out
