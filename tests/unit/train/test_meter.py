"""FLOPs against a counter of the model's own matrix products; the pace and use of devices against plain arithmetic."""

import time

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rsplatform.train.meter import Devices, Window, training_flops_per_sample
from tests.unit.train.tiny_training import tiny_model

NUM_TOKENS, NUM_SAMPLES = 12, 3
SHAPES = [
    {"vision_pooling": "map", "text_num_layers": 5, "vision_num_layers": 3},
    {"self_mlp_before_cross": False, "cross_mlp": True, "class_token": True, "patch_dropout": 0.4},
    {"text_pooling": "mean_all", "projection": False, "tied_vocabulary": False, "text_width": 64},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_flops_are_those_of_the_models_matrix_products(shape: dict) -> None:
    model = tiny_model(**shape)
    tokens_BT = torch.randint(3, 300, (NUM_SAMPLES, NUM_TOKENS))
    # written out: the counter does not know the CPU's fused attention
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(NUM_SAMPLES, 3, 16, 16), tokens_BT)
    expected = 3 * counter.get_total_flops() / NUM_SAMPLES
    assert training_flops_per_sample(model.config, NUM_TOKENS) == pytest.approx(expected, rel=1e-3)


def test_paces_means_and_use_of_the_devices() -> None:
    model = tiny_model().config
    window = Window(started=time.perf_counter() - 2.0)
    window.add({"loss": 3.0, "tokens_per_text": 10.0}, 40, 0.2)
    window.add({}, 40, 0.2)  # a skipped step
    window.add({"loss": 1.0, "tokens_per_text": 14.0}, 40, 0.2)
    metrics = window.metrics(model, Devices(4, torch.device("cpu"), peak_tflops=0.5))
    flops = training_flops_per_sample(model, 12.0)
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


def test_a_window_of_skipped_steps_has_a_pace_only() -> None:
    window = Window()
    window.add({}, 8, 0.0)
    metrics = window.metrics(tiny_model().config, Devices(1, torch.device("cpu"), peak_tflops=1.0))
    assert metrics.keys() == {"samples_per_s", "samples_per_s_per_device", "data_wait_fraction"}
