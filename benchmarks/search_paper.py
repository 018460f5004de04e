"""1 B vectors on paper: what one row takes and costs is measured here on a small table, the rest is arithmetic.

Out: bytes a row on disk and in memory, microseconds a row that a filter passes or a search compares, and from these the
size and the time of one search at 1 M, 20 M and 1 B rows, in one process or shared among replicas that each hold a
part and answer with their k best. Assumed, not measured: that the vectors a search compares lie in the page cache, that
a text needs as many lists as at 1 M (`--compared` of a million rows, growing with the root of the rows), and
that k best of each part are merged for nothing. Nothing in rsplatform merges parts yet.
Run: `python benchmarks/search_paper.py [--width 512] [--compared 8000]`
"""

import argparse
import math
import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import torch

from rsplatform.index.filters import SearchFilter
from rsplatform.index.held_rows import HeldRows
from rsplatform.index.nearest import nearest
from rsplatform.index.vector_index import default_lists

ROWS = 400_000
REPEATS = 9
# Of an index of 9,197 chips: its Lance table without vectors (ids, captions, outlines, scenes), 2026-11-25.
COLUMNS_BYTES = 160
# What is held of a row beside the columns of filters: its list, and its place among the rows of the list.
LIST_BYTES = 4 + 8
PART_ROWS = 20_000_000


def cpu_s(call: Callable[[], object]) -> float:
    """Median seconds of CPU of some calls, after one."""
    taken = []
    for _ in range(REPEATS + 1):
        started = time.process_time()
        call()
        taken.append(time.process_time() - started)
    return float(np.median(taken[1:]))


def held_table(rng: np.random.Generator) -> pa.Table:
    """Chips anywhere on Earth, each with a date and one of eight kinds."""
    west, south = rng.uniform(-180, 179, ROWS), rng.uniform(-80, 79, ROWS)
    sides = {"west": west, "south": south, "east": west + 0.01, "north": south + 0.01}
    kinds = pa.array([[f"kind {number % 8}"] for number in range(ROWS)])
    times = pa.array(rng.integers(0, 10**15, ROWS), pa.timestamp("us", "UTC"))
    distance = rng.uniform(0.3, 10, ROWS).astype(np.float32)
    return pa.table(sides | {"datetime": times, "ground_sample_distance_m": distance, "kinds": kinds})


def held_bytes(held: HeldRows) -> float:
    """Bytes a row of the arrays that filters read."""
    arrays = [*held._sides.values(), held._time_us, held._distance_m, *held._rows_of_kind.values()]
    return sum(array.nbytes for array in arrays) / held.num_rows


def main() -> None:
    """Measure, then reckon."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--compared", type=int, default=8_000, help="rows that a search at 1 M compares")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    held = HeldRows(held_table(rng))
    vectors = torch.from_numpy(rng.normal(size=(ROWS // 4, given.width)).astype(np.float16))
    query = rng.normal(size=given.width).astype(np.float32)
    some = np.sort(rng.choice(len(vectors), given.compared, replace=False))
    wanted = SearchFilter(bounds_lonlat=(10, 10, 20, 20))
    filter_us = 1e6 * cpu_s(lambda: held.select(wanted)) / ROWS
    compare_us = 1e6 * cpu_s(lambda: nearest(vectors, query, 10, some)) / len(some)
    centroids = torch.from_numpy(rng.normal(size=(default_lists(10**6), given.width)).astype(np.float32))
    list_us = 1e6 * cpu_s(lambda: torch.argsort(centroids @ torch.from_numpy(query))) / len(centroids)
    # vectors lie in the table and, to be mapped, in a file beside it
    memory, disk = held_bytes(held) + LIST_BYTES, 2 * 2 * given.width + COLUMNS_BYTES
    print(f"a row: {memory:.0f} bytes held, {2 * given.width} mapped, {disk:.0f} on disk; a filter passes one in")
    print(f"{1e3 * filter_us:.2f} ns, a comparison takes {1e3 * compare_us:.0f} ns, a centroid {1e3 * list_us:.0f} ns")
    for rows, parts in ((10**6, 1), (PART_ROWS, 1), (10**9, 1), (10**9, 10**9 // PART_ROWS)):
        each = rows // parts
        lists, compared = default_lists(each), given.compared * math.sqrt(each / 1e6)
        search_ms = (lists * list_us + compared * compare_us) / 1e3
        training = 2.0 * given.width * each * lists / 0.2e12 / 3600
        print(
            f"{rows:>13,} rows in {parts:2d} parts, each: {each * memory / 1e9:6.2f} GB held, "
            f"{each * 2 * given.width / 1e9:7.1f} GB of vectors, {each * disk / 1e9:7.1f} GB on disk; "
            f"{lists:6,} lists, filter {each * filter_us / 1e3:7.1f} ms, search {search_ms:6.1f} ms of CPU; "
            f"{training:6.2f} h to assign at 0.2 TFLOP/s"
        )


if __name__ == "__main__":
    main()
