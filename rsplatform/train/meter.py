"""What the loop reports between two steps: mean losses, pace, the device's use. No clock of its own but its window's.

In: the values of each step. Out: one dict of metrics. Model FLOPs are those of the matrix products that the model's
definition asks for at the pictures' size, three times the forward pass; repeated work (checkpointing, micro-batches)
earns nothing. Frozen parts count as trained: a phase that freezes shows more use than its devices give.
Shapes: T tokens.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from rsplatform.model.mammut import MammutConfig


@dataclass(frozen=True)
class Devices:
    """What the pace is measured against: how many devices train, which is ours, and its peak if the place names it."""

    count: int
    own: torch.device
    peak_tflops: float | None = None


@dataclass
class Spent:
    """What something took."""

    seconds: float = 0.0


@dataclass
class Window:
    """Sums since the last report. `aside_s` is time that is no training's, `save_s` the part of it that saved."""

    started: float = field(default_factory=time.perf_counter)
    steps: int = 0
    samples_by_size: dict[int, int] = field(default_factory=dict)
    data_wait_s: float = 0.0
    aside_s: float = 0.0
    save_s: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Of all sizes, those of skipped steps as well."""
        return sum(self.samples_by_size.values())

    def add(self, parts: dict[str, float], samples: int, data_wait_s: float, image_size: int) -> None:
        """Count one step, with pictures of `image_size` pixels a side; no parts where it was skipped."""
        self.steps += bool(parts)
        self.samples_by_size[image_size] = self.samples_by_size.get(image_size, 0) + samples
        self.data_wait_s += data_wait_s
        self.parts = {name: self.parts.get(name, 0.0) + value for name, value in parts.items()} or self.parts

    @contextmanager
    def aside(self) -> Iterator[Spent]:
        """Leave the time of the block out of the pace; afterwards it stands in what is given."""
        started, spent = time.perf_counter(), Spent()
        yield spent
        spent.seconds = time.perf_counter() - started
        self.aside_s += spent.seconds

    def metrics(self, model: MammutConfig, devices: Devices) -> dict[str, float]:
        """Means per accepted step, and the pace of all."""
        seconds = max(1e-9, time.perf_counter() - self.started - self.aside_s)
        means = {name: value / self.steps for name, value in self.parts.items()}
        per_device = self.samples / seconds / devices.count
        metrics = means | {
            "samples_per_s": self.samples / seconds,
            "samples_per_s_per_device": per_device,
            "data_wait_fraction": self.data_wait_s / seconds,
        }
        if self.save_s:
            metrics["save_s"] = self.save_s
        if devices.peak_tflops is not None and "tokens_per_text" in means:
            flops = sum(
                samples * training_flops_per_sample(model, means["tokens_per_text"], image_size)
                for image_size, samples in self.samples_by_size.items()
            )
            metrics["mfu"] = flops / seconds / devices.count / (devices.peak_tflops * 1e12)
        if devices.own.type == "cuda":
            metrics["peak_memory_gb"] = torch.cuda.max_memory_allocated(devices.own) / 1e9
            torch.cuda.reset_peak_memory_stats(devices.own)
        return metrics


def training_flops_per_sample(model: MammutConfig, tokens_per_text: float, image_size: int) -> float:
    """Floating-point operations of one sample's forward and backward pass: three times the forward's.

    `image_size`: pixels of a side of its picture, which need not be the model's own.
    """
    model = replace(model, vision=replace(model.vision, image_size=image_size))
    return 3 * (_vision_flops(model) + _text_flops(model, tokens_per_text))


def num_image_tokens(model: MammutConfig) -> int:
    """Tokens of one picture that the blocks see."""
    vision = model.vision
    kept = max(1, round((vision.image_size // vision.patch_size) ** 2 * (1 - vision.patch_dropout)))
    return kept + vision.class_token


def _vision_flops(model: MammutConfig) -> float:
    vision, width = model.vision, model.vision.width
    tokens = num_image_tokens(model)
    patches = (vision.image_size // vision.patch_size) ** 2
    embedding = 2 * patches * 3 * vision.patch_size**2 * width
    block = _attention_flops(tokens, tokens, width) + 4 * tokens * width * vision.mlp_width
    pooling = 0
    if vision.pooling == "map":
        pooling = 2 * tokens * width * (width + vision.num_heads + 1) + 2 * width**2 + 4 * width * vision.mlp_width
    return embedding + vision.num_layers * block + pooling + 2 * width * model.embedding_width


def _text_flops(model: MammutConfig, tokens_per_text: float) -> float:
    """Both passes. Attention counts the mean length squared, a little less than the mean of squares."""
    text, width = model.text, model.text.width
    image_tokens = num_image_tokens(model) - model.vision.class_token + model.vision.pools_class_token
    num_cross = len(range(0, text.num_layers, text.cross_attention_every))
    num_mlps = text.num_layers if text.self_mlp_before_cross else text.num_layers - num_cross

    def blocks(tokens: float) -> float:
        attention = text.num_layers * _attention_flops(tokens, tokens, width)
        return attention + num_mlps * 4 * tokens * width * text.mlp_width

    pooled = text.context_length if text.pooling == "mean_all" else tokens_per_text
    targets = max(0.0, tokens_per_text - 1)
    cross = _attention_flops(targets, image_tokens, width) + text.cross_mlp * 4 * targets * width * text.mlp_width
    projection = 2 * width * model.embedding_width if text.projection else 0
    to_text = 2 * image_tokens * model.vision.width * width
    vocabulary = 2 * targets * width * text.vocab_size
    return blocks(pooled) + blocks(targets) + num_cross * cross + projection + to_text + vocabulary


def _attention_flops(queries: float, keys: float, width: int) -> float:
    """Projections of queries, keys, values and output, and the two products; a causal mask counts as the whole."""
    return 4 * queries * width**2 + 4 * keys * width**2 + 4 * queries * keys * width
