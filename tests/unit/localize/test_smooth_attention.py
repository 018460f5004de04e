"""Smooth attention equals an obvious per-window loop, is exact for wide scores, and has gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.localize import unfold_reference
from rsplatform.localize.smooth_attention import Head, raw_patch_maps, smooth_attention, upsample
from rsplatform.model.vision_encoder import VisionConfig, VisionEncoder


def slow_maps(
    values: torch.Tensor, texts: torch.Tensor, head: Head, scores_BKHW: torch.Tensor, window: int, stride: int
) -> torch.Tensor:
    """Every window and every covered patch by name, in float64."""
    batch, height, width, depth = values.shape
    heads, radius = scores_BKHW.shape[1], window // 2

    def centres(length: int) -> list[int]:
        regular = list(range(0, length, stride))
        return regular if regular[-1] + radius >= length - 1 else [*regular, length - 1]

    sums, counts = torch.zeros(batch, len(texts), height, width), torch.zeros(height, width)
    for row in centres(height):
        for column in centres(width):
            rows = slice(max(0, row - radius), row + radius + 1)
            columns = slice(max(0, column - radius), column + radius + 1)
            inside = values[:, rows, columns].reshape(batch, -1, heads, depth // heads)
            weights = scores_BKHW[:, :, rows, columns].flatten(2).softmax(-1)
            pooled = torch.einsum("bkn,bnkd->bkd", weights, inside).flatten(1)
            cosine = F.normalize(head(pooled), dim=-1) @ texts.T
            sums[:, :, rows, columns] += cosine[:, :, None, None]
            counts[rows, columns] += 1
    return sums / counts


@pytest.fixture(autouse=True)
def _double_and_seeded():
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@settings(max_examples=40, deadline=None)
@example(grid=(1, 1), heads=2, window=101, stride=5, spread=100.0, seed=0)
@given(
    grid=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    heads=st.sampled_from([1, 2]),
    window=st.sampled_from([1, 3, 5, 9, 101]),
    stride=st.integers(1, 5),
    spread=st.sampled_from([0.0, 1.0, 100.0]),
    seed=st.integers(0, 1000),
)
def test_equals_the_slow_loop(grid, heads, window, stride, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, *grid, 6, generator=generator)
    texts = F.normalize(torch.randn(3, 5, generator=generator), dim=-1)
    scores = spread * (2 * torch.rand(2, heads, *grid, generator=generator) - 1)
    head = torch.nn.Sequential(torch.nn.LayerNorm(6), torch.nn.Linear(6, 5))
    stride = min(stride, window)
    expected = slow_maps(values, texts, head, scores, window, stride)
    single = smooth_attention(
        values.float(),
        texts.float(),
        head=head.float(),
        scores_BHW=scores.float(),
        window=window,
        stride=stride,
    )
    assert single.dtype == torch.float32
    # The scores themselves were rounded to float32, which moves a weight by up to 100 x 6e-8.
    torch.testing.assert_close(single.double(), expected, atol=1e-5, rtol=0)


def test_no_scores_are_the_window_mean_and_a_plain_score_map_is_one_head():
    values, texts = torch.randn(1, 6, 4, 8), F.normalize(torch.randn(2, 8), dim=-1)
    zeros = torch.zeros(1, 1, 6, 4)
    torch.testing.assert_close(
        smooth_attention(values, texts, head=torch.tanh, window=5),
        slow_maps(values, texts, torch.tanh, zeros, 5, 1),
    )
    scores = torch.randn(1, 6, 4)
    torch.testing.assert_close(
        smooth_attention(values, texts, head=torch.tanh, scores_BHW=scores),
        smooth_attention(values, texts, head=torch.tanh, scores_BHW=scores[:, None]),
    )


def test_float32_is_exact_where_scores_spread_by_200():
    height, width = 40, 33
    values, texts = torch.randn(1, height, width, 64), F.normalize(torch.randn(4, 64), dim=-1)
    scores = (200 * torch.rand(1, 1, height, width) - 100).float()
    expected = slow_maps(values.float().double(), texts, torch.nn.Identity(), scores.double(), 5, 1)
    found = smooth_attention(values.float(), texts.float(), head=torch.nn.Identity(), scores_BHW=scores[:, 0], window=5)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)


def test_many_strips_equal_one(monkeypatch):
    values, texts = torch.randn(2, 9, 5, 4), torch.randn(3, 4)
    whole = smooth_attention(values, texts, head=torch.nn.Identity(), window=5, stride=2)
    monkeypatch.setattr("rsplatform.localize.smooth_attention.CPU_STRIP_VALUES", 1)
    torch.testing.assert_close(smooth_attention(values, texts, head=torch.nn.Identity(), window=5, stride=2), whole)


@pytest.mark.parametrize("grid", [(4, 3), (1, 1)])
@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("spread", [None, 1.0, 100.0], ids=["mean", "learned", "learned ±100"])
def test_gradients(grid, stride, spread):
    values = torch.randn(1, *grid, 4, requires_grad=True)
    texts = torch.randn(2, 3, requires_grad=True)
    scores = None if spread is None else (spread * torch.randn(1, 2, *grid)).requires_grad_()
    weight = torch.randn(3, 4, requires_grad=True)

    def maps(values, texts, weight, scores=None):
        def head(pooled):
            return F.linear(F.layer_norm(pooled, (4,)), weight)

        return smooth_attention(values, texts, head=head, scores_BHW=scores, window=3, stride=stride)

    inputs = (values, texts, weight) if scores is None else (values, texts, weight, scores)
    assert torch.autograd.gradcheck(maps, inputs)


@pytest.mark.parametrize("pooling", ["map", "mean"])
@pytest.mark.parametrize("grid", [(8, 8), (3, 5), (1, 1)])
def test_a_window_over_the_whole_picture_is_the_embedding_of_the_model(pooling, grid):
    """The window pools what the encoder pools: same values, scores and head. A patch alone is a picture of one."""
    vision = VisionEncoder(VisionConfig(16, 2, 2, 32, 4, 32, pooling), 12).eval()
    texts = F.normalize(torch.randn(3, 12), dim=-1)
    with torch.no_grad():
        images = torch.randn(2, 3, 4 * grid[0], 4 * grid[1])
        embeddings = F.normalize(vision.embed_tokens(vision(images)), dim=-1)
        features = vision.patch_features(images)
        found = smooth_attention(
            features.values_BHWD, texts, head=vision.head, scores_BHW=features.scores_BKHW, window=2 * max(grid) + 1
        )
    torch.testing.assert_close(found, (embeddings @ texts.T)[:, :, None, None].expand_as(found))


@pytest.mark.parametrize("window", [3, 5])
def test_float32_equals_the_unfold_of_the_benchmark(window):
    values, texts = torch.randn(1, 12, 9, 16).float(), F.normalize(torch.randn(3, 16), dim=-1).float()
    scores = (200 * torch.rand(1, 12, 9) - 100).float()
    found = smooth_attention(values, texts, head=torch.nn.Identity(), scores_BHW=scores, window=window)
    assert found.dtype == torch.float32
    expected = unfold_reference(values, texts, torch.nn.Identity(), scores, window)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_thousand_texts_cost_their_maps_and_little_more():
    """Memory beyond the maps does not grow with texts times window."""
    values, texts = torch.randn(1, 40, 40, 64).float(), torch.randn(1000, 64).float()
    maps_bytes = 1000 * 40 * 40 * 4
    largest = largest_tensor_bytes(lambda: smooth_attention(values, texts, head=torch.nn.Identity(), window=5))
    assert largest <= maps_bytes
    few = smooth_attention(values, texts[:7], head=torch.nn.Identity(), window=5)
    many = smooth_attention(values, texts, head=torch.nn.Identity(), window=5)
    torch.testing.assert_close(many[:, :7], few, atol=1e-6, rtol=0)


def largest_tensor_bytes(function) -> int:
    """Of everything that operations give while `function` runs."""

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.largest = max(self.largest, result.untyped_storage().nbytes())
            return result

    with Sizes() as sizes:
        function()
    return sizes.largest


def test_raw_is_a_window_of_one_and_a_window_of_everything_is_flat():
    values, texts = torch.randn(2, 5, 4, 3), F.normalize(torch.randn(2, 3), dim=-1)
    raw = raw_patch_maps(values, texts, torch.tanh)
    torch.testing.assert_close(raw, smooth_attention(values, texts, head=torch.tanh, window=1))
    flat = smooth_attention(values, texts, head=torch.tanh, window=9)
    pooled = F.normalize(values.mean(dim=(1, 2)).tanh(), dim=-1) @ texts.T
    torch.testing.assert_close(flat, pooled[:, :, None, None].expand_as(flat))


def test_half_precision_stays_close():
    values, texts = torch.randn(1, 8, 8, 32), F.normalize(torch.randn(2, 32), dim=-1)
    exact = smooth_attention(values, texts, head=torch.nn.Identity())
    half = smooth_attention(values.bfloat16(), texts.bfloat16(), head=torch.nn.Identity())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), exact, atol=2e-2, rtol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"window": 4}, "odd"),
        ({"window": 0}, "odd"),
        ({"stride": 0}, "stride"),
        ({"stride": 4}, "covered"),
        ({"texts_CE": torch.zeros(0, 4)}, "at least one text"),
        ({"texts_CE": torch.zeros(2, 5)}, "head gives width 4"),
        ({"scores_BHW": torch.zeros(1, 3, 6, 5)}, "K dividing D"),
        ({"scores_BHW": torch.zeros(1, 5, 6)}, "on the grid"),
        ({"values_BHWD": torch.zeros(6, 5, 4)}, "values_BHWD"),
        ({"values_BHWD": torch.zeros(1, 0, 5, 4)}, "empty"),
    ],
)
def test_bad_input_is_named(change, words):
    arguments = {
        "values_BHWD": torch.zeros(1, 6, 5, 4),
        "texts_CE": torch.ones(2, 4),
        "head": torch.nn.Identity(),
    } | change
    with pytest.raises(ValueError, match=words):
        smooth_attention(arguments.pop("values_BHWD"), arguments.pop("texts_CE"), **arguments)


def test_upsample_keeps_the_mean_and_takes_any_size():
    maps = torch.rand(1, 2, 5, 5)
    assert upsample(maps, (70, 33)).shape == (1, 2, 70, 33)
    torch.testing.assert_close(upsample(maps, (10, 10)).mean(), maps.mean(), rtol=0.05, atol=0.05)
