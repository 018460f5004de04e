"""Search in one replica: the embedder, the index, the chips' pictures and the scene catalogue, opened together.

In: an API request and its query vector. Out: hits and API results. It encodes pictures and looks up chips; where in
a chip the answer is, is localization.py's work.
"""

import base64
import hashlib
import math
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np

from rsplatform.artifacts import open_artifact
from rsplatform.cluster import Cluster
from rsplatform.config import ConfigError
from rsplatform.index.embed import load_embedder
from rsplatform.index.filters import SearchFilter, parse_interval
from rsplatform.index.store import ChipIndex, Hit
from rsplatform.model.preprocess import read_square
from rsplatform.serve.api import INLINE_PNG, MAX_IMAGE_PIXELS, SearchRequest, SearchResult, Spot, image_bytes
from rsplatform.serve.catalogue import Place, box, corners, read_catalogue
from rsplatform.serve.chip_pictures import ChipPictures
from rsplatform.serve.localization import Peak, find_peak, heatmap_png


class Retrieval:
    """Everything a search needs, for one pinned model, index and the chips artifacts that the index was made of.

    Raises:
        ArtifactError: one of them is missing or unfinished.
        ConfigError: the index was built with another model, or holds chips of an artifact that is not named.
    """

    def __init__(
        self, cluster: Cluster, model_ref: str, index_ref: str, chips: str | Sequence[str], device: str = "cpu"
    ) -> None:
        chips_refs = [chips] if isinstance(chips, str) else list(chips)
        self.embedder = load_embedder(cluster.root, model_ref, device)
        artifact = open_artifact(cluster.root, index_ref)
        self.index = ChipIndex(artifact.uri, self.embedder.model_hash)
        # links carry it, so that what a browser keeps of an earlier model or index is not shown for a later one
        self.state = hashlib.sha256(f"{self.embedder.model_hash} {artifact.fingerprint()}".encode()).hexdigest()[:12]
        unnamed = sorted(self.index.chips_refs() - set(chips_refs))
        if unnamed:
            raise ConfigError(
                f"{index_ref} holds pictures of {', '.join(unnamed[:3])}, served are those of "
                f"{', '.join(chips_refs) or 'no chips'}: name in `chips` every artifact that the index was made of"
            )
        self.catalogue = read_catalogue(cluster.root, chips_refs, cluster.resolve)
        self.pictures = ChipPictures(cluster.root, cluster.resolve)
        self._refs = {"model": model_ref, "index": index_ref, "chips": chips_refs}

    def picture(self, image: str) -> np.ndarray:
        """Pixels of a base64 picture of a request, as the model sees it.

        Raises:
            ValueError: not base64, or (ImageError) no acceptable picture.
        """
        data = image_bytes(image)
        return read_square(data, self.embedder.image_size, max_pixels=MAX_IMAGE_PIXELS).pixels_HWC

    def search(self, request: SearchRequest, vector_E: np.ndarray) -> list[Hit]:
        """The hits of a request whose query has this vector, best first."""
        search_filter = SearchFilter(
            bounds_lonlat=request.bbox,
            relation=request.bbox_relation,
            interval=parse_interval(request.datetime) if request.datetime else (None, None),
            ground_sample_distance_m=request.gsd_m,
            kinds=tuple(request.kinds),
            excluded_id=request.chip_id,
        )
        return self.index.search(vector_E, request.k, search_filter)

    def chip(self, chip_id: str) -> Hit:
        """One chip of the index; KeyError if it is not there."""
        return self.index.get([chip_id])[chip_id]

    def result(self, hit: Hit, request: SearchRequest, version: str) -> SearchResult:
        """A hit as the API tells it, found by a version of the service."""
        text, like, without = request.text, request.chip_id, request.without
        place = self.catalogue.place_of(hit)
        return SearchResult(
            chip_id=hit.id,
            score=hit.score,
            bounds_lonlat=hit.bounds_lonlat if place else None,
            corners_lonlat=corners(place) if place else None,
            scene=hit.scene,
            datetime=rfc3339(hit.datetime) if hit.datetime else None,
            ground_sample_distance_m=None if math.isnan(known_m(hit)) else known_m(hit),
            caption=hit.caption,
            kinds=list(hit.kinds),
            thumbnail_url=f"/chips/{quote(hit.id, safe='')}.jpg?{urlencode(self._pins(version))}",
            heatmap_url=self.heatmap_url(hit.id, version, text, like, without),
        )

    def heatmap_url(
        self, chip_id: str, version: str, text: str | None, like: str | None = None, without: Sequence[str] = ()
    ) -> str | None:
        """Path of a chip's heatmap for a text or for likeness to another chip; None for an uploaded picture."""
        query = [("text", text)] if text else [("like", like)] if like else []
        query += [*(("without", each) for each in without), *self._pins(version)]
        return f"/heatmaps/{quote(chip_id, safe='')}.png?{urlencode(query)}" if text or like else None

    def _pins(self, version: str) -> list[tuple[str, str]]:
        """What of a link says by whom it is to be answered, and from what."""
        return [("version", version), ("state", self.state)]

    @cached_property
    def stats(self) -> dict[str, Any]:
        """What is served: artifact refs, the model, counts, kinds of landmarks and scenes."""
        meta = self.index.meta
        return {
            **self._refs,
            "model_hash": meta.model_hash,
            "embedding_width": meta.embedding_width,
            "image_size_px": self.embedder.image_size,
            "num_chips": meta.num_rows,
            "search": meta.search,
            "kinds": self.index.kinds(),
            "datetime": [rfc3339(time) for time in times] if (times := self.index.datetimes()) else None,
            "gsd_m": self.index.ground_sample_distances_m(),
            "scenes": [scene.summary() for scene in self.catalogue.scenes.values()],
        }


def rfc3339(time: datetime) -> str:
    """A time in UTC as the API tells it."""
    return time.isoformat().replace("+00:00", "Z")


def known_m(hit: Hit) -> float:
    """Metres a pixel of a chip as its index knows them; NaN where it knows none."""
    return math.nan if hit.ground_sample_distance_m is None else hit.ground_sample_distance_m


def looked_at(scores_HW: np.ndarray, place: Place | None, is_inline: bool) -> dict[str, Any]:
    """What a map of a hit adds to its result. `is_inline`: the heatmap itself, where no link can ask for it again."""
    added: dict[str, Any] = {"spot": spot(find_peak(scores_HW), place)}
    if is_inline:
        added["heatmap_url"] = INLINE_PNG + base64.b64encode(heatmap_png(scores_HW)).decode()
    return added


def spot(peak: Peak, place: Place | None) -> Spot:
    """A peak as the API tells it, with its place on Earth if the picture has one."""
    fractions = (peak.row_fraction, peak.column_fraction)
    return Spot(
        score=peak.score,
        peak_fraction=fractions,
        box_fraction=peak.box_fraction,
        peak_lonlat=place(*fractions) if place else None,
        box_lonlat=box(place, peak.box_fraction) if place else None,
    )
