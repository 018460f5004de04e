"""What smoothing is worth: mIoU of one model's maps read out in different ways, in one table.

In: recipes of `evaluate`, for their model and their mask sets. Out: a line per way, a column per mask set. All rows
share the weights, the head, the upsampling and the argmax over prompts; no number in here was chosen from masks.
Rows are of two kinds: the way that patches attend to each other in the last block (as trained, or to what is like them,
as SCLIP does, arXiv 2312.01597), and the pooling over windows. Rows of one group share their tiles and their blending.
Run: `python benchmarks/ablate_smoothing.py configs/evaluate/world.yaml --root artifacts`
"""

import argparse
import copy
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from rsplatform.artifacts import open_artifact
from rsplatform.cluster import Cluster
from rsplatform.config import load_config
from rsplatform.evaluate.benchmarks import Segmentation, masked_pictures
from rsplatform.evaluate.run import EvaluateConfig
from rsplatform.evaluate.segmentation import ConfusionMatrix, decide
from rsplatform.localize.picture import Scale, multi_scale_maps, picture_maps
from rsplatform.localize.scales import MapScale
from rsplatform.model.embedder import Embedder, driver_device
from rsplatform.model.transformer import EncoderBlock, SelfAttention
from rsplatform.model.vision_encoder import PatchFeatures
from rsplatform.storage import local_folder

WINDOWS = (7, 5, 3, 1)
ALIKE = {"value-value": "v", "query-query": "q", "key-key": "k", "query-query + key-key (SCLIP)": "qk"}
# Takes pixels, unit texts and the scale; gives maps_PHW by the name of their row.
Readout = Callable[[np.ndarray, Tensor, Scale], dict[str, Tensor]]


class AlikeAttention(SelfAttention):
    """Attention of a trained layer to what is alike: weights from values, queries or keys with themselves.

    Of two kinds the sum, as SCLIP has it: softmax(q·q) + softmax(k·k), each over √d.
    """

    def __init__(self, trained: SelfAttention, kinds: str) -> None:
        torch.nn.Module.__init__(self)
        self.num_heads, self.qkv, self.out, self.kinds = trained.num_heads, trained.qkv, trained.out, kinds

    def attend(self, qkv_BTX: Tensor, *, causal: bool = False, mask_B11T: Tensor | None = None) -> Tensor:
        """Packed (B, T, 3 D) -> (B, T, D); a vision encoder knows neither causality nor padding."""
        assert not causal and mask_B11T is None
        parts = qkv_BTX.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        named = dict(zip("qkv", parts, strict=True))
        mixed = [F.scaled_dot_product_attention(named[kind], named[kind], named["v"]) for kind in self.kinds]
        return torch.stack(mixed).sum(dim=0).transpose(1, 2).flatten(2)


class MeanPooled(Embedder):
    """The same model without its pooling scores: every patch of a window counts alike."""

    def patch_features(self, images_BHWC: Tensor, ground_sample_distance_m: float = float("nan")) -> PatchFeatures:
        """As Embedder's, without scores."""
        return super().patch_features(images_BHWC, ground_sample_distance_m)._replace(scores_BKHW=None)


def attending_alike(embedder: Embedder, kinds: str) -> Embedder:
    """The same weights, whose last block attends to what is alike."""
    model = copy.deepcopy(embedder.model)
    last = model.vision.blocks[-1]
    assert isinstance(last, EncoderBlock)
    last.attention = AlikeAttention(last.attention, kinds)
    return Embedder(model, embedder.tokenizer)


def readouts(embedder: Embedder) -> list[Readout]:
    """Every way of the table, in its order; ways that share patches are read out together."""
    has_scores = embedder.model.config.vision.pooling == "map"
    poolings: dict[str, Embedder] = {"window mean": MeanPooled(embedder.model, embedder.tokenizer)}
    if has_scores:  # else the window mean is what the model pools by
        poolings["window softmax"] = embedder
    ways: list[Readout] = [partial(_windows, pooled, f"{name}, w = {{}}", (3, 1)) for name, pooled in poolings.items()]
    for name, kinds in ALIKE.items():
        ways.append(partial(_windows, attending_alike(embedder, kinds), f"{name} attention, w = {{}}", (3, 1)))
    half, double = (MapScale(relative_resolution=resolution) for resolution in (0.5, 2.0))
    ways.append(partial(_scales, embedder, "w = 3 at resolutions 1 and 1/2", [half]))
    ways.append(partial(_scales, embedder, "w = 3 at resolutions 1, 1/2 and 2", [half, double]))
    larger = f"{{}}, w = {{{{}}}}, tiles for w = {WINDOWS[0]}"
    ways += [partial(_windows, pooled, larger.format(name), WINDOWS) for name, pooled in poolings.items()]
    return ways


def _windows(
    embedder: Embedder, name: str, windows: tuple[int, ...], image_HWC: np.ndarray, texts_PE: Tensor, scale: Scale
) -> dict[str, Tensor]:
    widest, *narrower = windows
    maps = picture_maps(embedder, image_HWC, texts_PE, scale=scale, window=widest, narrower=narrower)
    found = dict(zip(windows, maps.split(len(texts_PE)), strict=True))
    by_row = {name.format(window): found[window] for window in sorted(windows)}
    if len(windows) > 2:
        by_row[name.format("1, 3, 5, 7 averaged")] = torch.stack(list(found.values())).mean(dim=0)
    return by_row


def _scales(
    embedder: Embedder, name: str, scales: list[MapScale], image_HWC: np.ndarray, texts_PE: Tensor, scale: Scale
) -> dict[str, Tensor]:
    return {name: multi_scale_maps(embedder, image_HWC, texts_PE, scale=scale, window=3, scales=scales)}


def evaluated(benchmark: Segmentation, cluster: Cluster, embedder: Embedder) -> dict[str, tuple[float, float]]:
    """Row → mIoU over all classes, and over those of the foreground, in percent."""
    prompts = [prompt for mask_class in benchmark.classes for prompt in mask_class.prompts]
    class_of_prompt = [index for index, item in enumerate(benchmark.classes) for _ in item.prompts]
    texts_PE = torch.from_numpy(embedder.embed_texts(prompts))
    ways, matrices = readouts(embedder), dict[str, ConfusionMatrix]()
    for picture in track(masked_pictures(benchmark, cluster), description=benchmark.name, transient=True):
        model_m = benchmark.model_ground_sample_distance_m
        scale = Scale(picture.ground_sample_distance_m / model_m, model_m)
        for way in ways:
            for row, maps_PHW in way(picture.image_HWC, texts_PE, scale).items():
                labels_HW = decide(maps_PHW, class_of_prompt, picture.mask_HW.shape)
                matrix = matrices.setdefault(row, ConfusionMatrix(len(benchmark.classes)))
                matrix.update(labels_HW, picture.mask_HW)
    scores = {row: matrix.scores() for row, matrix in matrices.items()}
    foreground = {row: [iou for label, iou in found.iou_by_class.items() if label] for row, found in scores.items()}
    return {row: (found.mean_iou, float(np.mean(foreground[row]))) for row, found in scores.items()}


def parse() -> argparse.Namespace:
    """Recipes, and where their artifacts and data are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", type=Path, nargs="+", help="of evaluate: a model and its mask sets")
    parser.add_argument("--root", default="artifacts", help="where the recipes' artifacts are")
    parser.add_argument("--max-images", type=int, help="of each mask set, evenly spread; by default the recipe's")
    parser.add_argument("--data-root", default=os.environ.get("RSPLATFORM_TEST_DATA", ""), help="of recipes' paths")
    return parser.parse_args()


def main() -> None:
    """Print the table: rows are ways, columns mask sets, `mIoU (of the foreground)` in percent."""
    arguments = parse()
    cluster = Cluster(root=arguments.root, data_root=arguments.data_root)
    columns: dict[str, dict[str, tuple[float, float]]] = {}
    for recipe in arguments.recipes:
        config = load_config(EvaluateConfig, recipe)
        with local_folder(open_artifact(cluster.root, config.model).path("model")) as folder:
            embedder = Embedder.load(folder, driver_device())
        for benchmark in config.benchmarks:
            if isinstance(benchmark, Segmentation):
                limit = arguments.max_images or benchmark.max_images
                fewer = benchmark.model_copy(update={"max_images": limit})
                columns[benchmark.name] = evaluated(fewer, cluster, embedder)
    print(f"| mIoU, % (of the foreground) | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for row in dict.fromkeys(row for column in columns.values() for row in column):
        cells = [f"{column[row][0]:.1f} ({column[row][1]:.1f})" if row in column else "" for column in columns.values()]
        print(f"| {row} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
