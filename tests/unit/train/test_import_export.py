"""Ways in and out: a layout's file becomes a model that trains on; a model goes out bit-equal, with a card of facts."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from mlflow import MlflowClient
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rsplatform import artifacts, storage
from rsplatform.artifacts import Artifact, ArtifactError
from rsplatform.cluster import Cluster, TrainPlacement
from rsplatform.config import ConfigError
from rsplatform.model.embedder import Embedder
from rsplatform.model.openmammut import load_openmammut
from rsplatform.model.state import WeightsError
from rsplatform.tracking import tracking_uri
from rsplatform.train.checkpoint import CheckpointFolder
from rsplatform.train.curriculum import RecipeMismatchError
from rsplatform.train.export_model import ExportModelConfig, export_model
from rsplatform.train.import_model import ImportModelConfig, import_model
from rsplatform.train.launch import pretrain
from rsplatform.train.recipe import PretrainConfig
from rsplatform.train.train_tokenizer import TrainTokenizerConfig, train_tokenizer
from tests.unit.train.tiny_dataset import make_tiny_dataset, tiny_recipe
from tests.unit.train.tiny_training import TinyStore

TOKENIZER = "artifact://tokenizer/tiny/v1"
IMPORTED = "model/imported/v1"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """A root with a dataset and a tokenizer of its captions."""
    root = str(tmp_path_factory.mktemp("root"))
    make_tiny_dataset(root)
    cluster = Cluster(root=root, train=TrainPlacement(launcher="local"))
    config = TrainTokenizerConfig(output="tokenizer/tiny/v1", datasets=["dataset/tiny/v1"], vocab_size=280)
    train_tokenizer(config, cluster)
    return cluster


@pytest.fixture(scope="module")
def conformance(data_root: Path) -> Path:
    path = data_root / "conformance" / "openmammut_with_mlp.safetensors"
    assert path.is_file(), f"the real data lack {path}"
    return path


@pytest.fixture(scope="module")
def imported(cluster: Cluster, conformance: Path) -> Artifact:
    return import_model(ImportModelConfig(output=IMPORTED, weights=str(conformance), tokenizer=TOKENIZER), cluster)


def test_a_trained_tokenizer_is_one_that_recipes_can_name(cluster: Cluster) -> None:
    manifest = Artifact(cluster.root, "tokenizer/tiny/v1").manifest()
    assert manifest["counts"] == {"inputs": 48, "kept": 48, "dropped": {}}
    assert manifest["metrics"]["vocab_size"] == 280
    recipe = tiny_recipe(output="model/named/v1", tokenizer=TOKENIZER, phases=tiny_recipe()["phases"][:1])
    trained = pretrain(PretrainConfig(**recipe), cluster)
    assert "tokenizer/tiny/v1" in trained.manifest()["inputs"], "lineage knows the tokenizer"
    own, used = (Path(cluster.root) / name for name in ("tokenizer/tiny/v1", "model/named/v1/model"))
    assert (own / "tokenizer.json").read_text() == (used / "tokenizer.json").read_text()


def test_a_tokenizer_that_is_too_large_is_refused_before_training(cluster: Cluster) -> None:
    recipe = tiny_recipe(output="model/small/v1", tokenizer=TOKENIZER)
    recipe["model"] = {"size": "mini", "settings": recipe["model"]["settings"] | {"vocab_size": 270}}
    with pytest.raises(RecipeMismatchError, match="280 tokens.*vocab_size to 280 or more"):
        pretrain(PretrainConfig(**recipe), cluster)


@torch.no_grad()
def test_an_imported_model_is_the_files_and_trains_on(cluster: Cluster, imported: Artifact, conformance: Path) -> None:
    embedder = Embedder.load(Path(imported.uri) / "model")
    io = {key[3:]: value for key, value in load_file(conformance).items() if key.startswith("io.")}
    torch.testing.assert_close(embedder.model.encode_image(io["image"]), io["image_features"], atol=1e-4, rtol=0)
    torch.testing.assert_close(embedder.model.encode_text(io["text"]), io["text_features"], atol=1e-4, rtol=0)
    with torch.enable_grad():
        phases = [{"name": "joint", "steps": 3, "schedule": {"learning_rate": 1e-3}, "freeze": ["vision_trunk"]}]
        recipe = tiny_recipe(output="model/continued/v1", model=None, start_from=IMPORTED, phases=phases)
        continued = pretrain(PretrainConfig(**recipe), cluster)
    after = load_file(Path(continued.uri) / "model" / "model.safetensors")
    before = embedder.model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert "vision.projection.weight" in changed and "text.position_TD" in changed
    assert not any(name.startswith("vision.blocks") for name in changed)


def test_what_cannot_be_imported_says_why(cluster: Cluster, conformance: Path, tmp_path: Path) -> None:
    def refused(error: type[Exception], words: str, **changes) -> None:
        values = {"output": "model/bad/v1", "weights": str(conformance), "tokenizer": TOKENIZER} | changes
        with pytest.raises(error, match=words):
            import_model(
                ImportModelConfig.model_validate(values),
                Cluster(root=str(tmp_path / words[:5]), data_root=cluster.root),
            )

    for root in ("absen", "the t", "visio", "no co"):  # a root of its own for each, with the tokenizer in it
        (tmp_path / root).mkdir()
        (tmp_path / root / "tokenizer").symlink_to(Path(cluster.root) / "tokenizer")
    refused(ConfigError, "absent.safetensors does not exist", weights="absent.safetensors")
    with safe_open(conformance, framework="pt") as file:
        layout = json.loads(file.metadata()["config"])
    del layout["vision"]["head_width"]
    refused(WeightsError, "vision needs 'heads'", architecture=layout)
    save_file(load_file(conformance), tmp_path / "bare.safetensors")
    refused(WeightsError, "no config in the metadata", weights=str(tmp_path / "bare.safetensors"))


def test_a_model_goes_out_bit_equal_in_both_layouts(cluster: Cluster, imported: Artifact, conformance: Path) -> None:
    config = ExportModelConfig(output="export/imported/v1", model=IMPORTED, openmammut=True)
    folder = Path(export_model(config, cluster).uri)
    embedder, source = (Embedder.load(path / "model") for path in (folder, Path(imported.uri)))
    assert embedder.model_hash == source.model_hash
    images = [sample.image for sample in TinyStore().read(range(4))]
    assert (embedder.embed_images(images) == source.embed_images(images)).all()
    back, layout = (load_file(path) for path in (folder / "openmammut/model.safetensors", conformance))
    assert all(torch.equal(back[name], value) for name, value in layout.items() if not name.startswith("io."))
    beside, _ = load_openmammut(
        folder / "openmammut/model.safetensors", json.loads((folder / "openmammut/config.json").read_text())
    )
    assert torch.equal(beside.log_logit_scale, source.model.log_logit_scale)


def test_half_precision_weights_train_and_embed_in_float32_and_go_out_as_they_came(
    cluster: Cluster, conformance: Path, tmp_path: Path
) -> None:
    with safe_open(conformance, framework="pt") as file:
        metadata = file.metadata()
    layout = {name: value.bfloat16() for name, value in load_file(conformance).items() if not name.startswith("io.")}
    save_file(layout, tmp_path / "half.safetensors", metadata)
    half = {"output": "model/half/v1", "weights": str(tmp_path / "half.safetensors"), "tokenizer": TOKENIZER}
    imported = import_model(ImportModelConfig.model_validate(half), cluster)
    embedder = Embedder.load(Path(imported.uri) / "model")
    assert {value.dtype for value in embedder.model.state_dict().values()} == {torch.float32}
    tags = MlflowClient(tracking_uri(cluster.root)).get_run(imported.manifest()["mlflow_run_id"]).data.tags
    assert tags["model_hash"] == embedder.model_hash
    recipe = tiny_recipe(output="model/half_continued/v1", model=None, start_from=imported.ref)
    continued = pretrain(PretrainConfig(**recipe), cluster)
    tensors, _ = CheckpointFolder(f"{continued.uri}/checkpoints").load(8)
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    exported = ExportModelConfig(output="export/half/v1", model=imported.ref, openmammut=True)
    folder = Path(export_model(exported, cluster).uri)
    back = load_file(folder / "openmammut" / "model.safetensors")
    assert {name: value.dtype for name, value in back.items()} == dict.fromkeys(layout, torch.bfloat16)
    assert all(torch.equal(back[name], value) for name, value in layout.items())
    weights = [path / "model" / "model.safetensors" for path in (folder, Path(imported.uri))]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_the_card_tells_where_the_model_comes_from_and_how_it_was_measured(cluster: Cluster) -> None:
    trained = pretrain(PretrainConfig(**tiny_recipe(output="model/carded/v1")), cluster)
    model_hash = Embedder.load(Path(trained.uri) / "model").model_hash
    benchmarks = {"val": {"t2i_r10": 12.5, "chance_t2i_r10": 1.25, "num_images": 80, "pin": "a" * 64, "by": {"x": 1}}}
    report = {"model": trained.ref, "model_hash": model_hash, "benchmarks": benchmarks}
    write_report(cluster.root, "evaluation/carded/v1", report)
    write_report(cluster.root, "evaluation/other/v1", report | {"model_hash": "b" * 64})
    dataset = Artifact(cluster.root, "dataset/tiny/v1")  # as if build_dataset had joined the chips
    storage.write_json(dataset.path("manifest.json"), dataset.manifest() | {"inputs": {"chips/tiny/v1": "c" * 64}})
    scenes = [{"attribution": "© Somebody", "landmark_attributions": ["© Mappers"]}, {"attribution": ""}]
    storage.write_json(f"{cluster.root}/chips/tiny/v1/scenes.json", scenes)
    values = {"output": "export/carded/v1", "model": trained.ref, "evaluations": ["evaluation/carded/v1"]}
    exported = export_model(ExportModelConfig(**values, title="Tiny"), cluster)
    card = (Path(exported.uri) / "model" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    fields = yaml.safe_load(front)
    assert (fields["license"], fields["pipeline_tag"]) == ("unknown", "zero-shot-image-classification")
    result = fields["model-index"][0]["results"][0]
    assert (result["dataset"]["name"], result["metrics"]) == ("val", [{"type": "t2i_r10", "value": 12.5}])
    assert "| val | t2i_r10 | 12.50 | 1.25 | `aaaaaaaaaaaaaaaa` |" in body
    assert "64 samples seen in 8 steps" in body and model_hash in body
    assert "\nAt the end: " in body
    assert "`dataset/tiny/v1`" in body and "`chips/tiny/v1`" in body
    assert "Attributions of the imagery and maps: © Mappers; © Somebody\n" in body
    assert "Not chosen" in body and "recipe field `licence`" in body
    assert "num_images" not in body
    licensed = ExportModelConfig.model_validate(values | {"output": "export/carded/v2"} | {"licence": "apache-2.0"})
    card = (Path(export_model(licensed, cluster).uri) / "model" / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n", 2)[1])["license"] == "apache-2.0" and "Not chosen" not in card
    others = ExportModelConfig.model_validate(
        values | {"output": "export/carded/v3", "evaluations": ["evaluation/other/v1"]}
    )
    with pytest.raises(ConfigError, match="evaluation/other/v1 measured model/carded/v1, which is another model"):
        export_model(others, cluster)


def test_a_moving_average_is_not_said_to_have_the_numbers_of_the_training(cluster: Cluster) -> None:
    trained = pretrain(PretrainConfig(**tiny_recipe(output="model/averaged/v1", ema_decay=0.5)), cluster)
    exported = export_model(ExportModelConfig(output="export/averaged/v1", model=trained.ref), cluster)
    card = (Path(exported.uri) / "model" / "README.md").read_text()
    assert "\nAt the end (of the weights in training, whose moving average this is): caption " in card
    tags = MlflowClient(tracking_uri(cluster.root)).get_run(trained.manifest()["mlflow_run_id"]).data.tags
    assert tags["exported_weights"] == "moving average, unlike those of final/"


def test_a_damaged_model_is_not_given_to_others(cluster: Cluster) -> None:
    """One flipped bit of a weight loads without complaint; only the manifest knows."""
    trained = pretrain(PretrainConfig(**tiny_recipe(output="model/damaged/v1")), cluster)
    config = ExportModelConfig(output="export/damaged/v1", model=trained.ref)
    weights = Path(trained.uri) / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    Embedder.load(weights.parent)
    with pytest.raises(ArtifactError, match=r"model\.safetensors differs from its manifest; delete .*model/damaged/v1"):
        export_model(config, cluster)
    assert not Path(cluster.root, config.output).exists(), "refused before anything was written"
    weights.write_bytes(whole)
    assert export_model(config, cluster).is_finished


def write_report(root: str, ref: str, report: dict) -> None:
    artifact, recipe = Artifact(root, ref), artifacts.identity({"output": ref}, {})
    artifacts.begin(artifact, recipe)
    storage.write_json(artifact.path("report.json"), report)
    artifacts.commit(artifact, recipe, counts={}, metrics={}, run_id="none")
