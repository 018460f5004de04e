"""The columns that searches are narrowed by, held in memory: a filter in, the numbers of the rows that pass it out.

LanceDB's own filter of a box costs 330 ms over 1 M rows with an index on each side (two ranges of half the table each
are read and crossed); one pass over 32 MB costs 1 to 2 ms. About 50 bytes a row. It compares no vectors.
Shapes: N rows of the table, in its order.
"""

from collections.abc import Callable, Iterator
from datetime import datetime

import numpy as np
import pyarrow as pa

from rsplatform.index.filters import SearchFilter

HELD_COLUMNS = ["west", "south", "east", "north", "datetime", "ground_sample_distance_m", "kinds"]
_NO_TIME = np.iinfo(np.int64).min
Rows = np.ndarray | slice
Condition = Callable[[Rows], np.ndarray]


class HeldRows:
    """What filters ask of each row. `table` has HELD_COLUMNS."""

    def __init__(self, table: pa.Table) -> None:
        self.num_rows = table.num_rows
        self._sides = {name: table[name].to_numpy() for name in ("west", "south", "east", "north")}
        self._time_us = table["datetime"].cast(pa.int64()).fill_null(_NO_TIME).to_numpy()
        self._distance_m = table["ground_sample_distance_m"].to_numpy()
        self._rows_of_kind = _rows_of_kind(table["kinds"].combine_chunks())

    def kind_counts(self) -> dict[str, int]:
        """How many chips show each kind of landmark, most frequent first."""
        counted = ((len(rows), kind) for kind, rows in self._rows_of_kind.items())
        return {kind: count for count, kind in sorted(counted, reverse=True)}

    def select(self, wanted: SearchFilter) -> np.ndarray | None:
        """The rows that pass, in ascending order; None if the filter lets all pass. `excluded_id` is not seen to."""
        rows: np.ndarray | None = None
        for condition in self._conditions(wanted):
            rows = np.flatnonzero(condition(slice(None))) if rows is None else rows[condition(rows)]
        return rows

    def _conditions(self, wanted: SearchFilter) -> Iterator[Condition]:
        if wanted.bounds_lonlat:
            yield from self._place(wanted)
        start, end = wanted.interval
        if start or end:
            first, last = (_NO_TIME + 1 if start is None else _us(start)), (None if end is None else _us(end))
            yield lambda rows: self._time_us[rows] >= first
            if last is not None:
                yield lambda rows: self._time_us[rows] <= last
        if wanted.ground_sample_distance_m:
            # in the column's own precision: 0.6 m is asked for as it is stored
            low, high = (np.float32(side) for side in wanted.ground_sample_distance_m)
            yield lambda rows: (self._distance_m[rows] >= low) & (self._distance_m[rows] <= high)
        if wanted.kinds:
            shown = np.zeros(self.num_rows, dtype=bool)
            for kind in wanted.kinds:
                shown[self._rows_of_kind.get(kind, [])] = True
            yield lambda rows: shown[rows]

    def _place(self, wanted: SearchFilter) -> Iterator[Condition]:
        assert wanted.bounds_lonlat is not None, "the caller's branch"
        box_west, box_south, box_east, box_north = wanted.bounds_lonlat
        west, south, east, north = (self._sides[name] for name in ("west", "south", "east", "north"))
        # within: the chip's outer sides lie inside the box; intersects: its near sides do
        left, low, right, high = (
            (west, south, east, north) if wanted.relation == "within" else (east, north, west, south)
        )
        if box_west <= box_east:
            yield lambda rows: left[rows] >= box_west
            yield lambda rows: right[rows] <= box_east
        else:
            # a chip inside a box that crosses 180° lies wholly on one side of it
            inside = west <= east if wanted.relation == "within" else np.ones(self.num_rows, dtype=bool)
            yield lambda rows: inside[rows] & ((left[rows] >= box_west) | (right[rows] <= box_east))
        yield lambda rows: low[rows] >= box_south
        yield lambda rows: high[rows] <= box_north


def _us(time: datetime) -> int:
    return pa.scalar(time, pa.timestamp("us", "UTC")).cast(pa.int64()).as_py()


def _rows_of_kind(kinds: pa.ListArray) -> dict[str, np.ndarray]:
    """For each kind the rows that show it, ascending."""
    values = kinds.flatten().dictionary_encode()
    codes = values.indices.to_numpy(zero_copy_only=False)
    rows = np.repeat(np.arange(len(kinds), dtype=np.int64), kinds.value_lengths().fill_null(0).to_numpy())
    order = np.argsort(codes, kind="stable")
    ends = np.searchsorted(codes[order], np.arange(len(values.dictionary) + 1))
    return {
        kind: np.unique(rows[order[ends[code] : ends[code + 1]]])
        for code, kind in enumerate(values.dictionary.to_pylist())
    }
