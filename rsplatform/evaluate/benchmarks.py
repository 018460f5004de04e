"""Pinned benchmarks: which pictures, texts, classes and masks, with a hash that is printed beside every number.

One model on one set gets different numbers in different papers because splits, prompts and class lists differ.
Here they are part of the recipe; `pin` is the hash of all of them. Pictures are read lazily; nothing is embedded.
"""

import fnmatch
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from rsplatform.cluster import Cluster
from rsplatform.config import Config, ConfigError, DatasetArtifact, InputPath, Text
from rsplatform.dataset.store import SampleStore
from rsplatform.evaluate.classification import PROMPT
from rsplatform.evaluate.files import bytes_of, caption_entries, label_rows, read_mask, read_picture
from rsplatform.storage import list_files


class DatasetRetrieval(Config):
    """Retrieval on one split of a dataset artifact: its pictures, all their captions."""

    type: Literal["dataset_retrieval"] = "dataset_retrieval"
    name: str
    dataset: DatasetArtifact
    split: str = "val"
    max_images: int = Field(default=5000, ge=2)


class CaptionFolderRetrieval(Config):
    """Retrieval on RSICD's layout (`dataset_*.json` beside an image folder), as UCM, Sydney and RSITMD use too."""

    type: Literal["caption_folder_retrieval"] = "caption_folder_retrieval"
    name: str
    captions: InputPath
    images: InputPath
    split: str = "val"
    max_images: int | None = Field(default=None, ge=2)


class Classification(Config):
    """Zero-shot classification of a table `file,label`; `class_names` spells labels as words of the prompt.

    `extra_classes` compete without owning a picture.
    """

    type: Literal["classification"] = "classification"
    name: str
    folder: InputPath
    table: str = "labels.csv"
    class_names: dict[str, str] = {}
    extra_classes: list[str] = []
    prompt: Text = PROMPT
    max_images: int | None = Field(default=None, ge=2)

    def select_files(self, names: Sequence[str]) -> list[str]:
        """The table and whatever it may name; ConfigError without the table."""
        if self.table not in names:
            raise ConfigError(f"no {self.table}; fix `folder` or `table` of {self.name}")
        return list(names)


class MaskClass(Config):
    """One class of a mask: the pixel values (or #RRGGBB colours) that mean it, and the prompts that ask for it."""

    name: str
    values: list[int | str] = Field(min_length=1)
    prompts: list[Text] = Field(min_length=1)


class Segmentation(Config):
    """Pictures and masks whose paths differ by replacements. Class 0 is the background; other values are ignored.

    Pictures are resampled to `model_ground_sample_distance_m` before the model sees them; without georeference
    their own scale is `image_ground_sample_distance_m`. `nearest_colour_from` names other pictures with masks, whose
    colours alone are a baseline (nearest_colour.py).
    """

    type: Literal["segmentation"] = "segmentation"
    name: str
    folder: InputPath
    images: str
    mask_replace: dict[str, str]
    classes: list[MaskClass] = Field(min_length=2)
    model_ground_sample_distance_m: float = Field(gt=0)
    image_ground_sample_distance_m: float | None = Field(default=None, gt=0)
    max_images: int | None = Field(default=None, ge=1)
    nearest_colour_from: str | None = None

    @property
    def colour_source(self) -> "Segmentation | None":
        """The same over the pictures whose colours are the baseline; None if it is not asked for."""
        if self.nearest_colour_from is None:
            return None
        other = {"images": self.nearest_colour_from, "max_images": None, "nearest_colour_from": None}
        return self.model_copy(update=other)

    def pictures_of(self, names: Sequence[str]) -> list[str]:
        """The pictures among the files below `folder`, in order; ConfigError if there is none."""
        pieces = self.images.split("/")
        found = [name for name in names if _matches(name.split("/"), pieces)]
        if not found:
            raise ConfigError(f"no picture matches {self.images!r}; fix `images` of {self.name}")
        return spread(sorted(found, key=lambda name: name.split("/")), self.max_images)

    def mask_of(self, picture: str) -> str:
        """The mask's file, below `folder` as the picture is."""
        for old, new in self.mask_replace.items():
            picture = picture.replace(old, new)
        return picture

    def select_files(self, names: Sequence[str]) -> list[str]:
        """Pictures and their masks; ConfigError if one is missing."""
        pictures = self.pictures_of(names)
        masks = [self.mask_of(picture) for picture in pictures]
        there = set(names)
        missing = [f"{mask}, the mask of {own}" for own, mask in zip(pictures, masks, strict=True) if mask not in there]
        if missing:
            raise ConfigError(
                f"no {missing[0]} ({len(missing)} missing); fix `mask_replace` of {self.name}, or restore it"
            )
        others = self.colour_source.select_files(names) if self.colour_source else []
        return list(dict.fromkeys([*pictures, *masks, *others]))


Benchmark = Annotated[
    DatasetRetrieval | CaptionFolderRetrieval | Classification | Segmentation, Field(discriminator="type")
]


@dataclass(frozen=True)
class RetrievalSet:
    """Encoded pictures and where they come from, texts, and which picture each text belongs to.

    Distances are metres per pixel of the encoded pictures, NaN where unknown.
    """

    images: list[bytes]
    ground_sample_distances_m: list[float]
    sources: list[str]
    texts: list[str]
    image_of_text: list[int]
    pin: str


@dataclass(frozen=True)
class ClassificationSet:
    """Encoded pictures and their files, their class indices and the class names as the prompt spells them."""

    images: list[bytes]
    sources: list[str]
    labels: list[int]
    class_names: list[str]
    pin: str


@dataclass(frozen=True)
class MaskedPicture:
    """uint8 pixels (H, W, 3), class ids (H, W) with 255 ignored, and the picture's scale in metres a pixel."""

    name: str
    image_HWC: np.ndarray
    mask_HW: np.ndarray
    ground_sample_distance_m: float


def pin(document: Any) -> str:
    """First 12 hex digits of the sha256 of whatever decides a number."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:12]


def load_retrieval(benchmark: DatasetRetrieval | CaptionFolderRetrieval, cluster: Cluster) -> RetrievalSet:
    """Pictures and captions in a fixed order (by name); `max_images` takes an even spread, not the first ones.

    Raises:
        ConfigError: the captions or a picture that they name are missing or damaged, or the split is empty.
    """
    if isinstance(benchmark, DatasetRetrieval):
        store = SampleStore(cluster.root, benchmark.dataset, benchmark.split)
        ids = store.all_ids()
        order = spread(sorted(range(len(store)), key=lambda i: ids[i]), benchmark.max_images)
        names = [ids[i] for i in order]
        samples = store.read(np.array(order))
        captions = [list(sample.captions) for sample in samples]
        images, distances_m = zip(*((sample.image, sample.ground_sample_distance_m) for sample in samples), strict=True)
        sources = [f"{benchmark.dataset}, sample {name!r}" for name in names]
    else:
        folder = cluster.resolve(benchmark.images).rstrip("/")
        captions_path = cluster.resolve(benchmark.captions)
        entries = _caption_entries(captions_path, benchmark.split)
        entries = spread(entries, benchmark.max_images)
        names = [name for name, _ in entries]
        captions = [sentences for _, sentences in entries]
        sources = [f"{folder}/{name}" for name in names]
        remedy = f"{captions_path} names it: fix `images` of {benchmark.name} or restore the file"
        images = [bytes_of(source, remedy) for source in sources]
        distances_m = [math.nan] * len(images)
    texts = [text for group in captions for text in group]
    owners = [index for index, group in enumerate(captions) for _ in group]
    pinned = pin([names, captions, [content(image) for image in images]])
    return RetrievalSet(list(images), list(distances_m), sources, texts, owners, pinned)


def content(data: bytes) -> str:
    """First 12 hex digits of the sha256 of some bytes."""
    return hashlib.sha256(data).hexdigest()[:12]


def _caption_entries(path: str, split: str) -> list[tuple[str, list[str]]]:
    entries = caption_entries(path)
    chosen = [(name, sentences) for own, name, sentences in entries if own == split]
    if not chosen:
        raise ConfigError(f"{path}: no pictures in split {split!r}; it has {sorted({own for own, _, _ in entries})}")
    return sorted(chosen)


def load_classification(benchmark: Classification, cluster: Cluster) -> ClassificationSet:
    """Pictures of the table in file order, classes in alphabetical order of their labels.

    Raises:
        ConfigError: the table or a picture that it names is missing or damaged, or `class_names` knows no such label.
    """
    folder = cluster.resolve(benchmark.folder).rstrip("/")
    table = f"{folder}/{benchmark.table}"
    rows = spread(sorted(label_rows(table), key=lambda row: row[0]), benchmark.max_images)
    labels = sorted({label for _, label in rows})
    unknown = set(benchmark.class_names) - set(labels)
    if unknown:
        raise ConfigError(f"{benchmark.name}: class_names {sorted(unknown)} are no labels of {table}: {labels}")
    names = [benchmark.class_names.get(label) or label for label in labels] + benchmark.extra_classes
    sources = [f"{folder}/{file}" for file, _ in rows]
    images = [bytes_of(source, f"{table} names it: restore the file or its line") for source in sources]
    indices = [labels.index(label) for _, label in rows]
    keys = [(file, label, content(image)) for (file, label), image in zip(rows, images, strict=True)]
    pinned = pin([keys, names, benchmark.prompt])
    return ClassificationSet(images, sources, indices, names, pinned)


def masked_pictures(benchmark: Segmentation, cluster: Cluster) -> Iterator[MaskedPicture]:
    """One picture with its mask at a time, in name order.

    Raises:
        ConfigError: nothing matches `images`; a picture or mask is missing, damaged or of another size than the
            other; or a scale is unknown.
    """
    folder = cluster.resolve(benchmark.folder).rstrip("/")
    try:
        pictures = benchmark.pictures_of(list(list_files(folder)))
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from None
    for name in pictures:
        picture, mask = f"{folder}/{name}", f"{folder}/{benchmark.mask_of(name)}"
        image_HWC, scale = read_picture(picture)
        scale = scale or benchmark.image_ground_sample_distance_m
        if scale is None:
            raise ConfigError(f"{picture}: has no georeference; set image_ground_sample_distance_m of {benchmark.name}")
        mask_HW = encode_mask(read_mask(mask, picture), benchmark.classes)
        if mask_HW.shape != image_HWC.shape[:2]:
            raise ConfigError(f"{mask}: {mask_HW.shape} is not the size of {picture} {image_HWC.shape[:2]}")
        yield MaskedPicture(name.rpartition("/")[2], image_HWC, mask_HW, scale)


def _matches(parts: Sequence[str], pieces: Sequence[str]) -> bool:
    """Whether a name fits a glob, both cut at their slashes; ** stands for any number of folders."""
    if not pieces or not parts:
        return not pieces and not parts
    if pieces[0] == "**":
        return _matches(parts, pieces[1:]) or _matches(parts[1:], pieces)
    return fnmatch.fnmatchcase(parts[0], pieces[0]) and _matches(parts[1:], pieces[1:])


def encode_mask(raw: np.ndarray, classes: list[MaskClass]) -> np.ndarray:
    """Mask values or colours as class ids (H, W) uint8; values that no class names become 255 (ignored)."""
    if raw.ndim == 3:
        raw = raw[..., 0].astype(np.int64) << 16 | raw[..., 1].astype(np.int64) << 8 | raw[..., 2]
    encoded = np.full(raw.shape, 255, dtype=np.uint8)
    for index, mask_class in enumerate(classes):
        values = [int(value.lstrip("#"), 16) if isinstance(value, str) else value for value in mask_class.values]
        encoded[np.isin(raw, values)] = index
    return encoded


def spread(items: list[Any], limit: int | None) -> list[Any]:
    """At most `limit` items, evenly spread over the list."""
    if limit is None or len(items) <= limit:
        return items
    return [items[i * len(items) // limit] for i in range(limit)]
