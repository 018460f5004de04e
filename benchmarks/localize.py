"""Smooth attention on one machine: against an unfold of the values, beside an encoder, and per tile of a scene.

In: nothing. Out: a line per measurement. `pooling`: time ratio to unfold and largest difference, head included, and how
much any pooling could gain, since both ways need the head; once under our setting of float32 products, and with the
unfold as Python starts it, which is what others would run. `encoder`: what smooth attention adds to a ViT-L/14 on one
1022-px picture. `tiles`: seconds of a ViT-B/16 per 1024-px tile, pixels to classes, in one native pass and in windows
of 224 px at stride 112. Everything runs once before it is timed. Ways are timed in turn, medians of `--repeats`; the
encoders of `encoder` and `tiles`, whose runs are long, are timed once. CPU seconds of one thread hardly depend on what
else a machine does, wall seconds do. Weights are random: the time does not depend on them.
Run: `python benchmarks/localize.py --threads 1`
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from rsplatform.localize.decide import label_pixels
from rsplatform.localize.scene import PatchEncoder, SceneReader, Tiling, score_strips, upsample_strips
from rsplatform.localize.smooth_attention import Head, raw_patch_maps, smooth_attention
from rsplatform.model.float32_products import use_onednn_products
from rsplatform.model.mammut import mammut_config
from rsplatform.model.normalise import normalise
from rsplatform.model.vision_encoder import PatchFeatures, VisionEncoder

TILE_PX = 1024
PUBLISHED = "published for SegEarth-OV (ViT-B/16): 36 ms per 448-px forward, on a GPU; not measured here"


class Seconds(NamedTuple):
    """Medians of one way."""

    wall: float
    cpu: float


def unfold_reference(
    values_BHWD: torch.Tensor, texts_CE: torch.Tensor, head: Head, scores_BHW: torch.Tensor, window: int
) -> torch.Tensor:
    """The definition written down with every window's values laid out in memory (stride 1)."""
    batch, height, width, depth = values_BHWD.shape
    cells, radius = window * window, window // 2
    unfolded = F.unfold(values_BHWD.permute(0, 3, 1, 2), window, padding=radius).view(batch, depth, cells, -1)
    inside = F.unfold(values_BHWD.new_ones(batch, 1, height, width), window, padding=radius)
    scores = F.unfold(scores_BHW[:, None], window, padding=radius).masked_fill(inside == 0, -torch.inf)
    pooled = (unfolded * scores.softmax(dim=1)[:, None]).sum(dim=2).transpose(1, 2)
    maps = F.normalize(head(pooled), dim=-1) @ texts_CE.T
    grids = maps.transpose(1, 2).reshape(-1, 1, height, width)
    covering = F.unfold(grids, window, padding=radius).view(batch, len(texts_CE), cells, -1)
    return (covering.sum(dim=2) / inside.sum(dim=1)[:, None]).view(batch, len(texts_CE), height, width)


def timed(way: Callable[[], Any], device: str) -> tuple[Any, Seconds]:
    """What one run gives, and its time."""
    _wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    result = way()
    _wait(device)
    return result, Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def paired_seconds(ways: Sequence[Callable[[], Any]], repeats: int, device: str) -> list[Seconds]:
    """Medians of alternating runs, after one warm-up each: a busy machine slows all alike."""
    for way in ways:
        way()
    rounds = [[timed(way, device)[1] for way in ways] for _ in range(repeats)]
    return [
        Seconds(*(statistics.median(side) for side in zip(*runs, strict=True))) for runs in zip(*rounds, strict=True)
    ]


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def as_python_starts(way: Callable[[], Any]) -> Any:
    """Run with the float32 products that torch has unless told otherwise."""
    ours = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        return way()
    finally:
        torch.set_float32_matmul_precision(ours)


def _shown(seconds: Seconds) -> str:
    return f"{seconds.wall * 1e3:.0f} ms (CPU {seconds.cpu * 1e3:.0f})"


def pooling(arguments: argparse.Namespace) -> None:
    """One line per window and kind of pooling."""
    device, grid, width = arguments.device, arguments.grid, arguments.width
    generator = torch.Generator().manual_seed(0)
    values_BHWD = torch.randn(1, grid, grid, width, generator=generator).to(device)
    texts_CE = F.normalize(torch.randn(arguments.texts, arguments.embedding, generator=generator), dim=-1).to(device)
    head = torch.nn.Sequential(torch.nn.LayerNorm(width), torch.nn.Linear(width, arguments.embedding, bias=False))
    head.to(device)
    wide_BHW = (100 * (2 * torch.rand(1, grid, grid, generator=generator) - 1)).to(device)
    raw = partial(raw_patch_maps, values_BHWD, texts_CE, head)
    print(f"values {tuple(values_BHWD.shape)}, embedding {arguments.embedding}, {arguments.texts} texts")
    kinds: dict[str, torch.Tensor | None] = {"softmax of scores ±100": wide_BHW, "mean": None}
    for window, (kind, scores) in product((3, 5), kinds.items()):
        fast = partial(smooth_attention, values_BHWD, texts_CE, head=head, scores_BHW=scores, window=window)
        unfolded_scores = torch.zeros_like(wide_BHW) if scores is None else scores
        slow = partial(unfold_reference, values_BHWD, texts_CE, head, unfolded_scores, window)
        difference = (fast() - slow()).abs().max().item()
        ways = [fast, slow, raw, partial(as_python_starts, slow)]
        smooth_s, unfold_s, head_s, plain_s = paired_seconds(ways, arguments.repeats, device)
        print(
            f"window {window}, {kind}: smooth {_shown(smooth_s)}, unfold {_shown(unfold_s)}, "
            f"head and cosine alone {_shown(head_s)}; unfold / smooth {unfold_s.wall / smooth_s.wall:.1f} wall, "
            f"{unfold_s.cpu / smooth_s.cpu:.1f} CPU (at most {unfold_s.cpu / head_s.cpu:.1f} if pooling cost nothing); "
            f"unfold as Python starts it {_shown(plain_s)}, {plain_s.wall / smooth_s.wall:.1f} wall, "
            f"{plain_s.cpu / smooth_s.cpu:.1f} CPU; "
            f"pooling alone {(unfold_s.cpu - head_s.cpu) / max(smooth_s.cpu - head_s.cpu, 1e-9):.0f} CPU; "
            f"largest difference {difference:.1e}",
            flush=True,
        )


def encoder(arguments: argparse.Namespace) -> None:
    """What smooth attention takes beside the encoder that it reads, with both kinds of heads."""
    device, config = arguments.device, mammut_config("openmammut_L")
    images_BCHW = torch.rand(1, 3, arguments.grid * 14, arguments.grid * 14, device=device)
    texts_CE = F.normalize(torch.randn(arguments.texts, config.embedding_width, device=device), dim=-1)
    tower = VisionEncoder(config.vision, config.embedding_width).eval().to(device)
    (encoder_s,) = paired_seconds([partial(tower.patch_features, images_BCHW)], 1, device)
    print(f"ViT-L/14 on {images_BCHW.shape[-1]} px: {_shown(encoder_s)}")
    for kind in ("mean", "map"):
        # with one block, since blocks change the values but not the time of what follows
        shallow = replace(config.vision, pooling=kind, class_token=False, num_layers=1)
        vision = VisionEncoder(shallow, config.embedding_width).eval().to(device)
        features = vision.patch_features(images_BCHW)
        smooth = partial(smooth_attention, features.values_BHWD, texts_CE, head=vision.head)
        ways = [partial(smooth, scores_BHW=features.scores_BKHW, window=window) for window in (3, 5)]
        for window, smooth_s in zip((3, 5), paired_seconds(ways, arguments.repeats, device), strict=True):
            shares = [100 * own / whole for own, whole in zip(smooth_s, encoder_s, strict=True)]
            print(
                f"  {kind} pooling, window {window}: {_shown(smooth_s)}, "
                f"{shares[0]:.1f} % over the encoder (CPU {shares[1]:.1f} %)",
                flush=True,
            )


def tiles(arguments: argparse.Namespace) -> None:
    """Pixels to classes of one tile by protocol, through the code of whole scenes."""
    device, config = arguments.device, mammut_config("openmammut_B")
    vision = VisionEncoder(config.vision, config.embedding_width).eval().to(device)
    patch, side = config.vision.patch_size, arguments.tile_px
    texts_CE = F.normalize(torch.randn(arguments.texts, config.embedding_width), dim=-1)
    image_HWC = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)

    def features(images_BHWC: torch.Tensor) -> PatchFeatures:
        vision_config = config.vision
        return vision.patch_features(
            normalise(images_BHWC.to(device), vision_config.pixel_mean, vision_config.pixel_std)
        )

    def labels(tiling: Tiling) -> None:
        scene = SceneReader(
            side, side, lambda top, left, rows, columns: image_HWC[top : top + rows, left : left + columns]
        )
        encode = PatchEncoder(features, vision.head, patch)
        for strip in upsample_strips(score_strips(scene, encode, texts_CE, tiling), scene, patch):
            label_pixels(strip.maps_CHW.numpy(), range(arguments.texts))

    protocols = {
        "one native pass": Tiling(side // patch, 4, 3, batch_tiles=1),
        "224-px windows at stride 112": Tiling(224 // patch, 112 // patch, 3, batch_tiles=16),
    }
    print(f"ViT-B/16, {side}-px tile, pixels to classes of {arguments.texts} texts")
    for name, tiling in protocols.items():
        (tile_s,) = paired_seconds([partial(labels, tiling)], 1, device)
        print(f"  {name}: {_shown(tile_s)}", flush=True)
    print(f"  {PUBLISHED}")


MEASUREMENTS = {"pooling": pooling, "encoder": encoder, "tiles": tiles}


def parse() -> argparse.Namespace:
    """Sizes; the defaults are a 1022-px image under a ViT-L/14."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(MEASUREMENTS), default=list(MEASUREMENTS))
    parser.add_argument("--grid", type=int, default=73, help="patches along each side")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--embedding", type=int, default=768)
    parser.add_argument("--texts", type=int, default=10)
    parser.add_argument("--tile-px", type=int, default=TILE_PX)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    return parser.parse_args()


def main() -> None:
    """Print the chosen measurements."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    is_onednn = arguments.device == "cpu" and use_onednn_products()
    torch.manual_seed(0)
    products = "by oneDNN" if is_onednn else "as torch has them"
    print(f"{arguments.device}, {arguments.threads} threads, float32 products {products}")
    with torch.inference_mode():
        for name in arguments.only:
            MEASUREMENTS[name](arguments)


if __name__ == "__main__":
    main()
