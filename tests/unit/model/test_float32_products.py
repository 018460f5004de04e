"""Products through oneDNN: nobody's choice is overruled, no digit is lost, attention is torch's to rounding."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rsplatform.model import float32_products
from rsplatform.model.float32_products import MOST_TOKENS, THROUGH_ONEDNN, attention, use_onednn_products

BATCH, HEADS, WIDTH = 3, 2, 16


@pytest.fixture(autouse=True)
def _as_torch_starts() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture()
def through_onednn() -> None:
    torch.set_float32_matmul_precision(THROUGH_ONEDNN)


def test_it_is_taken_only_where_products_keep_their_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = use_onednn_products()
    assert (torch.get_float32_matmul_precision() == THROUGH_ONEDNN) == taken
    assert float32_products._lost_digits() < float32_products.LOST_DIGITS
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(float32_products, "LOST_DIGITS", 0.0)  # a processor that rounds more than is allowed
    assert not use_onednn_products()
    assert torch.get_float32_matmul_precision() == "highest"


def test_factors_in_bfloat16_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = Tensor.__matmul__

    def rounded(first: Tensor, second: Tensor) -> Tensor:
        if first.dtype == torch.float32:
            return exact(first.bfloat16(), second.bfloat16()).float()
        return exact(first, second)

    monkeypatch.setattr(Tensor, "__matmul__", rounded)
    assert float32_products._lost_digits() > 10 * float32_products.LOST_DIGITS


@pytest.mark.parametrize("chosen", ["high", "medium"])
def test_what_somebody_has_chosen_stays(chosen: str) -> None:
    torch.set_float32_matmul_precision(chosen)
    assert use_onednn_products() == (chosen == THROUGH_ONEDNN)
    assert torch.get_float32_matmul_precision() == chosen


def _inputs(queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(BATCH, HEADS, size, WIDTH, generator=generator).requires_grad_() for size in (queries, keys, keys)
    )
    return query, key, value


def _mask(keys: int) -> Tensor:
    lengths = torch.tensor([keys, 1, keys // 2 + 1])
    return (torch.arange(keys) < lengths[:, None])[:, None, None]


@pytest.mark.usefixtures("through_onednn")
@pytest.mark.parametrize("queries", [1, 7, MOST_TOKENS + 1])
@pytest.mark.parametrize("kind", ["all", "causal", "masked", "cross"])
def test_attention_is_torchs_with_gradients(kind: str, queries: int) -> None:
    keys = 5 if kind == "cross" else queries
    mask = _mask(keys) if kind == "masked" else None
    ours, theirs = _inputs(queries, keys), _inputs(queries, keys)
    mixed = attention(*ours, mask, causal=kind == "causal")
    expected = F.scaled_dot_product_attention(*theirs, attn_mask=mask, is_causal=kind == "causal")
    torch.testing.assert_close(mixed, expected, atol=2e-6, rtol=1e-5)
    weights = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(1))
    (mixed * weights).sum().backward()
    (expected * weights).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("through_onednn")
def test_other_types_go_torchs_own_way() -> None:
    query, key, value = (tensor.detach().double() for tensor in _inputs(7, 7))
    assert torch.equal(attention(query, key, value), F.scaled_dot_product_attention(query, key, value))
