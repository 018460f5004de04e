"""Chunked cross-entropy against torch's own, values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from rsplatform.model.vocabulary_loss import vocabulary_loss


def problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden_BTD = torch.randn(3, 7, 5, generator=generator, dtype=dtype, requires_grad=True)
    vocabulary_VD = torch.randn(11, 5, generator=generator, dtype=dtype, requires_grad=True)
    targets_BT = torch.randint(0, 11, (3, 7), generator=generator)
    targets_BT[1, 3:] = 0
    return hidden_BTD, vocabulary_VD, targets_BT


@pytest.mark.parametrize("chunk_rows", [1, 4, 1000])
def test_value_and_gradients_equal_the_whole_logits_version(chunk_rows):
    hidden_BTD, vocabulary_VD, targets_BT = problem()
    loss = vocabulary_loss(hidden_BTD, vocabulary_VD, targets_BT, chunk_rows)
    fast = torch.autograd.grad(loss.sum * 1.7, (hidden_BTD, vocabulary_VD))
    logits_BTV = hidden_BTD @ vocabulary_VD.T
    whole = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=0, reduction="sum")
    slow = torch.autograd.grad(whole * 1.7, (hidden_BTD, vocabulary_VD))
    torch.testing.assert_close(loss.sum, whole)
    assert loss.count == (targets_BT != 0).sum()
    for ours, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(vocabulary_loss(hidden_BTD, vocabulary_VD, targets_BT, chunk_rows).sum, whole)


def test_large_logits_stay_finite_and_only_pads_give_zero():
    hidden_BTD, vocabulary_VD, targets_BT = problem(torch.float32)
    loss = vocabulary_loss(hidden_BTD * 1e4, vocabulary_VD, targets_BT)
    loss.sum.backward()
    assert loss.sum.isfinite() and hidden_BTD.grad is not None and hidden_BTD.grad.isfinite().all()
    empty = vocabulary_loss(hidden_BTD, vocabulary_VD, torch.zeros_like(targets_BT))
    assert empty.sum == 0 and empty.count == 0


def with_z_loss(hidden_BTD, vocabulary_VD, targets_BT, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain formula over whole logits: (cross-entropy plus weighted z-loss, z-loss), both summed."""
    logits_BTV = hidden_BTD @ vocabulary_VD.T
    log_z_N = logits_BTV.exp().sum(-1).log()[targets_BT != 0]
    whole = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=0, reduction="sum")
    return whole + weight * (log_z_N**2).sum(), (log_z_N**2).sum()


@pytest.mark.parametrize("chunk_rows", [1, 4, 1000])
@pytest.mark.parametrize("weight", [1e-4, 0.3])
def test_the_z_loss_and_its_gradients_equal_the_plain_formula(chunk_rows, weight):
    hidden_BTD, vocabulary_VD, targets_BT = problem()
    loss = vocabulary_loss(hidden_BTD, vocabulary_VD, targets_BT, chunk_rows, weight)
    fast = torch.autograd.grad(loss.sum * 1.7, (hidden_BTD, vocabulary_VD))
    total, z_loss = with_z_loss(hidden_BTD, vocabulary_VD, targets_BT, weight)
    slow = torch.autograd.grad(total * 1.7, (hidden_BTD, vocabulary_VD))
    torch.testing.assert_close((loss.sum, *fast), (total, *slow), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        inference = vocabulary_loss(hidden_BTD, vocabulary_VD, targets_BT, chunk_rows, weight)
    for found in (loss, inference):
        assert found.z_loss_sum is not None and not found.z_loss_sum.requires_grad
        torch.testing.assert_close((found.sum, found.z_loss_sum), (total, z_loss), rtol=1e-12, atol=1e-12)
    assert vocabulary_loss(hidden_BTD, vocabulary_VD, targets_BT, chunk_rows).z_loss_sum is None


def test_autograd_checks_the_gradients_by_differences():
    hidden_BTD, vocabulary_VD, targets_BT = problem()

    def loss(hidden: torch.Tensor, vocabulary: torch.Tensor) -> torch.Tensor:
        return vocabulary_loss(hidden, vocabulary, targets_BT, 4, z_loss_weight=0.2).sum

    assert torch.autograd.gradcheck(loss, (hidden_BTD, vocabulary_VD))


def test_the_z_loss_under_autocast_is_summed_in_float32():
    hidden_BTD, vocabulary_VD, targets_BT = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        low = vocabulary_loss(hidden_BTD, vocabulary_VD, targets_BT, 4, z_loss_weight=0.1)
    gradients = torch.autograd.grad(low.sum, (hidden_BTD, vocabulary_VD))
    total, z_loss = with_z_loss(hidden_BTD, vocabulary_VD, targets_BT, 0.1)
    expected = torch.autograd.grad(total, (hidden_BTD, vocabulary_VD))
    assert low.z_loss_sum is not None and low.z_loss_sum.dtype == low.sum.dtype == torch.float32
    torch.testing.assert_close((low.sum, low.z_loss_sum), (total, z_loss), rtol=0.02, atol=0)
    torch.testing.assert_close(gradients, expected, rtol=0.05, atol=0.05)
