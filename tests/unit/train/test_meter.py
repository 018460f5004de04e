"""FLOPs against a counter of the model's own matrix products; the pace and use of devices against plain arithmetic."""

import time

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rsplatform.train.engine import PlainEngine
from rsplatform.train.loader import LoaderPhase
from rsplatform.train.meter import Devices, Window, training_flops_per_sample
from rsplatform.train.optimizer import OptimizerConfig
from rsplatform.train.pretrain import Hooks, LoopConfig, fit
from tests.unit.train.tiny_training import IMAGE_SIZE, tiny_loader, tiny_model

NUM_TOKENS, NUM_SAMPLES = 12, 3
SHAPES = [
    {"vision_pooling": "map", "text_num_layers": 5, "vision_num_layers": 3},
    {"self_mlp_before_cross": False, "cross_mlp": True, "class_token": True, "patch_dropout": 0.4},
    {"text_pooling": "mean_all", "projection": False, "tied_vocabulary": False, "text_width": 64},
]


@pytest.mark.parametrize("image_size", [IMAGE_SIZE, 24])
@pytest.mark.parametrize("shape", SHAPES)
def test_flops_are_those_of_the_models_matrix_products(shape: dict, image_size: int) -> None:
    model = tiny_model(**shape)
    tokens_BT = torch.randint(3, 300, (NUM_SAMPLES, NUM_TOKENS))
    # written out: the counter does not know the CPU's fused attention
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(NUM_SAMPLES, 3, image_size, image_size), tokens_BT)
    expected = 3 * counter.get_total_flops() / NUM_SAMPLES
    assert training_flops_per_sample(model.config, NUM_TOKENS, image_size) == pytest.approx(expected, rel=1e-3)


def test_paces_means_and_use_of_the_devices() -> None:
    model = tiny_model().config
    window = Window(started=time.perf_counter() - 2.0)
    window.add({"loss": 3.0, "tokens_per_text": 10.0}, 40, 0.2, IMAGE_SIZE)
    window.add({}, 40, 0.2, IMAGE_SIZE)  # a skipped step
    window.add({"loss": 1.0, "tokens_per_text": 14.0}, 40, 0.2, IMAGE_SIZE)
    metrics = window.metrics(model, Devices(4, torch.device("cpu"), peak_tflops=0.5))
    flops = training_flops_per_sample(model, 12.0, IMAGE_SIZE)
    expected = {
        "loss": 2.0,
        "tokens_per_text": 12.0,
        "samples_per_s": 60.0,
        "samples_per_s_per_device": 15.0,
        "data_wait_fraction": 0.3,
        "mfu": 15.0 * flops / 0.5e12,
    }
    assert metrics == pytest.approx(expected, rel=0.2)
    assert "mfu" not in window.metrics(model, Devices(4, torch.device("cpu")))


def test_what_is_set_aside_is_no_training() -> None:
    window = Window(started=time.perf_counter() - 2.0)
    window.add({"loss": 3.0}, 40, 0.0, IMAGE_SIZE)
    window.aside_s, window.save_s = 1.0, 0.25
    with window.aside() as spent:
        time.sleep(0.01)
    assert spent.seconds >= 0.01
    assert window.aside_s == 1.0 + spent.seconds
    metrics = window.metrics(tiny_model().config, Devices(1, torch.device("cpu")))
    assert metrics["samples_per_s"] == pytest.approx(40.0, rel=0.2)
    assert metrics["save_s"] == 0.25


def test_a_window_of_skipped_steps_has_a_pace_only() -> None:
    window = Window()
    window.add({}, 8, 0.0, IMAGE_SIZE)
    metrics = window.metrics(tiny_model().config, Devices(1, torch.device("cpu"), peak_tflops=1.0))
    assert metrics.keys() == {"samples_per_s", "samples_per_s_per_device", "data_wait_fraction"}


def test_a_phase_of_another_size_counts_the_pictures_that_it_sees() -> None:
    """Reports after 2 and 4 steps of a loop that changes size after 1 and 3: a mixed window each."""
    reports, model = [], tiny_model()
    phases = (LoaderPhase(1, 8), LoaderPhase(2, IMAGE_SIZE), LoaderPhase(1, 24))
    hooks = Hooks(lambda metrics, step: reports.append(metrics), lambda tensors, progress: None)
    config = LoopConfig(4, report_every_steps=2, peak_tflops=0.5)
    engine = PlainEngine(model, OptimizerConfig())
    fit(engine, tiny_loader(phases=phases).batches, lambda step: 1e-3, config, hooks)
    for metrics, sizes in zip(reports, ((8, IMAGE_SIZE), (IMAGE_SIZE, 24)), strict=True):
        counted = [training_flops_per_sample(model.config, metrics["tokens_per_text"], size) for size in sizes]
        found = metrics["mfu"] * 0.5e12 / metrics["samples_per_s_per_device"]
        assert found == pytest.approx(sum(counted) / 2)


def test_frozen_parts_count_as_trained() -> None:
    reports, model = [], tiny_model()
    hooks = Hooks(
        lambda metrics, step: reports.append(metrics),
        lambda tensors, progress: None,
        frozen_parts=lambda step: ("vision",) if step else (),
    )
    config = LoopConfig(2, report_every_steps=1, peak_tflops=0.5)
    fit(PlainEngine(model, OptimizerConfig()), tiny_loader().batches, lambda step: 1e-3, config, hooks)
    for metrics in reports:
        flops = training_flops_per_sample(model.config, metrics["tokens_per_text"], IMAGE_SIZE)
        assert metrics["mfu"] * 0.5e12 / metrics["samples_per_s_per_device"] == pytest.approx(flops)
