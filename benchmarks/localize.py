"""Smooth attention against an unfold of the values on one machine: time ratio and largest difference.

In: nothing. Out: a line per window size and kind of pooling, both ways timed in turn in the same run, the
head included. It measures localization arithmetic only, not the encoder.
Run: `python benchmarks/localize.py`
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F

from rsplatform.localize.smooth_attention import Head, raw_patch_maps, smooth_attention


def unfold_reference(
    values_BHWD: torch.Tensor, texts_CE: torch.Tensor, head: Head, scores_BHW: torch.Tensor, window: int
) -> torch.Tensor:
    """The definition written down with every window's values laid out in memory (stride 1)."""
    batch, height, width, depth = values_BHWD.shape
    cells, radius = window * window, window // 2
    unfolded = F.unfold(values_BHWD.permute(0, 3, 1, 2), window, padding=radius).view(batch, depth, cells, -1)
    inside = F.unfold(torch.ones(batch, 1, height, width), window, padding=radius)
    scores = F.unfold(scores_BHW[:, None], window, padding=radius).masked_fill(inside == 0, -torch.inf)
    pooled = (unfolded * scores.softmax(dim=1)[:, None]).sum(dim=2).transpose(1, 2)
    maps = F.normalize(head(pooled), dim=-1) @ texts_CE.T
    grids = maps.transpose(1, 2).reshape(-1, 1, height, width)
    covering = F.unfold(grids, window, padding=radius).view(batch, len(texts_CE), cells, -1)
    return (covering.sum(dim=2) / inside.sum(dim=1)[:, None]).view(batch, len(texts_CE), height, width)


def paired_seconds(
    fast: Callable[[], torch.Tensor], slow: Callable[[], torch.Tensor], repeats: int
) -> tuple[float, float]:
    """Medians of alternating runs, after one warm-up each: a busy machine slows both alike."""
    for function in (fast, slow):
        function()
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for function, seconds in zip((fast, slow), taken, strict=True):
            started = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - started)
    return statistics.median(taken[0]), statistics.median(taken[1])


def parse() -> argparse.Namespace:
    """Sizes; the defaults are a 1022-px image under a ViT-L/14."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, default=73, help="patches along each side")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--embedding", type=int, default=768)
    parser.add_argument("--texts", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def main() -> None:
    """Print one line per window and kind of pooling, and the time of the head, which both ways share."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    values_BHWD = torch.randn(1, arguments.grid, arguments.grid, arguments.width, generator=generator)
    texts_CE = F.normalize(torch.randn(arguments.texts, arguments.embedding, generator=generator), dim=-1)
    head = torch.nn.Sequential(
        torch.nn.LayerNorm(arguments.width), torch.nn.Linear(arguments.width, arguments.embedding, bias=False)
    )
    wide_BHW = 100 * (2 * torch.rand(1, arguments.grid, arguments.grid, generator=generator) - 1)
    kinds: dict[str, torch.Tensor | None] = {"softmax of scores ±100": wide_BHW, "mean": None}
    print(f"values {tuple(values_BHWD.shape)}, embedding {arguments.embedding}, {arguments.threads} threads")
    with torch.inference_mode():
        raw = partial(raw_patch_maps, values_BHWD, texts_CE, head)
        head_s = paired_seconds(raw, raw, arguments.repeats)[0]
        print(f"head and cosine, which both ways need: {head_s * 1e3:.0f} ms")
        for window, (kind, scores) in product((3, 5), kinds.items()):
            fast = partial(smooth_attention, values_BHWD, texts_CE, head=head, scores_BHW=scores, window=window)
            unfolded_scores = torch.zeros_like(wide_BHW) if scores is None else scores
            slow = partial(unfold_reference, values_BHWD, texts_CE, head, unfolded_scores, window)
            difference = (fast() - slow()).abs().max().item()
            fast_s, slow_s = paired_seconds(fast, slow, arguments.repeats)
            print(
                f"window {window}, {kind}: smooth {fast_s * 1e3:.0f} ms, unfold {slow_s * 1e3:.0f} ms, "
                f"ratio {slow_s / fast_s:.1f}, without the head {(slow_s - head_s) / (fast_s - head_s):.0f}, "
                f"largest difference {difference:.1e}"
            )


if __name__ == "__main__":
    main()
