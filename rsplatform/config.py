"""Typed recipes: a YAML file plus `key.path=value` overrides in, a frozen pydantic model out.

A recipe says WHAT is done; WHERE it runs is the cluster file (cluster.py). Unknown keys are errors that
name the key and the nearest valid one. Nothing here touches data.
"""

import difflib
import os
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar, runtime_checkable

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints, ValidationError


class ConfigError(ValueError):
    """A recipe or cluster file that cannot be used; the message names file, field and remedy."""


class Config(BaseModel):
    """Base of every recipe section: frozen, unknown keys refused, NaN and infinity refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


@dataclass(frozen=True)
class InputMarker:
    """Marks a recipe field as an input, so that `--dry-run` and lineage find it by its type."""

    is_artifact: bool


def of_kind(*kinds: str) -> AfterValidator:
    """A check that an artifact is of one of these kinds, the first part of its ref: what else would have its files?"""

    def check(ref: str) -> str:
        if ref.partition("/")[0] not in kinds:
            raise ValueError(f"needs an artifact of kind {' or '.join(kinds)}, such as {kinds[0]}/NAME/v1")
        return ref

    return AfterValidator(check)


@dataclass(frozen=True)
class TemplateMarker:
    """Marks a section that is another job's recipe, but is not run as it stands: copies of it are (a sweep's trials).

    Its inputs are those of the job that holds it, and its `output` is made by nobody.
    """


def _says_something(text: str) -> str:
    if not text.strip():
        raise ValueError("an empty text asks for nothing; write one such as 'an aerial image of a harbour'")
    return text


# What a model is asked for in words.
Text = Annotated[str, AfterValidator(_says_something)]
# "kind/name/version": the address of an artifact that a person chose.
ArtifactRef = Annotated[str, StringConstraints(pattern=r"^[a-z_]+/[\w.-]+/[\w.-]+$")]
InputArtifact = Annotated[ArtifactRef, InputMarker(is_artifact=True)]
ModelArtifact = Annotated[InputArtifact, of_kind("model", "export")]
DatasetArtifact = Annotated[InputArtifact, of_kind("dataset")]
ChipsArtifact = Annotated[InputArtifact, of_kind("chips")]
CaptionsArtifact = Annotated[InputArtifact, of_kind("captions")]
IndexArtifact = Annotated[InputArtifact, of_kind("index")]
# A file or folder: relative to the cluster file's data_root, absolute, s3://…, or artifact://kind/name/version/sub.
InputPath = Annotated[str, StringConstraints(min_length=1), InputMarker(is_artifact=False)]


@runtime_checkable
class SelectsFiles(Protocol):
    """A section that reads only some of the files below the folder that it names."""

    def select_files(self, names: Sequence[str]) -> list[str]:
        """Those of the files (by their names below the folder) that are read; ConfigError if one is missing."""
        ...


class StageConfig(Config):
    """What every job's recipe holds: the artifact it makes and the MLflow experiment it belongs to."""

    output: ArtifactRef
    pipeline: Annotated[str, StringConstraints(min_length=1)] = "rsplatform"


ConfigType = TypeVar("ConfigType", bound=BaseModel)


def load_config(config_class: type[ConfigType], path: str | Path, overrides: list[str] | None = None) -> ConfigType:
    """Read `path`, apply `key.path=value` overrides (values in YAML) and validate against `config_class`.

    Raises:
        ConfigError: missing or empty file, broken YAML, unknown key, wrong type or a broken override.
    """
    values = read_yaml(path)
    for override in overrides or []:
        apply_override(values, override)
    return validate(config_class, values, str(path))


def read_yaml(path: str | Path, included_by: tuple[str, ...] = ()) -> dict[str, Any]:
    """The mapping in the YAML file `path`.

    Raises:
        ConfigError: it is missing, unreadable, broken, no mapping, or includes itself.
    """
    path = Path(path)
    if os.path.realpath(path) in included_by:
        raise ConfigError(f"{path}: includes itself through !recipe")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _loader_of(path, included_by))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the path of a recipe, e.g. configs/demo/world.yaml") from None
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); give a recipe that you may read, e.g. configs/demo/world.yaml"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict) or not values:
        raise ConfigError(f"{path}: empty or not a mapping of `key: value` lines")
    return values


def _loader_of(path: Path, included_by: tuple[str, ...]) -> type[yaml.SafeLoader]:
    """YAML's safe loader with one addition, a recipe from another file whose path is relative to this one:

    `!recipe other.yaml` as it stands, `!recipe {from: other.yaml, key: value}` with some of its top keys replaced.
    """

    class RecipeLoader(yaml.SafeLoader):
        pass

    def include(loader: yaml.SafeLoader, node: yaml.Node) -> dict[str, Any]:
        changes: dict[Any, Any] = {}
        if isinstance(node, yaml.MappingNode):
            changes = loader.construct_mapping(node, deep=True)
            other = changes.pop("from", None)
        else:
            other = node.value
        if not isinstance(other, str):
            raise ConfigError(
                f"{path}: !recipe needs a file: `!recipe other.yaml` or `!recipe {{from: other.yaml, …}}`"
            )
        return read_yaml(path.parent / other, (*included_by, os.path.realpath(path))) | changes

    RecipeLoader.add_constructor("!recipe", include)
    return RecipeLoader


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `key.path=value` in place, lists by index; the value is read as YAML, so `3` and `[1, 2]` keep types."""
    key_path, separator, text = override.partition("=")
    keys = key_path.split(".")
    if not separator or not all(keys):
        raise ConfigError(f"{override!r}: an override is written key.path=value, e.g. train.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: the value is not valid YAML: {error}") from error
    section: Any = values
    for key in keys[:-1]:
        section = section[_index(section, key, override)] if isinstance(section, list) else section.setdefault(key, {})
        if not isinstance(section, dict | list):
            raise ConfigError(f"{override!r}: {key} holds a value, not a section")
    last: Any = _index(section, keys[-1], override) if isinstance(section, list) else keys[-1]
    section[last] = value


def _index(items: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(items):
        raise ConfigError(f"{override!r}: {key!r} is no index of a list of {len(items)}; the first is 0")
    return int(key)


def validate(config_class: type[ConfigType], values: dict[str, Any], source: str) -> ConfigType:
    """Validate `values`; ConfigError lists each bad field of `source`, unknown ones with the nearest valid key."""
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        lines = [_describe(config_class, problem) for problem in error.errors(include_url=False)]
        raise ConfigError(f"{source}: " + "; ".join(lines)) from None


def _describe(config_class: type[BaseModel], problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"] if not str(part).startswith("function-"))  # a validator's
    if problem["type"] in {"extra_forbidden", "unexpected_keyword_argument"}:
        known = sorted(_keys_at(config_class, problem["loc"][:-1]))
        nearest = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"valid keys: {', '.join(known)}"
        return f"unknown key {where!r}; {hint}"
    if problem["type"] == "missing":
        return f"missing key {where!r}"
    return f"{where or 'recipe'}: {problem['msg']} (got {problem['input']!r})"


def _keys_at(config_class: Any, location: tuple[Any, ...]) -> set[str]:
    """Field names of the section at `location`, walking through lists, unions and dataclasses."""
    classes = [config_class]
    for part in location:
        children = [_children(item, part) for item in classes]
        classes = [child for group in children for child in group]
    return set().union(*(_field_types(item) for item in classes)) if classes else set()


def _children(item: Any, part: Any) -> list[Any]:
    fields = _field_types(item)
    if part in fields:
        return _flatten(fields[part])
    return [item]  # a list index or the tag of a union: the class stays the same


def _field_types(item: Any) -> dict[str, Any]:
    if isinstance(item, type) and issubclass(item, BaseModel):
        return {name: field.annotation for name, field in item.model_fields.items()}
    if hasattr(item, "__dataclass_fields__"):
        return typing.get_type_hints(item)
    return {}


def _flatten(annotation: Any) -> list[Any]:
    """The classes inside list[X], X | Y, Annotated[X, …], dict[str, X]."""
    arguments = typing.get_args(annotation)
    if not arguments:
        return [annotation]
    return [leaf for argument in arguments for leaf in _flatten(argument)]


@dataclass(frozen=True)
class RecipeInput:
    """One input that a recipe names: in which field, as what, and the section that holds the field."""

    field: str
    value: str
    is_artifact: bool
    section: BaseModel

    @property
    def artifact(self) -> str | None:
        """kind/name/version of the artifact that it is or lies in; None for raw data."""
        if self.is_artifact:
            return self.value
        if self.value.startswith("artifact://"):
            return "/".join(self.value.removeprefix("artifact://").split("/")[:3])
        return None


def iter_inputs(config: BaseModel, prefix: str = "") -> Iterator[RecipeInput]:
    """Every input that a recipe names; sections and lists are walked.

    A section that is a job of its own (`nested_jobs`) has its own inputs and is left out; a template's count here.
    """
    jobs = nested_jobs(config)
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        path = f"{prefix}{name}"
        markers = [item for item in field.metadata if isinstance(item, InputMarker)]
        if markers and isinstance(value, str):
            yield RecipeInput(path, value, markers[0].is_artifact, config)
        items = value if isinstance(value, list | tuple) else [value]
        element_marker = _element_marker(field.annotation)
        for index, item in enumerate(items):
            label = f"{path}.{index}" if isinstance(value, list | tuple) else path
            if isinstance(item, BaseModel) and name not in jobs:
                yield from iter_inputs(item, f"{label}.")
            elif element_marker and isinstance(item, str) and not markers:
                yield RecipeInput(label, item, element_marker.is_artifact, config)


def nested_jobs(config: BaseModel) -> dict[str, StageConfig]:
    """The sections that are jobs of their own, which this one runs (the demo composes them), by field name."""
    values = {name: getattr(config, name) for name in type(config).model_fields}
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, StageConfig) and not _is_template(type(config).model_fields[name].metadata)
    }


def _is_template(metadata: list[Any]) -> bool:
    return any(isinstance(item, TemplateMarker) for item in metadata)


def _element_marker(annotation: Any) -> InputMarker | None:
    """The marker inside `list[InputPath]` or `InputPath | None`, which pydantic leaves in the annotation."""
    for argument in typing.get_args(annotation):
        for item in getattr(argument, "__metadata__", ()):
            if isinstance(item, InputMarker):
                return item
    return None
