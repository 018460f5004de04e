"""Phases: what is frozen stays bitwise as it is, moments included; pictures have the phase's size; resume is exact."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from rsplatform.config import ConfigError, validate
from rsplatform.model.resolution import with_image_size
from rsplatform.train.curriculum import RecipeMismatchError
from rsplatform.train.engine import UPDATES, PlainEngine
from rsplatform.train.freezing import PARTS, covers_all, is_in_parts
from rsplatform.train.loader import LoaderPhase
from rsplatform.train.optimizer import OptimizerConfig
from rsplatform.train.recipe import PretrainConfig
from tests.unit.train.tiny_dataset import tiny_recipe
from tests.unit.train.tiny_phases import CURRICULUM, assert_freezing, train_phases
from tests.unit.train.tiny_training import TinyStore, tiny_loader, tiny_model


def engine() -> PlainEngine:
    torch.set_num_threads(1)
    return PlainEngine(tiny_model(), OptimizerConfig())


@pytest.fixture(scope="module")
def whole() -> dict:
    return train_phases(engine())


def test_what_is_frozen_stays_bitwise_as_it_is(whole) -> None:
    assert_freezing(whole)


def test_a_part_that_was_frozen_goes_on_where_its_own_moments_stopped(whole) -> None:
    last, _ = whole[CURRICULUM.num_steps]
    updates = {name: float(last.get(UPDATES + name, last["num_steps"])) for name, _ in tiny_model().named_parameters()}
    assert updates["vision.blocks.0.mlp.expand.weight"] == 4
    assert updates["vision.projection.weight"] == 6
    assert updates["text.token_embedding_VD"] == 4
    assert updates["log_logit_scale"] == 6
    first, _ = whole[3]  # the tower's first update ever: Adam's is as long as the learning rate, whatever came before
    moved = first["model/vision.projection.weight"] - whole[2][0]["model/vision.projection.weight"]
    assert moved.abs().median() == pytest.approx(1e-3, rel=0.05)


@pytest.mark.parametrize("step", range(1, CURRICULUM.num_steps))
def test_a_run_that_ended_anywhere_resumes_bitwise(whole, step: int) -> None:
    tensors, progress = whole[step]
    resume = {name: value for name, value in tensors.items() if name != "losses"}, progress
    resumed = train_phases(engine(), resume=resume)
    for later in range(step + 1, CURRICULUM.num_steps + 1):
        expected, actual = whole[later][0], resumed[later][0]
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_pictures_have_the_size_of_their_phase_and_the_cache_changes_no_pixel() -> None:
    phases = (LoaderPhase(2, 8), LoaderPhase(2, 24), LoaderPhase(1, 16))
    stores = TinyStore(), TinyStore()
    cached = tiny_loader(store=stores[0], phases=phases)
    fresh = tiny_loader(store=stores[1], phases=phases, cache_gb=0.0)
    with ThreadPoolExecutor(2) as threads:
        for step, size in enumerate([8, 8, 24, 24, 16, 16, 16]):
            images = [loader.batch(step, threads).images_BHWC for loader in (cached, fresh)]
            assert images[0].shape[1:] == (size, size, 3)
            assert torch.equal(*images)
    assert stores[0].num_reads == len(stores[0].ids) < stores[1].num_reads
    assert {len(decoded.square.pixels_HWC) for decoded in cached._cache.values()} == {30}  # 1.25 × the largest


@torch.no_grad()
def test_a_model_of_another_size_gives_the_same_at_that_size() -> None:
    model = tiny_model(vision_pooling="map").eval()
    images_BCHW = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 3, 24, 24)).astype(np.float32))
    larger = with_image_size(model, 24)
    assert larger.config.vision.image_size == 24
    assert larger.vision.position_HWD.shape[:2] == (6, 6)
    assert torch.equal(larger.encode_image(images_BCHW), model.encode_image(images_BCHW))
    assert with_image_size(model, 16) is model
    with pytest.raises(ValueError, match="not a multiple of patch_size"):
        with_image_size(model, 18)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"freeze": ["visoin"]}, "did you mean 'vision'"),
        ({"freeze": ["vision", "text", "image_to_text", "logit_scale"]}, "names the whole model"),
        ({"image_size": 18}, "18 is not a multiple of patch_size 4"),
        ({"imag_size": 16}, "did you mean 'image_size'"),
    ],
)
def test_phases_that_cannot_be_are_refused_at_load(change: dict, words: str) -> None:
    phase = {"name": "a", "steps": 2, "schedule": {"learning_rate": 1e-3}} | change
    with pytest.raises(ConfigError, match=words):
        validate(PretrainConfig, tiny_recipe(phases=[phase]), "recipe.yaml")


def test_every_parameter_belongs_to_a_part() -> None:
    model = tiny_model(
        vision_pooling="map",
        class_token=True,
        input_norm=True,
        cross_mlp=True,
        tied_vocabulary=False,
        logit_bias=True,
        ground_sample_distance_encoding=True,
        ground_sample_distance_positions=True,
    )
    names = [name for name, _ in model.named_parameters()]
    for parts in (
        ["vision", "text", "image_to_text"],
        ["vision_trunk", "vision_pooling", "text", "logit_scale"],
        PARTS,
    ):
        assert covers_all(parts) == all(is_in_parts(name, parts) for name in names)
    assert covers_all(["vision_trunk", "vision_pooling", "text", "logit_scale", "image_to_text"])
    for part, prefixes in PARTS.items():
        assert all(any(name.startswith(prefix) for name in names) for prefix in prefixes), part
    halves = [*PARTS["vision_trunk"], *PARTS["vision_pooling"]]
    assert all(name.startswith(tuple(halves)) for name in names if name.startswith("vision."))


def test_a_size_that_does_not_fit_a_continued_model_is_named() -> None:
    config = tiny_model(patch_size=8).config
    with pytest.raises(RecipeMismatchError, match="image_size 20 is not a multiple of patch_size 8"):
        CURRICULUM.image_sizes(config)
