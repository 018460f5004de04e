"""The front door without Ray: a model comes out, a rerun does nothing, a broken run resumes to the same weights."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster, TrainPlacement
from rsplatform.config import ConfigError, validate
from rsplatform.model.embedder import Embedder
from rsplatform.train.launch import loss_figure, pretrain
from rsplatform.train.pretrain import TrainingDivergedError
from rsplatform.train.recipe import PretrainConfig
from rsplatform.train.worker import Recorder, read_history
from tests.unit.train.tiny_dataset import make_tiny_dataset, tiny_recipe


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    root = str(tmp_path_factory.mktemp("root"))
    make_tiny_dataset(root)
    return Cluster(root=root, train=TrainPlacement(launcher="local"))


def weights_of(artifact: Artifact) -> dict:
    return load_file(Path(artifact.uri) / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def trained(cluster: Cluster) -> Artifact:
    return pretrain(PretrainConfig(**tiny_recipe()), cluster)


def test_the_front_door_leaves_a_model_that_embeds(trained: Artifact, cluster: Cluster) -> None:
    manifest = trained.manifest()
    assert manifest["counts"] == {"steps": 8, "samples_seen": 64, "stopped_early": 0}
    assert {"final/loss", "final/val_contrastive", "training_minutes"} <= set(manifest["metrics"])
    embedder = Embedder.load(Path(trained.uri) / "model")
    assert embedder.embed_texts(["a red field"]).shape == (1, embedder.embedding_width)
    history = read_history(trained.uri)
    assert [row["step"] for row in history if "loss" in row] == [2, 4, 6, 8]
    assert loss_figure(history).axes[0].lines
    assert pretrain(PretrainConfig(**tiny_recipe()), cluster) == trained


def test_a_run_that_broke_resumes_to_the_same_weights(
    trained: Artifact, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PretrainConfig(**tiny_recipe(output="model/broken/v1"))
    save = Recorder.save

    def save_then_break(self: Recorder, tensors, progress) -> None:
        save(self, tensors, progress)
        if progress.step == 4:
            raise OSError("the network is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "save", save_then_break)
        with pytest.raises(OSError, match="network"):
            pretrain(config, cluster)
    resumed = pretrain(config, cluster)
    expected = weights_of(trained)
    assert all((value == expected[name]).all() for name, value in weights_of(resumed).items())
    assert [row["step"] for row in read_history(resumed.uri) if "loss" in row] == [2, 4, 6, 8]


def test_a_run_continues_from_another_model(trained: Artifact, cluster: Cluster) -> None:
    recipe = tiny_recipe(output="model/continued/v1", start_from=trained.ref, model=None, ema_decay=0.5)
    continued = pretrain(PretrainConfig(**recipe), cluster)
    assert continued.manifest()["inputs"].keys() == {"dataset/tiny/v1", trained.ref}
    tokenizers = [(Path(item.uri) / "model" / "tokenizer.json").read_text() for item in (trained, continued)]
    assert tokenizers[0] == tokenizers[1]
    assert weights_of(continued).keys() == weights_of(trained).keys()


def test_the_model_has_the_image_size_of_the_last_phase(cluster: Cluster) -> None:
    schedule = {"learning_rate": 1e-3}
    phases = [
        {"name": "small", "steps": 2, "schedule": schedule, "freeze": ["vision"]},
        {"name": "large", "steps": 2, "schedule": schedule, "image_size": 24},
    ]
    artifact = pretrain(PretrainConfig(**tiny_recipe(output="model/larger/v1", phases=phases)), cluster)
    embedder = Embedder.load(Path(artifact.uri) / "model")
    assert embedder.image_size == 24
    recipe = tiny_recipe(output="model/larger_still/v1", start_from=artifact.ref, model=None, phases=phases[:1])
    continued = pretrain(PretrainConfig(**recipe), cluster)
    assert Embedder.load(Path(continued.uri) / "model").image_size == 24, "a phase without a size keeps the model's own"
    frozen = [name for name in weights_of(artifact) if name.startswith("vision.")]
    assert all((weights_of(continued)[name] == weights_of(artifact)[name]).all() for name in frozen)


def test_a_diverging_run_stops_with_a_word(cluster: Cluster) -> None:
    phases = [{"name": "mad", "steps": 8, "schedule": {"learning_rate": 1e30, "decay": "constant"}}]
    config = PretrainConfig(**tiny_recipe(output="model/mad/v1", phases=phases))
    with pytest.raises(TrainingDivergedError, match=r"at step \d+ .*Lower the learning rate"):
        pretrain(config, cluster)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"start_from": "model/a/v1"}, "either `model`"),
        ({"model": None}, "either `model`"),
        ({"validate_every_steps": 5, "validation_split": None}, "needs a validation_split"),
        ({"augmentation": {"symetries": True}}, "did you mean 'symmetries'"),
        ({"model": {"size": "mini", "settings": {"imag_size": 32}}}, "did you mean 'image_size'"),
        ({"phases": []}, "at least 1"),
    ],
)
def test_bad_recipes_are_refused_at_load(changes: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate(PretrainConfig, tiny_recipe(**changes), "recipe.yaml")


def test_a_mixture_of_an_absent_kind_names_those_that_are_there(cluster: Cluster) -> None:
    phases = [{"name": "mix", "steps": 2, "schedule": {"learning_rate": 1e-3}, "mixture": {"web_pair": 1.0}}]
    with pytest.raises(ValueError, match=r"web_pair.*holds chips, web_pairs"):
        pretrain(PretrainConfig(**tiny_recipe(output="model/absent/v1", phases=phases)), cluster)
