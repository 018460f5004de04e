"""Front door `evaluate`: a model and pinned benchmarks in, an artifact of numbers, pins and pictures out.

Evaluators get functions (embed_images, embed_texts, patch features), never a model class, so any peer is scored
by the same code. Raw and smooth localization share head, upsampling and decision rule.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from typing import Annotated, Any

import numpy as np
import torch
from matplotlib.figure import Figure
from pydantic import Field
from rich.progress import track

from rsplatform.artifacts import Artifact, open_artifact
from rsplatform.cluster import Cluster
from rsplatform.config import ModelArtifact, StageConfig
from rsplatform.evaluate import figures
from rsplatform.evaluate.benchmarks import (
    Benchmark,
    CaptionFolderRetrieval,
    Classification,
    DatasetRetrieval,
    MaskedPicture,
    RetrievalSet,
    Segmentation,
    content,
    load_classification,
    load_retrieval,
    masked_pictures,
    pin,
)
from rsplatform.evaluate.classification import zero_shot_accuracy
from rsplatform.evaluate.files import squares
from rsplatform.evaluate.nearest_colour import NearestColour
from rsplatform.evaluate.segmentation import ConfusionMatrix, decide
from rsplatform.localize.picture import Scale, multi_scale_maps, picture_maps
from rsplatform.localize.scales import MapScale
from rsplatform.localize.window import SmoothWindow
from rsplatform.model.embedder import Embedder, driver_device
from rsplatform.model.preprocess import Square
from rsplatform.model.recall import chance_recall, recall_at_k
from rsplatform.stage import finished, open_stage
from rsplatform.storage import local_folder, write_json

# Takes a figure and the name of its file.
LogPicture = Callable[[Figure, str], None]


class EvaluateConfig(StageConfig):
    """A model and the benchmarks to score it on; `window` is smooth attention's, in patches (our default: 3).

    With `scales`, masks are also compared with maps that average further resolutions and windows.
    """

    model: ModelArtifact
    benchmarks: list[Benchmark] = Field(min_length=1)
    window: Annotated[SmoothWindow, Field(ge=3)] = 3
    scales: list[MapScale] = []


def evaluate(config: EvaluateConfig, cluster: Cluster) -> Artifact:
    """Score a model on pinned retrieval, classification and segmentation benchmarks."""
    done = finished(config, cluster)
    if done:
        return done
    with open_stage(config, cluster) as stage:
        with local_folder(open_artifact(cluster.root, config.model).path("model")) as folder:
            embedder = Embedder.load(folder, driver_device())
        report: dict[str, Any] = {"model": config.model, "model_hash": embedder.model_hash, "benchmarks": {}}
        for benchmark in config.benchmarks:
            result = score(benchmark, config.window, cluster, embedder, stage.run.log_picture, config.scales)
            stage.run.set_tags({f"pin.{benchmark.name}": result["pin"]})
            stage.log(numbers(benchmark.name, result))
            report["benchmarks"][benchmark.name] = result
        write_json(stage.artifact.path("report.json"), report)
        stage.run.log_document(report, "report.json")
        names = len(config.benchmarks)
        stage.counts = {"inputs": names, "kept": names, "dropped": {}}
    return stage.artifact


def score(
    benchmark: Benchmark,
    window: int,
    cluster: Cluster,
    embedder: Embedder,
    log_picture: LogPicture,
    scales: Sequence[MapScale] = (),
) -> dict[str, Any]:
    """One model on one benchmark: its numbers by name, in percent where they are shares, and its `pin`.

    Raises:
        ConfigError: a file of the benchmark is missing or damaged.
    """
    if isinstance(benchmark, DatasetRetrieval | CaptionFolderRetrieval):
        return _retrieval(benchmark, cluster, embedder, log_picture)
    if isinstance(benchmark, Classification):
        return _classification(benchmark, cluster, embedder, log_picture)
    return _segmentation(benchmark, window, cluster, embedder, log_picture, scales)


def numbers(name: str, result: dict[str, Any]) -> dict[str, float]:
    """What `score` gave as metrics, `benchmark/number`; pins and tables by class are left out."""
    return {f"{name}/{key}": float(value) for key, value in result.items() if isinstance(value, int | float)}


def _retrieval(
    benchmark: DatasetRetrieval | CaptionFolderRetrieval, cluster: Cluster, embedder: Embedder, log_picture: LogPicture
) -> dict[str, Any]:
    data = load_retrieval(benchmark, cluster)
    images_IE = retrieval_images(data, embedder, benchmark.name)
    texts = track(data.texts, f"{benchmark.name}: texts", transient=True)
    texts_TE = _embedded(embedder.embed_texts, texts, embedder.batch_size)
    recalls = recall_at_k(images_IE, texts_TE, data.image_of_text)
    chance = chance_recall(len(data.images), len(data.texts))
    log_picture(figures.recall_plot(recalls, chance, benchmark.name), f"{benchmark.name}_recall.png")
    sizes = {"num_images": len(data.images), "num_texts": len(data.texts), "pin": data.pin}
    return recalls | {f"chance_{key}": value for key, value in chance.items()} | sizes


def retrieval_images(data: RetrievalSet, embedder: Embedder, name: str) -> np.ndarray:
    """Unit embeddings (I, E) of the pictures, each at its own scale where that is known; `name` shows the progress."""
    pictures = squares(data.sources, data.images, embedder.image_size, data.ground_sample_distances_m)
    shown = track(pictures, f"{name}: pictures", len(data.images), transient=True)
    return _embedded(partial(_embed_squares, embedder), shown, embedder.batch_size)


def _embed_squares(embedder: Embedder, pictures: Sequence[Square]) -> np.ndarray:
    distances_m = [picture.ground_sample_distance_m for picture in pictures]
    return embedder.embed_images([picture.pixels_HWC for picture in pictures], distances_m)


def _embedded(embed: Callable[[Sequence], np.ndarray], items: Iterable, batch_size: int) -> np.ndarray:
    """Embeddings of all items, of which only a batch is held at a time."""
    stream, rows = iter(items), [embed([])]
    while batch := list(islice(stream, batch_size)):
        rows.append(embed(batch))
    return np.concatenate(rows)


def _classification(
    benchmark: Classification, cluster: Cluster, embedder: Embedder, log_picture: LogPicture
) -> dict[str, Any]:
    data = load_classification(benchmark, cluster)
    pictures = (picture.pixels_HWC for picture in squares(data.sources, data.images, embedder.image_size))
    shown = track(pictures, f"{benchmark.name}: pictures", len(data.images), transient=True)
    scores = zero_shot_accuracy(
        embedder.embed_images, embedder.embed_texts, shown, data.labels, data.class_names, benchmark.prompt
    )
    log_picture(
        figures.bars(scores.accuracy_by_class, f"{benchmark.name}: top-1 by class, %"), f"{benchmark.name}_classes.png"
    )
    return {
        "top1": scores.top1,
        "mean_class_accuracy": scores.mean_class_accuracy,
        "chance_top1": 100 / len(data.class_names),
        "accuracy_by_class": scores.accuracy_by_class,
        "num_images": scores.num_images,
        "pin": data.pin,
    }


def _segmentation(
    benchmark: Segmentation,
    window: int,
    cluster: Cluster,
    embedder: Embedder,
    log_picture: LogPicture,
    scales: Sequence[MapScale],
) -> dict[str, Any]:
    """mIoU raw (window 1), smooth and of several scales on the same pictures, same head, upsampling and argmax over the
    prompts; and what colours alone reach, if the benchmark says where they are from."""
    prompts = [prompt for mask_class in benchmark.classes for prompt in mask_class.prompts]
    class_of_prompt = [index for index, item in enumerate(benchmark.classes) for _ in item.prompts]
    texts_CE = torch.from_numpy(embedder.embed_texts(prompts))
    colours = _nearest_colour(benchmark, cluster)
    matrices: dict[str, ConfusionMatrix] = {}
    names, looks = [], [scale.model_dump() for scale in scales]
    for picture in track(masked_pictures(benchmark, cluster), description=benchmark.name, transient=True):
        names.append((picture.name, content(picture.image_HWC.tobytes()), content(picture.mask_HW.tobytes())))
        maps = _maps(embedder, benchmark, picture, texts_CE, window, scales)
        shape = picture.mask_HW.shape
        labels = {method: decide(maps_PHW, class_of_prompt, shape) for method, maps_PHW in maps.items()}
        found = labels | {method: baseline.labels(picture.image_HWC) for method, baseline in colours.items()}
        for method, labels_HW in found.items():
            matrices.setdefault(method, ConfusionMatrix(len(benchmark.classes))).update(labels_HW, picture.mask_HW)
        if len(names) <= 4:
            figure = figures.label_overlays(picture.image_HWC, picture.mask_HW, labels, benchmark.classes)
            log_picture(figure, f"{benchmark.name}/{picture.name}.png")
            _log_heatmap(log_picture, benchmark, picture, maps["smooth"])
    result: dict[str, Any] = {
        "num_images": len(names),
        "pin": pin([names, benchmark.model_dump(exclude={"folder", "nearest_colour_from"}), window, *looks]),
    }
    for method, matrix in matrices.items():
        scores = matrix.scores()
        named = {benchmark.classes[index].name: iou for index, iou in scores.iou_by_class.items()}
        foreground = [iou for index, iou in scores.iou_by_class.items() if index > 0]
        result[f"{method}_iou_by_class"] = named
        result[f"{method}_miou"] = scores.mean_iou
        result[f"{method}_foreground_miou"] = float(np.mean(foreground)) if foreground else float("nan")
    return result


def _maps(
    embedder: Embedder,
    benchmark: Segmentation,
    picture: MaskedPicture,
    texts_PE: torch.Tensor,
    window: int,
    scales: Sequence[MapScale],
) -> dict[str, torch.Tensor]:
    """maps_PHW by method; raw and smooth share their patches."""
    model_m = benchmark.model_ground_sample_distance_m
    scale = Scale(picture.ground_sample_distance_m / model_m, model_m)
    both = picture_maps(embedder, picture.image_HWC, texts_PE, scale=scale, window=window, narrower=[1])
    maps = {"raw": both[len(texts_PE) :], "smooth": both[: len(texts_PE)]}
    if scales:
        maps["multi_scale"] = multi_scale_maps(
            embedder, picture.image_HWC, texts_PE, scale=scale, window=window, scales=scales
        )
    return maps


def _nearest_colour(benchmark: Segmentation, cluster: Cluster) -> dict[str, NearestColour]:
    """The baseline by its name, if the benchmark asks for it."""
    source = benchmark.colour_source
    if source is None:
        return {}
    pictures = track(masked_pictures(source, cluster), description=f"{benchmark.name}: colours", transient=True)
    return {"nearest_colour": NearestColour(pictures, len(benchmark.classes))}


def _log_heatmap(
    log_picture: LogPicture, benchmark: Segmentation, picture: MaskedPicture, maps_PHW: torch.Tensor
) -> None:
    """The smooth map of the foreground prompt that the picture agrees with most, over the picture."""
    prompts = [(item.name, prompt) for item in benchmark.classes for prompt in item.prompts]
    first = len(benchmark.classes[0].prompts)
    best = first + int(maps_PHW[first:].flatten(1).amax(dim=1).argmax())
    figure = figures.heat_overlay(picture.image_HWC, maps_PHW[best].numpy(), prompts[best][1])
    log_picture(figure, f"{benchmark.name}/{picture.name}_{prompts[best][0]}_heat.png")
