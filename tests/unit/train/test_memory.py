"""The memory model against real bytes of real steps on the CPU, and the micro-batch that it chooses."""

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch

from rsplatform.cluster import GPUS, TrainPlacement
from rsplatform.config import ConfigError, validate
from rsplatform.model.losses import LossConfig, mammut_loss
from rsplatform.model.mammut import Mammut, MammutConfig, MammutOutput, mammut_config
from rsplatform.train.batch import Batch
from rsplatform.train.blocks import BlockConfig, prepare_blocks
from rsplatform.train.curriculum import RecipeMismatchError
from rsplatform.train.engine import PlainEngine
from rsplatform.train.memory import (
    SampleShape,
    WorkerStep,
    contrastive_bytes,
    held_bytes,
    kept_bytes_per_sample,
    needed_bytes,
)
from rsplatform.train.micro_batch import fitting_micro_batch_size, largest_micro_batch_size, usable_bytes
from rsplatform.train.optimizer import OptimizerConfig
from rsplatform.train.recipe import PretrainConfig
from rsplatform.train.step import StepConfig, prepare_step
from rsplatform.train.traffic import Layout, model_numbers, state_bytes
from tests.unit.train.live_bytes import LiveBytes
from tests.unit.train.tiny_dataset import tiny_recipe

NUM_TOKENS, IMAGE_SIZE = 12, 32
SIZES: dict[str, Any] = {"vision_num_layers": 2, "text_num_layers": 3, "image_size": IMAGE_SIZE} | {
    "context_length": 16,
    "vocab_size": 300,
}
SHAPES: list[dict[str, Any]] = [
    {},
    {"vision_pooling": "map", "text_width": 64},
    {"vision_pooling": "mean_all", "class_token": True, "input_norm": True, "text_pooling": "mean_all"}
    | {"cross_mlp": True, "projection": False, "tied_vocabulary": False},
    {"cropped_positions": True, "patch_dropout": 0.5, "self_mlp_before_cross": False},
    {"ground_sample_distance_encoding": True, "ground_sample_distance_positions": True},
]
Precision = Literal["float32", "bfloat16"]


def make_batch(model: MammutConfig, num_samples: int) -> Batch:
    size = model.vision.image_size
    images_BHWC = torch.randint(0, 256, (num_samples, size, size, 3), dtype=torch.uint8)
    tokens_BT = torch.randint(3, model.text.vocab_size, (num_samples, NUM_TOKENS))
    return Batch(images_BHWC, tokens_BT, tuple(map(str, range(num_samples))), torch.arange(num_samples))


def make_model(config: MammutConfig, every: int | None) -> Mammut:
    torch.manual_seed(0)
    model = Mammut(config).train()
    prepare_blocks(model, BlockConfig(every))
    return model


def kept_bytes(model: Mammut, num_samples: int, precision: Precision) -> int:
    """What is alive after a forward pass: all that waits for the backward pass, and the outputs."""
    images_BCHW = torch.randn(num_samples, 3, IMAGE_SIZE, IMAGE_SIZE)
    tokens_BT = make_batch(model.config, num_samples).tokens_BT
    with LiveBytes([images_BCHW, tokens_BT, *model.parameters()]) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            output = model(images_BCHW, tokens_BT)
        assert output.caption_loss_sum.requires_grad
        return live.now()


@pytest.mark.parametrize(
    ("shape", "every", "precision"),
    [
        *((shape, every, precision) for shape in SHAPES for every, precision in ((None, "float32"), (1, "bfloat16"))),
        ({}, 2, "float32"),
        ({}, None, "bfloat16"),
    ],
)
def test_a_sample_keeps_the_bytes_that_a_real_forward_pass_keeps(
    shape: dict, every: int | None, precision: Precision
) -> None:
    config = mammut_config("mini", **(SIZES | shape))
    model = make_model(config, every)
    measured = (kept_bytes(model, 4, precision) - kept_bytes(model, 2, precision)) / 2
    expected = kept_bytes_per_sample(SampleShape(config, IMAGE_SIZE, NUM_TOKENS, precision, every, "cpu"))
    assert expected == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("precision", "every", "micro_batch_size"),
    [("float32", None, 16), ("float32", None, 4), ("bfloat16", None, 4), ("float32", 1, 4), ("bfloat16", 1, 4)],
)
def test_a_step_stays_below_the_memory_that_is_reckoned_with(
    precision: Precision, every: int | None, micro_batch_size: int
) -> None:
    """Beside the moments, which a first step does not have yet; and not far below where a batch is split."""
    config = mammut_config("mini", **SIZES)
    engine = PlainEngine(make_model(config, every), OptimizerConfig())
    batch = make_batch(config, 16)
    with LiveBytes([batch.images_BHWC, batch.tokens_BT, *engine.model.parameters()]) as live:
        step = StepConfig(precision=precision, micro_batch_size=micro_batch_size)
        prepare_step(engine, batch, 0, step).make_gradients()
    numbers = model_numbers(config)
    shape = SampleShape(config, IMAGE_SIZE, NUM_TOKENS, precision, every, "cpu")
    reckoned = needed_bytes(WorkerStep(shape, Layout("plain", 1), numbers, 16), micro_batch_size) - 12 * numbers.total
    assert live.peak <= reckoned
    if micro_batch_size < 16:  # a whole batch frees what it kept before all gradients are there
        assert live.peak > 0.65 * reckoned


@pytest.mark.parametrize("contrastive", ["softmax", "focal_sigmoid", "sigmoid"])
def test_the_loss_over_many_pairs_is_reckoned_with(contrastive) -> None:
    num_samples, width = 128, 16
    images_BE, texts_BE = (torch.randn(num_samples, width, requires_grad=True) for _ in range(2))
    scale, bias, caption = (torch.tensor(value, requires_grad=True) for value in (10.0, -10.0, 1.0))
    is_sigmoid = contrastive == "sigmoid"
    output = MammutOutput(
        images_BE, texts_BE, torch.empty(0), scale, caption, torch.tensor(1.0), bias if is_sigmoid else None
    )
    tokens_BT = torch.randint(1, 9, (num_samples, 6))
    with LiveBytes([images_BE, texts_BE, scale, bias, caption, tokens_BT]) as live:
        loss, _ = mammut_loss(output, tokens_BT, LossConfig(contrastive))
        torch.autograd.grad(loss, [images_BE, texts_BE])
    config = mammut_config("mini", **SIZES, embedding_width=width)
    shape = SampleShape(config, IMAGE_SIZE, NUM_TOKENS)
    worker = WorkerStep(shape, Layout("plain", 1), model_numbers(config), num_samples, contrastive)
    assert 0.8 * contrastive_bytes(worker) < live.peak <= contrastive_bytes(worker)


def paper_step(**changes) -> WorkerStep:
    model = mammut_config("so400m")
    return WorkerStep(SampleShape(model, 224, 77, "bfloat16"), Layout("plain", 4), model_numbers(model), 256, **changes)


def test_the_largest_divisor_that_fits_is_taken() -> None:
    worker = replace(paper_step(), batch_size=96)
    sizes = {gpu: largest_micro_batch_size(worker, GPUS[gpu].memory_gb) for gpu in GPUS}
    for gpu, size in sizes.items():
        room = usable_bytes(GPUS[gpu].memory_gb)
        if size is not None:
            assert 96 % size == 0 and needed_bytes(worker, size) <= room
        larger = [other for other in range((size or 0) + 1, 97) if 96 % other == 0]
        assert all(needed_bytes(worker, other) > room for other in larger)
    assert sizes["B200"] == 96 > (sizes["L40S"] or 0) >= 1


def test_what_is_sharded_or_recomputed_makes_room() -> None:
    plain = paper_step()
    recomputing = replace(plain, shape=replace(plain.shape, recompute_every_blocks=1))
    half = replace(plain, shape=replace(plain.shape, recompute_every_blocks=2))
    assert needed_bytes(recomputing, 64) < needed_bytes(half, 64) < needed_bytes(plain, 64)
    held = [held_bytes(replace(plain, layout=Layout(engine, 64)), is_split=True) for engine in ("plain", "zero1")]
    assert held == sorted(held, reverse=True)
    whole, split = (held_bytes(replace(plain, layout=Layout("fsdp", 64)), is_split=flag) for flag in (False, True))
    waiting = plain.numbers.text_blocks  # gradients of the contrastive pass
    assert split - whole == pytest.approx(4 * (plain.numbers.total * 63 / 64 + waiting))
    averaging = held_bytes(replace(plain, keeps_average=True), is_split=False)
    assert averaging - held_bytes(plain, is_split=False) == 4 * plain.numbers.total
    sharded = replace(plain, layout=Layout("fsdp", 64))
    averaging = held_bytes(replace(sharded, keeps_average=True), is_split=False)
    assert averaging - held_bytes(sharded, is_split=False) == pytest.approx(4 * plain.numbers.total / 64)
    assert held_bytes(plain, is_split=False) == state_bytes(Layout("plain", 4), plain.numbers, autocasts=True)


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    with pytest.raises(RecipeMismatchError, match=r"cluster\.train\.engine=fsdp \(micro_batch_size \d+\)"):
        fitting_micro_batch_size(replace(paper_step(), layout=Layout("plain", 64)), 15)
    with pytest.raises(RecipeMismatchError, match="take cards with more memory"):
        fitting_micro_batch_size(replace(paper_step(), layout=Layout("plain", 1)), 8)
    averaging = replace(paper_step(keeps_average=True), layout=Layout("plain", 64))
    with pytest.raises(RecipeMismatchError, match=r"engine=fsdp \("):
        fitting_micro_batch_size(averaging, 15)


def test_a_recipe_takes_the_card_of_its_place_and_its_own_number_first() -> None:
    recipe = PretrainConfig(**tiny_recipe())
    model = recipe.architecture("unused")
    chosen = [
        PretrainConfig(**tiny_recipe(**changes)).chosen_micro_batch_size(model, placement, 1)
        for changes, placement in (
            ({}, TrainPlacement()),
            ({}, TrainPlacement(gpu="L4")),  # on the CPU
            ({}, TrainPlacement(gpu="L4", gpus_per_worker=1)),
            ({}, TrainPlacement(gpu_memory_gb=1.1131, gpus_per_worker=1)),
            ({"micro_batch_size": 3}, TrainPlacement(gpu="L4", gpus_per_worker=1)),
        )
    ]
    assert chosen == [None, None, 8, 4, 3]
    large = PretrainConfig(**tiny_recipe(micro_batch_size=8))
    assert large.chosen_micro_batch_size(model, TrainPlacement(gpu_memory_gb=1.1131), 1) == 8, "on the CPU"
    with pytest.raises(RecipeMismatchError, match=r"^micro_batch_size 8 of the recipe needs .* takes 4 here"):
        large.chosen_micro_batch_size(model, TrainPlacement(gpu_memory_gb=1.1131, gpus_per_worker=1), 1)


def test_a_card_is_known_or_described() -> None:
    with pytest.raises(ConfigError, match=r"gpu: .*known are A10G, L4, L40S.*gpu_memory_gb"):
        validate(TrainPlacement, {"gpu": "L40"}, "cluster.yaml")
    card = TrainPlacement(gpu="L40S", gpus_per_worker=1)
    assert (card.worker_memory_gb, card.peak_tflops_in("bfloat16"), card.peak_tflops_in("float32")) == (48, 362, None)
    own = TrainPlacement(gpu="L40S", gpu_memory_gb=40, peak_tflops=300, gpus_per_worker=0.5)
    assert (own.worker_memory_gb, own.peak_tflops_in("bfloat16"), own.peak_tflops_in("float32")) == (20, 300, 300)
    assert TrainPlacement(gpu="L40S").worker_memory_gb is None
