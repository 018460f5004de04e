"""The front door without Ray: a model comes out, a rerun does nothing, a broken run resumes to the same weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster, TrainPlacement
from rsplatform.config import ConfigError, validate
from rsplatform.model.embedder import Embedder
from rsplatform.stage import plan
from rsplatform.train.checkpoint import CheckpointFolder
from rsplatform.train.curriculum import RecipeMismatchError
from rsplatform.train.launch import loss_figure, pretrain
from rsplatform.train.pretrain import TrainingDivergedError
from rsplatform.train.recipe import PretrainConfig
from rsplatform.train.worker import Recorder, read_history
from tests.unit.train.tiny_dataset import make_tiny_dataset, tiny_recipe

PHASE = {"name": "one", "steps": 4, "schedule": {"learning_rate": 1e-3}}
EVERY_STEP = {"validate_every_steps": 1, "checkpoint_every_steps": 1, "keep_checkpoints": 1}


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
    assert manifest["counts"] == {
        "steps": 8,
        "samples_seen": 64,
        "skipped_steps": 0,
        "undecodable": 0,
        "exported_step": 8,
        "stopped_early": 0,
    }
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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": {"contrastive": "sigmoid"}}, "has no logit bias: it goes with loss.contrastive softmax"),
        ({"phases": [PHASE | {"image_size": 18}]}, "start_from model/.*18 is not a multiple"),
    ],
)
def test_a_start_that_does_not_fit_is_refused_before_any_worker(
    trained: Artifact, cluster: Cluster, changes: dict, words: str
) -> None:
    recipe = tiny_recipe(output="model/second/v1", model=None, start_from=trained.ref, **changes)
    with pytest.raises(RecipeMismatchError, match=words):
        pretrain(PretrainConfig(**recipe), cluster)


def test_the_card_is_in_the_plan_and_what_it_cannot_hold_is_refused_before_anything_is_begun(
    trained: Artifact, cluster: Cluster
) -> None:
    def on_card(**card) -> Cluster:
        return cluster.model_copy(update={"train": TrainPlacement(launcher="local", gpus_per_worker=1, **card)})

    for origin in ({}, {"model": None, "start_from": trained.ref}):
        config = PretrainConfig(**tiny_recipe(output="model/on_card/v1", **origin))
        lines = plan(config, on_card(gpu="L4"))
        assert any(line.startswith("memory micro_batch_size 8 of 8 per worker (by arithmetic)") for line in lines)
        assert not any(line.startswith("memory") for line in plan(config, cluster))
        with pytest.raises(RecipeMismatchError, match="one sample at a time needs .* take cards with more memory"):
            pretrain(config, on_card(gpu_memory_gb=1))
        assert not Path(cluster.root, "model/on_card/v1").exists()
    later = PretrainConfig(**tiny_recipe(output="model/on_card/v1", model=None, start_from="model/later/v1"))
    assert "memory unknown until model/later/v1 is finished" in plan(later, on_card(gpu="L4"))


def test_workers_that_do_not_fit_are_refused_before_any_is_started(cluster: Cluster) -> None:
    recipe = PretrainConfig(**tiny_recipe(output="model/odd/v1", batch_size=7))
    with pytest.raises(RecipeMismatchError, match="^batch_size 7 does not divide among 2 workers"):
        pretrain(recipe, cluster.model_copy(update={"train": TrainPlacement(num_workers=2)}))
    assert not (Path(cluster.root) / "model" / "odd").exists()


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
        ({"loss": {"contrastive": "sigmoid"}}, "belong together; set both"),
        ({"model": {"size": "mini", "settings": {"logit_bias": True}}}, "belong together; set both"),
        ({"model": {"size": "openmammut"}}, "openmammut_S"),
        ({"keep_every_steps": 3}, r"keep_every_steps 3 .* a multiple of checkpoint_every_steps \(now 2\)"),
        ({"keep_every_steps": 3, "checkpoint_every_steps": None}, "a multiple of checkpoint_every_steps"),
        ({"keep_best": {}, "ema_decay": 0.9}, "keep_best compares the weights as they are"),
        ({"keep_best": {"metric": "val_recall"}}, r"'val_recall' is not among .*val_contrastive.*val_mean_recall"),
        (
            {"keep_best": {}, "phases": [PHASE, PHASE | {"image_size": 32}]},
            "keep_best compares validations",
        ),
    ],
)
def test_bad_recipes_are_refused_at_load(changes: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate(PretrainConfig, tiny_recipe(**changes), "recipe.yaml")


def test_a_mixture_of_an_absent_source_names_those_that_are_there(cluster: Cluster) -> None:
    phases = [{"name": "mix", "steps": 2, "schedule": {"learning_rate": 1e-3}, "mixture": {"web_pair": 1.0}}]
    with pytest.raises(ValueError, match=r"web_pair,.*are chips, web_pairs"):
        pretrain(PretrainConfig(**tiny_recipe(output="model/absent/v1", phases=phases)), cluster)


@pytest.mark.parametrize("export", ["best", "last"])
def test_the_best_model_outlives_worse_ones_and_is_exported(cluster: Cluster, export: str) -> None:
    # the held-out caption loss falls with every step, so by `max` the first one is the best
    keep_best = {"metric": "val_caption", "mode": "max", "export": export}
    artifact = pretrain(
        PretrainConfig(**tiny_recipe(output=f"model/{export}/v1", keep_best=keep_best, **EVERY_STEP)), cluster
    )
    measured = {row["step"]: row["val_caption"] for row in read_history(artifact.uri) if "val_caption" in row}
    best = int(max(measured, key=lambda step: measured[step]))
    checkpoints = CheckpointFolder(artifact.path("checkpoints"))
    assert len(measured) == 8
    assert best < 8
    assert checkpoints.steps() == [best, 8]
    exported = best if export == "best" else 8
    assert artifact.manifest()["counts"]["exported_step"] == exported
    state, _ = checkpoints.load(exported)
    assert all(torch.equal(value, state[f"model/{name}"]) for name, value in weights_of(artifact).items())


def test_keep_best_needs_a_checkpoint_of_every_validated_step() -> None:
    recipe = tiny_recipe(keep_best={}, validate_every_steps=3)
    with pytest.raises(ConfigError, match=r"a multiple of it \(now 2 and 3\)"):
        validate(PretrainConfig, recipe, "recipe.yaml")
    with pytest.raises(ConfigError, match="keep_best needs"):
        validate(PretrainConfig, tiny_recipe(keep_best={}), "recipe.yaml")
