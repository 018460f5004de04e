"""Recipes: overrides, frozen values, and errors that name the key and the nearest valid one."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError

from rsplatform.cluster import Cluster, TrainPlacement, load_cluster
from rsplatform.config import Config, ConfigError, InputArtifact, InputPath, StageConfig, iter_inputs, load_config
from rsplatform.dataset.build import BuildDatasetConfig
from rsplatform.train.export_model import ExportModelConfig


class Schedule(Config):
    learning_rate: float = 1e-3
    warmup_steps: int = 10


class Chips(Config):
    type: Literal["chips"] = "chips"
    chips: InputArtifact
    extra: list[InputPath] = []


class Web(Config):
    type: Literal["web"] = "web"
    folder: InputPath | None = None


class Recipe(StageConfig):
    train: Schedule = Schedule()
    sources: list[Annotated[Chips | Web, Field(discriminator="type")]] = []


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_overrides_reach_nested_keys_with_yaml_types(tmp_path: Path) -> None:
    path = write(tmp_path, "output: model/a/v1\ntrain: {warmup_steps: 5}\n")
    recipe = load_config(Recipe, path, ["train.learning_rate=0.01", "output=model/a/v2"])
    assert recipe.train == Schedule(learning_rate=0.01, warmup_steps=5)
    assert recipe.output == "model/a/v2"


def test_overrides_reach_into_lists_by_index(tmp_path: Path) -> None:
    path = write(tmp_path, "output: model/a/v1\nsources: [{type: chips, chips: chips/a/v1}, {type: web}]\n")
    recipe = load_config(Recipe, path, ["sources.1.folder=photos", "sources.0.extra=[a]"])
    assert recipe.sources == [Chips(chips="chips/a/v1", extra=["a"]), Web(folder="photos")]
    for wrong in ("sources.2.folder=x", "sources.first.folder=x"):
        with pytest.raises(ConfigError, match="no index of a list of 2"):
            load_config(Recipe, path, [wrong])


def test_an_artifact_of_another_kind_is_named_with_what_the_field_accepts(tmp_path: Path) -> None:
    path = write(tmp_path, "output: dataset/a/v1\nsources: [{type: chips, chips: chips/a/v1, captions: chips/a/v1}]\n")
    with pytest.raises(ConfigError) as caught:
        load_config(BuildDatasetConfig, path)
    assert str(caught.value).startswith(
        f"{path}: sources.0.chips.captions: Value error, needs an artifact of kind captions, such as captions/NAME/v1 "
        "(got 'chips/a/v1')"
    )
    path = write(tmp_path, "output: export/a/v1\nmodel: model/a/v1\nevaluations: [evaluation/a/v1]\n")
    inputs = [(item.field, item.artifact) for item in iter_inputs(load_config(ExportModelConfig, path))]
    assert inputs == [("model", "model/a/v1"), ("evaluations.0", "evaluation/a/v1")]
    with pytest.raises(ConfigError, match=r"model: .* kind model or export, .*\(got 'index/a/v1'\); evaluations\.0: "):
        load_config(ExportModelConfig, path, ["model=index/a/v1", "evaluations=[model/a/v1]"])


def test_recipes_are_frozen(tmp_path: Path) -> None:
    recipe = load_config(Recipe, write(tmp_path, "output: model/a/v1\n"))
    with pytest.raises(ValidationError):
        recipe.__setattr__("output", "model/b/v1")


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("output: model/a/v1\ntrian: {}\n", [], ["trian", "train"]),
        ("output: model/a/v1\ntrain: {warmup_step: 1}\n", [], ["train.warmup_step", "warmup_steps"]),
        ("output: model/a/v1\n", ["train.learnin_rate=1"], ["train.learnin_rate", "learning_rate"]),
        ("output: model/a/v1\nsources: [{type: chips, chip: c/d/e, chips: a/b/c}]\n", [], ["chip", "chips"]),
        ("train: {}\n", [], ["missing key 'output'"]),
        ("output: no-slashes\n", [], ["output", "no-slashes"]),
        ("output: model/a/v1\n", ["train.warmup_steps"], ["key.path=value"]),
        ("output: model/a/v1\n", ["output.deep=1"], ["output", "holds a value"]),
        ("output: model/a/v1\ntrain: {learning_rate: .nan}\n", [], ["learning_rate"]),
        ("", [], ["empty"]),
        ("- a\n- b\n", [], ["mapping"]),
        ("a: [\n", [], ["not valid YAML"]),
    ],
)
def test_bad_recipes_name_the_field_and_the_remedy(
    tmp_path: Path, text: str, overrides: list[str], words: list[str]
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load_config(Recipe, path, overrides)
    for word in words:
        assert word in str(error.value)


def test_a_missing_recipe_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        load_config(Recipe, "nowhere.yaml")


def test_a_recipe_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A folder in its place, a name that no disk takes, a link to itself: as for one that the user may not read."""
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    for path, reason in (
        (tmp_path, "Is a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "loop.yaml", "Too many levels of symbolic links"),
    ):
        with pytest.raises(ConfigError, match=rf"cannot be read \({reason}\); give a recipe"):
            load_config(Recipe, path)


def test_inputs_are_found_through_lists_unions_and_optionals() -> None:
    recipe = Recipe(
        output="dataset/a/v1",
        sources=[Chips(chips="chips/a/v1", extra=["one", "two"]), Web(folder="photos"), Web()],
    )
    assert [(item.field, item.value, item.is_artifact) for item in iter_inputs(recipe)] == [
        ("sources.0.chips", "chips/a/v1", True),
        ("sources.0.extra.0", "one", False),
        ("sources.0.extra.1", "two", False),
        ("sources.1.folder", "photos", False),
    ]


def test_cluster_files_hold_placement_under_metadata(tmp_path: Path) -> None:
    path = write(tmp_path, "cluster_name: a\nprovider: {type: local}\nmetadata: {rsplatform: {root: ./art}}\n")
    cluster = load_cluster(path, ["train.num_workers=4"])
    assert Path(cluster.root).is_absolute()
    assert cluster.train.num_workers == 4
    with pytest.raises(ConfigError, match="num_worker.*num_workers"):
        load_cluster(path, ["train.num_worker=4"])
    with pytest.raises(ConfigError, match=r"metadata\.rsplatform"):
        load_cluster(write(tmp_path, "cluster_name: a\n"))


def test_one_process_is_not_several_workers() -> None:
    with pytest.raises(ValueError, match="launcher local is one worker in this process, not num_workers 2"):
        TrainPlacement(launcher="local", num_workers=2)


def test_inputs_resolve_to_artifacts_data_root_or_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RSPLATFORM_TEST_DATA", raising=False)
    cluster = Cluster(root="/art", data_root="/data")
    assert cluster.resolve("artifact://world/demo/v1/scenes") == "/art/world/demo/v1/scenes"
    assert cluster.resolve("rsicd") == "/data/rsicd"
    assert cluster.resolve("s3://bucket/x") == "s3://bucket/x"
    assert cluster.resolve("/abs") == "/abs"
    with pytest.raises(ConfigError, match="data_root"):
        Cluster(root="/art").resolve("rsicd")


def test_a_recipe_can_be_composed_of_others_and_still_be_overridden(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "train.yaml").write_text("warmup_steps: 5\n")
    path = write(tmp_path, "output: model/a/v1\ntrain: !recipe parts/train.yaml\n")
    assert load_config(Recipe, path, ["train.learning_rate=0.5"]).train == Schedule(learning_rate=0.5, warmup_steps=5)
    with pytest.raises(ConfigError, match=r"gone\.yaml: no such file"):
        load_config(Recipe, write(tmp_path, "train: !recipe gone.yaml\n"))


def test_a_recipe_can_be_another_one_with_changes(tmp_path: Path) -> None:
    (tmp_path / "first.yaml").write_text("output: model/a/v1\ntrain: {learning_rate: 0.5, warmup_steps: 5}\n")
    path = write(tmp_path, "!recipe\nfrom: first.yaml\noutput: model/b/v1\n")
    recipe = load_config(Recipe, path, ["train.warmup_steps=6"])
    assert recipe.output == "model/b/v1"
    assert recipe.train == Schedule(learning_rate=0.5, warmup_steps=6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: !recipe {output: model/a/v1}\n", "!recipe needs a file"),
        ("train: !recipe [a.yaml]\n", "!recipe needs a file"),
        ("output: model/a/v1\ntrain: !recipe recipe.yaml\n", "includes itself"),
    ],
)
def test_bad_inclusions_are_explained(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Recipe, write(tmp_path, text))
