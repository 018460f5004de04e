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
