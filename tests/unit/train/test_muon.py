"""Muon: its matrices turn as their gradient's singular vectors say, the rest is AdamW's; resume is exact."""

import pytest
import torch
from torch import nn

from rsplatform.cluster import Cluster, TrainPlacement
from rsplatform.train.curriculum import RecipeMismatchError
from rsplatform.train.engine import FIRST_MOMENT, MUON_MOMENT, PlainEngine
from rsplatform.train.muon import hidden_matrices
from rsplatform.train.optimizer import OptimizerConfig, build_optimizers
from rsplatform.train.recipe import PretrainConfig
from tests.unit.train.tiny_dataset import tiny_recipe
from tests.unit.train.tiny_phases import CURRICULUM, assert_freezing, train_phases
from tests.unit.train.tiny_training import tiny_model

RATE, FACTOR = 1e-3, 3.0
MUON = OptimizerConfig("muon", FACTOR, weight_decay=0.0)


def engine() -> PlainEngine:
    torch.set_num_threads(1)
    return PlainEngine(tiny_model(), MUON)


@pytest.fixture(scope="module")
def whole() -> dict:
    return train_phases(engine())


def test_it_gets_the_linear_maps_between_pixels_and_embeddings() -> None:
    model = tiny_model(vision_pooling="map", tied_vocabulary=False)
    chosen = hidden_matrices(model)
    names = {name for name, parameter in model.named_parameters() if parameter in chosen}
    assert {"vision.blocks.0.attention.qkv.weight", "text.cross_blocks.0.attention.out.weight"} <= names
    assert {"image_to_text.weight", "text.projection.weight", "vision.pool.value.weight"} <= names
    others = {name for name, parameter in model.named_parameters() if parameter.ndim == 2} - names
    assert others == {
        "vision.patch_embedding.weight", "vision.pool.query_Kd", "text.token_embedding_VD", "text.position_TD",
        "text.vocabulary_VD",
    }  # fmt: skip


def test_a_first_update_is_the_gradients_directions_all_as_long() -> None:
    """Of a gradient U S V^T, U V^T in the length of AdamW's updates; five Newton-Schulz steps are rough by intent."""
    model = tiny_model()
    chosen = hidden_matrices(model)
    engine = PlainEngine(model, OptimizerConfig("muon", FACTOR, weight_decay=0.0, gradient_clip=1e9))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    engine.step(RATE)
    for name, parameter in model.named_parameters():
        moved = before[name] - parameter.detach()
        if parameter not in chosen:
            assert moved.abs().median() == pytest.approx(RATE, rel=0.01), name  # Adam's first update
            continue
        left, _, right = torch.linalg.svd(gradients[name], full_matrices=False)
        expected = RATE * FACTOR * 0.2 * max(parameter.shape) ** 0.5 * (left @ right)
        assert nn.functional.cosine_similarity(moved.flatten(), expected.flatten(), dim=0) > 0.97, name
        assert moved.norm() / expected.norm() == pytest.approx(0.9, abs=0.25), name


def test_rates_are_the_layers_times_its_own() -> None:
    adamw, muon = build_optimizers(tiny_model(), OptimizerConfig("muon", FACTOR, layer_decay=0.5))
    assert sorted({group["rate_factor"] for group in muon.param_groups}) == [0.25 * FACTOR, 0.5 * FACTOR, FACTOR]
    assert max(group["rate_factor"] for group in adamw.param_groups) == 1.0


def test_what_is_frozen_stays_bitwise_as_it_is(whole) -> None:
    assert_freezing(whole)
    tensors, _ = whole[CURRICULUM.num_steps]
    with_one, with_two = (
        {name.removeprefix(kind) for name in tensors if name.startswith(kind)} for kind in (MUON_MOMENT, FIRST_MOMENT)
    )
    assert with_one and not with_one & with_two
    assert with_one | with_two == {name for name, _ in tiny_model().named_parameters()}


@pytest.mark.parametrize("step", [1, 3, CURRICULUM.num_steps - 1])
def test_a_run_that_ended_anywhere_resumes_bitwise(whole, step: int) -> None:
    tensors, progress = whole[step]
    resume = {name: value for name, value in tensors.items() if name != "losses"}, progress
    resumed = train_phases(engine(), resume=resume)
    expected, actual = whole[CURRICULUM.num_steps][0], resumed[CURRICULUM.num_steps][0]
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_an_engine_that_keeps_flat_pieces_is_refused_before_anything_is_begun() -> None:
    recipe = PretrainConfig(**tiny_recipe(optimizer={"kind": "muon"}))
    placements = {name: TrainPlacement.model_validate({"engine": name}) for name in ("plain", "fsdp", "deepspeed")}
    with pytest.raises(RecipeMismatchError, match=r"optimizer.kind muon .* deepspeed .*engine=fsdp or plain"):
        recipe.plan_lines(Cluster(root="here", train=placements["deepspeed"]))
    for name in ("plain", "fsdp"):
        assert recipe.plan_lines(Cluster(root="here", train=placements[name])) is not None
