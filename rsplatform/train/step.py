"""One step's loss and gradients over a global batch, at once or in micro-batches of any size: the same numbers.

In: an engine, this process's batch, what to compute. Out: the parts of the loss, and a call that makes the gradients;
in between the caller may still leave the step out. Does not update weights.

Micro-batches (GradCache, arXiv 2101.06983; its union with the caption loss is ours): every one is run
without a graph first, the loss and its gradient with respect to the model's outputs are those of the whole batch over
all processes, and a second run of each micro-batch carries that gradient on into the weights. Memory is that of one
micro-batch; the price is one more forward pass. The loss may be any function of the outputs that MammutOutput names.
Shapes: B batch, C channels, H W pixels, T tokens, E embedding.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rsplatform.model.draws import sample_keys
from rsplatform.model.losses import LossConfig, mammut_loss
from rsplatform.model.mammut import Mammut, MammutOutput
from rsplatform.model.normalise import normalise
from rsplatform.model.vocabulary_loss import PAD_ID
from rsplatform.train.batch import Batch
from rsplatform.train.engine import Engine

# (model, step) -> (loss, detached parts): added to MaMMUT's loss.
AuxiliaryLoss = Callable[[Mammut, int], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class StepConfig:
    """What a step computes. `micro_batch_size`: samples of one process that are in memory at once; None: all."""

    loss: LossConfig = field(default_factory=LossConfig)
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    micro_batch_size: int | None = None


class PreparedStep(NamedTuple):
    """The detached parts of the loss, and what adds its gradients to the engine's."""

    parts: dict[str, Tensor]
    make_gradients: Callable[[], None]


def prepare_step(
    engine: Engine, batch: Batch, step: int, config: StepConfig, auxiliary_loss: AuxiliaryLoss | None = None
) -> PreparedStep:
    """The loss of the global batch, ready to be differentiated. Collective: all processes have batches of one size.

    Raises:
        ValueError: an auxiliary loss, which runs on a whole batch, with micro-batches.
    """
    if config.micro_batch_size is not None and auxiliary_loss:
        raise ValueError("an auxiliary loss runs on the whole batch: leave micro_batch_size out")
    if config.micro_batch_size is not None and config.micro_batch_size < len(batch.tokens_BT):
        prepared = _prepare_micro_batches(engine, batch, step, config, config.micro_batch_size)
    else:
        prepared = _prepare_whole(engine, batch, step, config, auxiliary_loss)
    lengths_B = (batch.tokens_BT != PAD_ID).sum(1)
    return prepared._replace(parts=prepared.parts | {"tokens_per_text": lengths_B.double().mean().to(engine.device)})


def forward_backward(engine: Engine, batch: Batch, step: int, config: StepConfig) -> dict[str, Tensor]:
    """Loss and gradients of one batch; returns the detached parts of the loss."""
    prepared = prepare_step(engine, batch, step, config)
    prepared.make_gradients()
    return prepared.parts


def forward_micro_batch(engine: Engine, piece: Batch, step: int, config: StepConfig) -> MammutOutput:
    """Both passes over some samples of a step.

    What is drawn for a sample is a function of (seed, step, place in the global batch) and of nothing else: no state
    needs saving, a second run drops the same patches, and so does one in other pieces or on other processes.
    """
    vision = engine.model.config.vision
    tokens_BT = piece.tokens_BT.to(engine.device)
    images_BCHW = normalise(piece.images_BHWC.to(engine.device), vision.pixel_mean, vision.pixel_std)
    is_bfloat16 = config.precision == "bfloat16"
    with torch.autocast(engine.device.type, dtype=torch.bfloat16, enabled=is_bfloat16):
        distance_m_B = piece.distances_on(engine.device)
        keys_B = sample_keys(config.seed, step, piece.places_B.to(engine.device))
        return engine.forward(images_BCHW, tokens_BT, distance_m_B, config.loss.z_loss_weight, keys_B)


# What the loss reads of the model's outputs and sends gradients to: rows of samples, numbers of the whole batch that
# every micro-batch gives alike, and a sum over samples.
_ROWS, _SHARED, _SUMMED = (
    ("image_embeddings_BE", "text_embeddings_BE"),
    ("logit_scale", "logit_bias"),
    "caption_loss_sum",
)


def _prepare_whole(
    engine: Engine, batch: Batch, step: int, config: StepConfig, auxiliary_loss: AuxiliaryLoss | None
) -> PreparedStep:
    output = forward_micro_batch(engine, batch, step, config)
    loss, parts = mammut_loss(output, batch.tokens_BT.to(engine.device), config.loss, engine.gather)
    if auxiliary_loss:
        extra, extra_parts = auxiliary_loss(engine.model, step)
        loss = loss + extra
        parts = parts | extra_parts | {"loss": loss.detach()}
    return PreparedStep(parts, lambda: engine.backward(loss))


def _prepare_micro_batches(engine: Engine, batch: Batch, step: int, config: StepConfig, size: int) -> PreparedStep:
    batch = batch.by_length()
    pieces = _pieces(batch, size)
    whole = outputs_without_graph(engine, batch, step, config)
    for name in (*_ROWS, *_SHARED, _SUMMED):
        leaf = getattr(whole, name)
        if leaf is not None:
            leaf.requires_grad_()
    loss, parts = mammut_loss(whole, batch.tokens_BT.to(engine.device), config.loss, engine.gather)
    names = [name for name in (*_ROWS, *_SHARED, _SUMMED) if getattr(whole, name) is not None]
    leaves = [getattr(whole, name) for name in names]
    gradients = dict(
        zip(names, torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True), strict=True)
    )

    def make_gradients() -> None:
        for index, piece in enumerate(pieces):
            output = forward_micro_batch(engine, piece, step, config)
            rows = slice(index * size, (index + 1) * size)
            carried = output.caption_loss_sum * gradients[_SUMMED]
            for name in _ROWS:
                carried = carried + (getattr(output, name) * gradients[name][rows]).sum()
            for name in (name for name in _SHARED if name in names):
                # each piece carries its share, so that every backward meets every weight
                carried = carried + getattr(output, name) * gradients[name] / len(pieces)
            engine.backward(carried, is_last=index == len(pieces) - 1)

    return PreparedStep(parts, make_gradients)


def _pieces(batch: Batch, size: int | None) -> list[Batch]:
    size = size or len(batch.tokens_BT)
    return [batch.rows(start, start + size) for start in range(0, len(batch.tokens_BT), size)]


@torch.no_grad()
def outputs_without_graph(engine: Engine, batch: Batch, step: int, config: StepConfig) -> MammutOutput:
    """The outputs of this process's batch, run in micro-batches, as the loss reads them; hidden states are not kept."""
    outputs = []
    for piece in _pieces(batch, config.micro_batch_size):
        output = forward_micro_batch(engine, piece, step, config)
        outputs.append(output._replace(caption_hidden_BTD=output.caption_hidden_BTD.new_empty(0)))
    first = outputs[0]
    return first._replace(
        image_embeddings_BE=torch.cat([output.image_embeddings_BE for output in outputs]),
        text_embeddings_BE=torch.cat([output.text_embeddings_BE for output in outputs]),
        logit_scale=first.logit_scale.clone(),
        logit_bias=None if first.logit_bias is None else first.logit_bias.clone(),
        caption_loss_sum=torch.stack([output.caption_loss_sum for output in outputs]).sum(),
        caption_token_count=torch.stack([output.caption_token_count for output in outputs]).sum(),
        caption_z_loss_sum=_total([output.caption_z_loss_sum for output in outputs]),
    )


def _total(sums: list[Tensor | None]) -> Tensor | None:
    known = [value for value in sums if value is not None]
    return torch.stack(known).sum() if known else None
