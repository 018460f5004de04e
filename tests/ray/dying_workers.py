"""The stages' own workers, but each kills its process, once, in the middle of its work: for tests of Ray."""

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rsplatform.curate.caption import ReadAndDescribe
from rsplatform.curate.chip_windows import ChipWindow
from rsplatform.curate.cut_chips import ChipRecipe, CutChips, JoinLandmarks
from rsplatform.curate.filter_web import ReadCandidates, ScoreOverhead
from rsplatform.index.embed import ChipEmbedder
from rsplatform.localize.products import MakeProducts
from rsplatform.localize.score_scenes import ScoreRecipe, StripScorer
from rsplatform.sources.scenes import Scene


@dataclass(frozen=True)
class Death:
    """Waits for row `victim`; the file `marker` says that it has come."""

    victim: str
    marker: str

    def meet(self, ids: Sequence[str]) -> None:
        """Kill this process if it is at that row and nobody has died of it."""
        if self.victim in ids:
            try:
                Path(self.marker).touch(exist_ok=False)
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class DyingCutter(CutChips):
    death: Death

    def _cut(self, scene: Scene, strip: Any, window: ChipWindow) -> dict[str, Any]:
        row = super()._cut(scene, strip, window)
        self.death.meet([row["id"]])
        return row


class DyingJoiner(JoinLandmarks):
    def __init__(self, uri: str, recipe: ChipRecipe, death: Death) -> None:
        super().__init__(uri, recipe)
        self._death = death

    def __call__(self, table: pa.Table) -> pa.Table:
        joined = super().__call__(table)
        self._death.meet(table["id"].to_pylist())
        return joined


@dataclass(frozen=True)
class DyingDescriber(ReadAndDescribe):
    death: Death

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        self.death.meet([row["id"]])
        return super()._row(row)


@dataclass(frozen=True)
class DyingReader(ReadCandidates):
    death: Death

    def _row(self, candidate: Any, content: Any, near: Any) -> dict[str, Any]:
        self.death.meet([candidate.id])
        return super()._row(candidate, content, near)


class DyingScorer(ScoreOverhead):
    def __init__(self, overhead_uri: str, death: Death) -> None:
        super().__init__(overhead_uri)
        self._death = death

    def __call__(self, table: pa.Table) -> pa.Table:
        scored = super().__call__(table)
        self._death.meet(table["id"].to_pylist())
        return scored


class DyingEmbedder(ChipEmbedder):
    def __init__(self, root: str, model_ref: str, captions: Mapping[str, str], death: Death) -> None:
        super().__init__(root, model_ref, captions)
        self._death = death

    def _columns(self, chips: pa.Table, vectors_IE: np.ndarray) -> dict[str, pa.Array]:
        self._death.meet(chips["id"].to_pylist())
        return super()._columns(chips, vectors_IE)


class DyingStripScorer(StripScorer):
    def __init__(self, root: str, model_ref: str, recipe: ScoreRecipe, device: str, death: Death) -> None:
        super().__init__(root, model_ref, recipe, device)
        self._death = death

    def __call__(self, table: pa.Table) -> pa.Table:
        scored = super().__call__(table)
        self._death.meet(table["id"].to_pylist())
        return scored


@dataclass(frozen=True)
class DyingProducer(MakeProducts):
    death: Death

    def __call__(self, table: pa.Table) -> pa.Table:
        made = super().__call__(table)
        self.death.meet(table["id"].to_pylist())
        return made
