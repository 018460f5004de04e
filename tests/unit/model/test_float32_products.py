"""Products through oneDNN: nobody's choice is overruled, no digit is lost, attention is torch's to rounding."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rsplatform.model import float32_products
from rsplatform.model.float32_products import THROUGH_ONEDNN, attention, use_onednn_products

BATCH, HEADS, WIDTH = 3, 2, 16


@pytest.fixture(autouse=True)
def _as_torch_starts() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def our_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a processor rounds products through oneDNN: torch's precision stays."""
    monkeypatch.setattr(float32_products, "goes_through_onednn", lambda: True)


def test_it_is_taken_where_products_keep_their_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(float32_products, "LOST_DIGITS", 1.0)  # a processor that rounds less than is allowed
    assert use_onednn_products() and float32_products.goes_through_onednn()


def test_it_is_undone_where_products_lose_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert float32_products._lost_digits() < float32_products.LOST_DIGITS
    monkeypatch.setattr(float32_products, "LOST_DIGITS", 0.0)
    assert not use_onednn_products() and not float32_products.goes_through_onednn()
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_process_that_sees_a_cuda_device_keeps_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not use_onednn_products()
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cuda.matmul.allow_tf32


def test_precisions_that_somebody_set_by_backend_stay_and_break_nothing() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert not use_onednn_products()
        query, key, value = _inputs(7, 7)
        assert attention(query, key, value).shape == query.shape
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")


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


@pytest.mark.usefixtures("our_attention")
@pytest.mark.parametrize("queries", [1, 7, 77])
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


@pytest.mark.usefixtures("our_attention")
def test_other_types_go_torchs_own_way() -> None:
    query, key, value = (tensor.detach().double() for tensor in _inputs(7, 7))
    assert torch.equal(attention(query, key, value), F.scaled_dot_product_attention(query, key, value))


@pytest.mark.usefixtures("our_attention")
def test_weights_that_need_much_memory_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = (tensor.detach() for tensor in _inputs(7, 5))
    calls = []
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or real(*a, **k))
    monkeypatch.setattr(float32_products, "MOST_SCORE_BYTES", 4 * BATCH * HEADS * 7 * 5)
    ours = attention(query, key, value)
    assert not calls
    monkeypatch.setattr(float32_products, "MOST_SCORE_BYTES", 4 * BATCH * HEADS * 7 * 5 - 1)
    torch.testing.assert_close(attention(query, key, value), ours, atol=2e-6, rtol=1e-5)
    assert calls
