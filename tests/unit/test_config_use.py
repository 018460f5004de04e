"""No dead flags: a shipped file sets each setting of pretraining and its placement to something else than its default.

The settings are found by walking the config classes, so that a new one is asked for its recipe as well.
"""

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from rsplatform.cluster import TrainPlacement, load_cluster
from rsplatform.config import load_config
from rsplatform.dataset.build import BuildDatasetConfig
from rsplatform.model.mammut import MammutConfig, mammut_config
from rsplatform.model.openmammut_config import config_of_layout
from rsplatform.train.import_model import ImportModelConfig
from rsplatform.train.recipe import ModelRecipe, PretrainConfig
from rsplatform.train.sweep import TuneConfig

REPOSITORY = Path(__file__).resolve().parents[2]

# Whose default is the only sensible choice of a recipe, and why it may be set all the same.
ALLOWED = {
    "PretrainConfig.split": "recipes train on train; another split is for experiments on the command line",
    "PretrainConfig.micro_batch_size": "a card takes what it holds by itself; a number is for cards without a name",
    "PretrainConfig.seed": "a recipe needs one seed; another is for measuring the spread over seeds",
    "LossConfig.contrastive_weight": "the ratio is set by caption_weight; 0 is for the generative-only ablation",
    "LossConfig.focal_gamma": "mt_webli.yaml states the only published value",
    "LossConfig.focal_alpha": "mt_webli.yaml states the only published value",
    "OptimizerConfig.betas": "those of the published run",
    "OptimizerConfig.eps": "AdamW's own; larger ones are for comparing engines in float32",
    "OptimizerConfig.weight_decay": "that of the published run; self-training sets 0 for its student",
    "OptimizerConfig.gradient_clip": "that of the published run",
    "OptimizerConfig.muon_rate_factor": "one number served every recipe that was tried; a dial for data of one's own",
    "VisionConfig.cropped_position_grid": "the paper's",
    "TextConfig.cross_attention_every": "what all published weights have; others come in by import_model",
    "TrainPlacement.launcher": "local is for debugging, on the command line: cluster.train.launcher=local",
    "TrainPlacement.zero_stage": "1 shards what costs most; 2 and 3 are for models that no card holds, 0 for comparing",
    "TrainPlacement.grow_every_minutes": "nothing to tune before it is measured",
    "TrainPlacement.max_preemptions": "any number of announced losses is fine; a limit is for budgets of one's own",
    "TrainPlacement.gpu_memory_gb": "for cards that are not in the table of known ones",
    "TrainPlacement.peak_tflops": "for cards that are not in the table of known ones, or measured",
    "GuardConfig.max_undecodable_fraction": "pictures are checked before; a limit of one's own is for bad disks",
    "WebSource.captions": "those of a captioner of one's own: the shipped jobs write captions for chips alone",
    "WebSource.own_caption_weight": "matters beside WebSource.captions",
    "WebSource.holdout": "the field of ChipSource: a class may be kept out of the web pairs alone as well",
    "WebSource.weight": "the ratio is set by the chips' weight",
    "Phase.continues": "what a sweep writes into its best recipe",
    "Phase.loss_weights": "what a sweep writes into its best recipe",
}


# Values of a setting with a few of them (Class.field=value) that no recipe takes, and why they are there all the same.
ALLOWED_CHOICES = {
    "KeepBest.mode=min": "for held-out losses; the recipes keep what recalls best",
    "ModelRecipe.size=small": "between tiny and the paper's, for data of one's own",
    **{f"ModelRecipe.size=openmammut_{size}": "its published weights come in by import_model" for size in "SBMLH"},
    "TrainPlacement.engine=deepspeed": "has no Muon, which the small recipes name; gpu.yaml says when it is worth it",
    "TrainPlacement.launcher=local": "for debugging, on the command line: cluster.train.launcher=local",
    **{f"TrainPlacement.zero_stage={stage}": "matters beside engine=deepspeed" for stage in range(4)},
}


def used_choices(config: Any) -> Iterator[str]:
    """Class.field=value of every setting below `config` that is one of a few words, defaults included."""
    if isinstance(config, BaseModel) or dataclasses.is_dataclass(config):
        for name, hint in typing.get_type_hints(type(config)).items():
            value = getattr(config, name)
            if isinstance(value, str) and len(words_of(hint)) > 1:
                yield f"{type(config).__name__}.{name}={value}"
            yield from used_choices(value)
        if isinstance(config, ModelRecipe):
            yield from used_choices(config.mammut_config())
    elif isinstance(config, Mapping | list | tuple):
        for item in config.values() if isinstance(config, Mapping) else config:
            yield from used_choices(item)


def words_of(hint: Any) -> set[str]:
    """The words of a Literal, also inside of an optional one."""
    words = set(typing.get_args(hint)) if typing.get_origin(hint) is typing.Literal else set()
    return words.union(*(words_of(part) for part in typing.get_args(hint) if not isinstance(part, str)))


def all_choices(config_class: type) -> Iterator[str]:
    """Class.field=value of every word that a setting of this class, and of those that it holds, may be."""
    for name, hint in typing.get_type_hints(config_class).items():
        words = words_of(hint)
        if len(words) > 1:
            yield from (f"{config_class.__name__}.{name}={word}" for word in words)
        for part in classes_in(hint):
            yield from all_choices(part)


def used_fields(config: Any) -> Iterator[str]:
    """Class.field of every setting below `config` that is not its default, or has none."""
    if isinstance(config, BaseModel):
        fields = {
            name: field.get_default(call_default_factory=True) for name, field in type(config).model_fields.items()
        }
    elif dataclasses.is_dataclass(config):
        fields = {field.name: default_of(field) for field in dataclasses.fields(config)}
    else:
        items = config.values() if isinstance(config, Mapping) else config if isinstance(config, list | tuple) else ()
        for item in items:
            yield from used_fields(item)
        return
    for name, default in fields.items():
        value = getattr(config, name)
        if value != default:
            yield f"{type(config).__name__}.{name}"
        yield from used_fields(value)
    if isinstance(config, ModelRecipe):
        yield from used_fields(config.mammut_config())


def default_of(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def all_fields(config_class: type) -> Iterator[str]:
    """Class.field of every setting that has a default, of this class and those that it holds."""
    hints = typing.get_type_hints(config_class)
    if issubclass(config_class, BaseModel):
        optional = {name for name, field in config_class.model_fields.items() if not field.is_required()}
        names = set(config_class.model_fields)
    else:
        found = dataclasses.fields(config_class)
        missing = dataclasses.MISSING
        optional = {field.name for field in found if default_of(field) is not missing}
        names = {field.name for field in found}
    kinds = {name for name in optional if typing.get_origin(hints[name]) is typing.Literal
             and len(typing.get_args(hints[name])) == 1}  # fmt: skip
    yield from (f"{config_class.__name__}.{name}" for name in optional - kinds)
    for name in names:
        for part in classes_in(hints[name]):
            yield from all_fields(part)


def classes_in(hint: Any) -> Iterator[type]:
    is_class = isinstance(hint, type) and not isinstance(hint, types.GenericAlias)
    if is_class and (issubclass(hint, BaseModel) or dataclasses.is_dataclass(hint)):
        yield hint
    for argument in typing.get_args(hint):
        yield from classes_in(argument)


@pytest.fixture(scope="module")
def shipped() -> list[Any]:
    """The recipes and placements of the shipped files."""
    recipes = [load_config(PretrainConfig, path) for path in REPOSITORY.glob("configs/pretrain/*.yaml")]
    recipes += [load_config(TuneConfig, path).recipe for path in REPOSITORY.glob("configs/tune/*.yaml")]
    datasets = [load_config(BuildDatasetConfig, path) for path in REPOSITORY.glob("configs/build_dataset/*.yaml")]
    imports = [load_config(ImportModelConfig, path) for path in REPOSITORY.glob("configs/import_model/*.yaml")]
    layouts = [config_of_layout(found.architecture, "recipe") for found in imports if found.architecture]
    placements = [
        load_cluster(path).train for path in REPOSITORY.glob("cluster/*.yaml") if "metadata" in path.read_text()
    ]
    return [*recipes, *datasets, *layouts, *placements]


@pytest.fixture(scope="module")
def used(shipped: list[Any]) -> set[str]:
    """What the shipped recipes and cluster files set."""
    return {name for config in shipped for name in used_fields(config)}


CONFIG_CLASSES = [PretrainConfig, MammutConfig, TrainPlacement, BuildDatasetConfig]


@pytest.mark.parametrize("config_class", CONFIG_CLASSES)
def test_each_setting_is_used_by_a_shipped_file(config_class: type, used: set[str]) -> None:
    unused = set(all_fields(config_class)) - used - ALLOWED.keys()
    assert not unused, f"set by no recipe and no cluster file, so delete it, use it or say why: {sorted(unused)}"


@pytest.mark.parametrize("config_class", CONFIG_CLASSES)
def test_each_choice_is_taken_by_a_shipped_file(config_class: type, shipped: list[Any]) -> None:
    taken = {choice for config in shipped for choice in used_choices(config)}
    unused = set(all_choices(config_class)) - taken - ALLOWED_CHOICES.keys()
    assert not unused, f"taken by no recipe and no cluster file, so delete it, use it or say why: {sorted(unused)}"
    assert not ALLOWED_CHOICES.keys() & taken


def test_what_is_used_needs_no_excuse(used: set[str]) -> None:
    later = {"Phase.continues", "Phase.loss_weights", "TrainPlacement.peak_tflops"}
    assert not (ALLOWED.keys() & used) - later


def test_the_walk_finds_what_is_nested_and_what_is_not_used() -> None:
    names = set(all_fields(PretrainConfig)) | set(all_fields(MammutConfig))
    assert {"LossConfig.z_loss_weight", "Schedule.decay", "GuardConfig.window_steps", "KeepBest.export"} <= names
    assert {"VisionConfig.pooling", "TextConfig.pooling", "ModelRecipe.settings", "Phase.freeze"} <= names
    plain = set(used_fields(mammut_config("mini")))
    assert "VisionConfig.pooling" not in plain
    assert "VisionConfig.pooling" in set(used_fields(ModelRecipe(settings={"vision_pooling": "map"})))
