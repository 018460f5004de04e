"""Sliding-window attention pooling: from patch values and texts to maps of where in the image each text is.

In: the values of the final patches, texts in the embedding space, the head that leads from one to the other.
Out: the cosine of every patch with every text, steadied over windows. Torch only; it holds no weights,
chooses no threshold and knows no picture: whole scenes are `scene.py`'s work.
Shapes: B batch, HxW patch grid, UxV window centres, K pooling heads, D width, E embedding, C texts.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F

# Strips of this many values are pooled at a time: on a CPU a strip and its sum stay in cache, on an
# accelerator the limit only bounds the temporary memory.
CPU_STRIP_VALUES = 1024 * 1024
DEVICE_STRIP_VALUES = 64 * 1024 * 1024

Head = Callable[[torch.Tensor], torch.Tensor]


def smooth_attention(
    values_BHWD: torch.Tensor,
    texts_CE: torch.Tensor,
    *,
    head: Head,
    scores_BHW: torch.Tensor | None = None,
    window: int = 3,
    stride: int = 1,
) -> torch.Tensor:
    """Score every patch by the cosine of its surroundings with each text; returns maps_BCHW in [-1, 1].

    A window of `window` x `window` patches lies around every `stride`-th cell (and around the last cell of an
    axis that would stay uncovered). It pools the values by a softmax of the scores inside it, `head` takes
    the pooled value (..., D) to the embedding space (..., E), and a patch gets the mean cosine of the windows
    that cover it. Cells outside the grid do not exist: they take no weight, and are no zeros. So a window
    larger than the grid means the whole grid within its reach; from 2·size - 1 on, one pooled value for all
    patches.

    `scores_BHW` is (B, H, W), or (B, K, H, W) where each of K heads pools its own D/K slice of the values;
    None is the plain window mean. Float16 and bfloat16 are accumulated in float32, and maps come out in
    float32. The published recipe names a sliding-window attention pooling without a formula: this definition
    is our default.

    Raises ValueError for an even window, a stride outside 1…window (patches would stay uncovered), no texts,
    or shapes that do not fit together.
    """
    _check(values_BHWD, texts_CE, window, stride)
    height, width = values_BHWD.shape[1:3]
    rows, columns = (_centres(length, window // 2, stride) for length in (height, width))
    pooled = _pool_windows(values_BHWD, _scores_per_head(values_BHWD, scores_BHW), rows, columns, window // 2)
    # strip by strip, so that what the head reads is still in cache
    maps_BCUV = torch.cat([_cosines(strip_BUVD, texts_CE, head) for strip_BUVD in pooled], dim=2)
    over_rows_HU = _mean_over_cover(rows, height, window // 2, maps_BCUV)
    over_columns_WV = _mean_over_cover(columns, width, window // 2, maps_BCUV)
    return over_rows_HU @ maps_BCUV @ over_columns_WV.T


def raw_patch_maps(values_BHWD: torch.Tensor, texts_CE: torch.Tensor, head: Head) -> torch.Tensor:
    """Score every patch by the cosine of its own value with each text: a window of one. maps_BCHW."""
    _check(values_BHWD, texts_CE, window=1, stride=1)
    return _cosines(values_BHWD, texts_CE, head)


def upsample(maps_BCHW: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Stretch maps to (height, width) in pixels, bilinear by pixel areas; one way for raw and smooth."""
    return F.interpolate(maps_BCHW, size=size, mode="bilinear", align_corners=False)


def _check(values_BHWD: torch.Tensor, texts_CE: torch.Tensor, window: int, stride: int) -> None:
    if values_BHWD.ndim != 4 or 0 in values_BHWD.shape:
        raise ValueError(f"values_BHWD must be (B, H, W, D) without empty axes, got {tuple(values_BHWD.shape)}")
    if texts_CE.ndim != 2 or 0 in texts_CE.shape:
        raise ValueError(f"texts_CE must be (C, E) with at least one text, got {tuple(texts_CE.shape)}")
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window must be an odd number of patches so that it has a centre, got {window}")
    if not 1 <= stride <= window:
        raise ValueError(f"stride must lie in 1…window so that every patch is covered, got {stride} for {window}")


def _scores_per_head(values_BHWD: torch.Tensor, scores_BHW: torch.Tensor | None) -> torch.Tensor:
    """Scores as (B, K, H, W) in at least float32; zeros where none are given, whose softmax is the mean."""
    batch, height, width, depth = values_BHWD.shape
    dtype = torch.promote_types(values_BHWD.dtype, torch.float32)
    if scores_BHW is None:
        return torch.zeros(batch, 1, height, width, dtype=dtype, device=values_BHWD.device)
    scores_BKHW = scores_BHW.unsqueeze(1) if scores_BHW.ndim == 3 else scores_BHW
    fits = scores_BKHW.ndim == 4 and (batch, height, width) == (scores_BKHW.shape[0], *scores_BKHW.shape[2:])
    if not fits or depth % scores_BKHW.shape[1]:
        raise ValueError(
            f"scores must be (B, H, W) or (B, K, H, W) on the grid of values {tuple(values_BHWD.shape)}, "
            f"with K dividing D; got {tuple(scores_BHW.shape)}"
        )
    return scores_BKHW.to(dtype)


def _centres(length: int, radius: int, stride: int) -> list[int]:
    centres = list(range(0, length, stride))
    return centres if centres[-1] + radius >= length - 1 else [*centres, length - 1]


def _pool_windows(
    values_BHWD: torch.Tensor, scores_BKHW: torch.Tensor, rows: list[int], columns: list[int], radius: int
) -> Iterator[torch.Tensor]:
    """Softmax of the scalar scores in each window, then a shifted multiply-add of the values per window cell.

    Exact however widely the scores spread, because each window subtracts its own maximum; and w² passes over
    the values in cache are an order faster than unfolding them w² times into memory.
    """
    batch, height, width, depth = values_BHWD.shape
    num_heads = scores_BKHW.shape[1]
    # A reach beyond the grid meets no cell: absurdly large windows cost no more than the grid itself.
    reach_y, reach_x = min(radius, height - 1), min(radius, width - 1)
    shifts = [(y, x) for y in range(2 * reach_y + 1) for x in range(2 * reach_x + 1)]
    scores_BKPQ = F.pad(scores_BKHW, (reach_x, reach_x, reach_y, reach_y), value=-torch.inf)
    values_BPQKd = F.pad(values_BHWD.to(scores_BKHW.dtype), (0, 0, reach_x, reach_x, reach_y, reach_y)).view(
        batch, height + 2 * reach_y, width + 2 * reach_x, num_heads, depth // num_heads
    )
    on_cpu = values_BHWD.device.type == "cpu"
    strip_values = CPU_STRIP_VALUES if on_cpu else DEVICE_STRIP_VALUES
    strip_rows = max(1, strip_values // (batch * len(columns) * depth))
    for start in range(0, len(rows), strip_rows):
        strip = rows[start : start + strip_rows]
        shifted_scores = [_take(_take(scores_BKPQ, 2, strip, y), 3, columns, x) for y, x in shifts]
        weights_SBUVK1 = torch.stack(shifted_scores).softmax(dim=0).permute(0, 1, 3, 4, 2).unsqueeze(-1)
        pooled_BUVKd = torch.zeros((), dtype=scores_BKHW.dtype, device=values_BHWD.device)
        for weights_BUVK1, (y, x) in zip(weights_SBUVK1, shifts, strict=True):
            shifted_BUVKd = _take(_take(values_BPQKd, 1, strip, y), 2, columns, x)
            pooled_BUVKd = torch.addcmul(pooled_BUVKd, weights_BUVK1, shifted_BUVKd)
        yield pooled_BUVKd.flatten(3).to(values_BHWD.dtype)


def _take(tensor: torch.Tensor, axis: int, positions: Sequence[int], shift: int) -> torch.Tensor:
    """The cells at positions + shift: a view where they are consecutive, a copy where strided."""
    if positions[-1] - positions[0] + 1 == len(positions):
        return tensor.narrow(axis, positions[0] + shift, len(positions))
    return tensor.index_select(axis, torch.tensor(positions, device=tensor.device) + shift)


def _cosines(pooled_BUVD: torch.Tensor, texts_CE: torch.Tensor, head: Head) -> torch.Tensor:
    embeddings_BUVE = head(pooled_BUVD)
    if embeddings_BUVE.shape[-1] != texts_CE.shape[1]:
        raise ValueError(f"head gives width {embeddings_BUVE.shape[-1]}, but the texts have {texts_CE.shape[1]}")
    dtype = torch.promote_types(embeddings_BUVE.dtype, torch.float32)
    embeddings_BUVE = F.normalize(embeddings_BUVE.to(dtype), dim=-1)
    return (embeddings_BUVE @ F.normalize(texts_CE.to(dtype), dim=-1).T).permute(0, 3, 1, 2)


def _mean_over_cover(centres: list[int], length: int, radius: int, like: torch.Tensor) -> torch.Tensor:
    """Matrix (cells, centres) that averages over the windows covering a cell; the two axes separate."""
    cells = torch.arange(length, device=like.device)
    covers = (cells[:, None] - torch.tensor(centres, device=like.device)).abs() <= radius
    return covers.to(like.dtype) / covers.sum(dim=1, keepdim=True)
