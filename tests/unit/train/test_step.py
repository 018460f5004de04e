"""Micro-batches against the slow obvious version: all pieces in one graph, the loss of their outputs, one backward."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from rsplatform.model.losses import LossConfig, mammut_loss
from rsplatform.model.mammut import Mammut
from rsplatform.train.batch import Batch
from rsplatform.train.engine import PlainEngine
from rsplatform.train.optimizer import OptimizerConfig
from rsplatform.train.step import StepConfig, forward_backward, forward_micro_batch, prepare_step
from tests.unit.train.tiny_training import tiny_model

NUM_SAMPLES = 7
LOSSES = (
    LossConfig(),
    LossConfig("focal_sigmoid", caption_weight=2.0),
    LossConfig("sigmoid", z_loss_weight=1e-2),
)


def make_engine(**overrides) -> PlainEngine:
    """In float64, and drawing at random in both ways that the model knows."""
    model = tiny_model(**({"patch_dropout": 0.4, "cropped_positions": True} | overrides)).double()
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(), *inputs[1:]))
    return PlainEngine(model, OptimizerConfig())


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(3, 300, (NUM_SAMPLES, 12), generator=generator)
    for row in range(NUM_SAMPLES):
        tokens_BT[row, 3 + row :] = 0
    tokens_BT[5] = tokens_BT[1]
    images_BHWC = torch.randint(0, 256, (NUM_SAMPLES, 16, 16, 3), dtype=torch.uint8, generator=generator)
    return Batch(images_BHWC, tokens_BT, tuple(str(row) for row in range(NUM_SAMPLES)), torch.arange(NUM_SAMPLES))


def gradients(model: Mammut) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def obvious_loss(engine: PlainEngine, config: StepConfig, size: int) -> torch.Tensor:
    batch = make_batch().by_length()
    pieces = [batch.rows(start, start + size) for start in range(0, NUM_SAMPLES, size)]
    outputs = [forward_micro_batch(engine, piece, 4, config) for piece in pieces]
    z_losses = [output.caption_z_loss_sum for output in outputs if output.caption_z_loss_sum is not None]
    whole = outputs[0]._replace(
        image_embeddings_BE=torch.cat([output.image_embeddings_BE for output in outputs]),
        text_embeddings_BE=torch.cat([output.text_embeddings_BE for output in outputs]),
        caption_loss_sum=torch.stack([output.caption_loss_sum for output in outputs]).sum(),
        caption_token_count=torch.stack([output.caption_token_count for output in outputs]).sum(),
        caption_z_loss_sum=torch.stack(z_losses).sum() if z_losses else None,
    )
    return mammut_loss(whole, batch.tokens_BT, config.loss)[0]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.contrastive)
@pytest.mark.parametrize("size", [2, 6])
def test_micro_batches_make_the_gradients_of_one_graph(loss: LossConfig, size: int) -> None:
    config = StepConfig(loss, seed=2, micro_batch_size=size)
    slow, fast = (make_engine(logit_bias=loss.contrastive == "sigmoid") for _ in range(2))
    expected = obvious_loss(slow, config, size)
    expected.backward()
    parts = forward_backward(fast, make_batch(), 4, config)
    torch.testing.assert_close(parts["loss"], expected.detach(), atol=1e-12, rtol=1e-12)
    assert float(parts["tokens_per_text"]) == pytest.approx(int((make_batch().tokens_BT > 0).sum()) / NUM_SAMPLES)
    torch.testing.assert_close(gradients(fast.model), gradients(slow.model), atol=1e-10, rtol=1e-10)


def test_no_more_than_one_micro_batch_is_in_memory_with_its_graph() -> None:
    """What backward needs is kept for the embeddings' loss and one micro-batch, however large the batch is."""
    sizes = []
    for size in (NUM_SAMPLES, 1):
        engine, kept = make_engine(patch_dropout=0.0), []

        def keep(tensor: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept.append(tensor.numel())
            return tensor

        original = engine.backward

        def backward(loss, *, is_last=True, kept=kept, original=original) -> None:
            original(loss, is_last=is_last)
            sizes.append(sum(kept))
            kept.clear()

        engine.backward = backward
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            forward_backward(engine, make_batch(), 0, StepConfig(micro_batch_size=size))
    whole, *pieces = sizes
    assert len(pieces) == NUM_SAMPLES
    weights = sum(parameter.numel() for parameter in make_engine().model.parameters())
    assert max(pieces) - weights < (whole - weights) / 3


@torch.no_grad()
def test_what_is_drawn_for_a_sample_is_a_function_of_seed_step_and_place_alone() -> None:
    """Neither of the samples beside it, nor of the process: a share of the batch, in any order, draws as the batch."""
    engine, config = make_engine(), StepConfig()

    def embed(batch: Batch, step: int = 0, config: StepConfig = config) -> torch.Tensor:
        return forward_micro_batch(engine, batch, step, config).image_embeddings_BE

    batch = make_batch()
    whole_BE, again_BE = embed(batch), embed(batch)
    assert torch.equal(whole_BE, again_BE)
    backwards = torch.arange(NUM_SAMPLES - 1, -1, -2)
    share = replace(
        batch,
        images_BHWC=batch.images_BHWC[backwards],
        tokens_BT=batch.tokens_BT[backwards],
        places_B=batch.places_B[backwards],
    )
    torch.testing.assert_close(embed(share), whole_BE[backwards], atol=1e-12, rtol=1e-12)
    others = [embed(batch, step=1), embed(batch, config=StepConfig(seed=1))]
    others += [embed(batch, step=10**6, config=StepConfig(seed=2**63 + 1))]
    others += [embed(replace(batch, places_B=batch.places_B + 1))]
    for other_BE in others:
        assert ((other_BE - whole_BE).abs().amax(1) > 1e-4).all()


def test_one_micro_batch_is_the_whole_batch() -> None:
    whole, one = make_engine(), make_engine()
    expected = forward_backward(whole, make_batch(), 3, StepConfig())
    assert forward_backward(one, make_batch(), 3, StepConfig(micro_batch_size=NUM_SAMPLES)) == expected
    assert all(map(torch.equal, gradients(one.model), gradients(whole.model)))


def test_an_auxiliary_loss_is_added_and_refused_with_micro_batches() -> None:
    engine, plain = make_engine(), make_engine()

    def auxiliary(model: nn.Module, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        assert isinstance(model, Mammut)
        return step * model.image_to_text.weight.sum(), {"patch": torch.tensor(1.5)}

    prepared = prepare_step(engine, make_batch(), 2, StepConfig(), auxiliary)
    prepared.make_gradients()
    parts = forward_backward(plain, make_batch(), 2, StepConfig())
    assert prepared.parts["patch"] == 1.5
    extra = 2 * engine.model.image_to_text.weight.sum()
    torch.testing.assert_close(prepared.parts["loss"], (parts["loss"] + extra).detach())
    own, other = engine.model.image_to_text.weight.grad, plain.model.image_to_text.weight.grad
    assert own is not None and other is not None
    torch.testing.assert_close(own, other + 2)
    with pytest.raises(ValueError, match="leave micro_batch_size out"):
        prepare_step(engine, make_batch(), 2, StepConfig(micro_batch_size=2), auxiliary)


def test_micro_batches_are_buckets_of_like_lengths_and_change_no_number() -> None:
    """Padded each to its own bucket, over any number of processes: the same samples, and the same loss as one batch."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([3, 30, 5, 17, 9, 28, 4, 6])
    tokens_BT = torch.randint(3, 300, (8, 32), generator=generator) * (torch.arange(32) < lengths[:, None])
    tokens_BT[0, 1] = 0  # another tokenizer's own token within a caption
    images_BHWC = torch.randint(0, 256, (8, 16, 16, 3), dtype=torch.uint8, generator=generator)
    batch = Batch(images_BHWC, tokens_BT, tuple(map(str, lengths.tolist())), torch.arange(8), torch.arange(8.0))
    ordered = batch.by_length()
    assert ordered.sample_ids == tuple(map(str, sorted(lengths.tolist())))
    assert ordered.ground_sample_distance_m_B is not None and ordered.ground_sample_distance_m_B[-1] == 1
    pieces = [ordered.rows(start, start + 2) for start in range(0, 8, 2)]
    assert [piece.tokens_BT.shape[1] for piece in pieces] == [8, 8, 24, 32]
    assert [piece.sample_ids for piece in pieces] == [("3", "4"), ("5", "6"), ("9", "17"), ("28", "30")]
    whole, bucketed = (make_engine(context_length=32) for _ in range(2))
    expected = forward_backward(whole, batch, 4, StepConfig())
    parts = forward_backward(bucketed, batch, 4, StepConfig(micro_batch_size=2))
    for name, value in expected.items():
        torch.testing.assert_close(parts[name], value, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(gradients(bucketed.model), gradients(whole.model), atol=1e-9, rtol=1e-9)
