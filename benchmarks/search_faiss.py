"""FAISS over the rows of benchmarks/search.py, in a process of its own: needs numpy and faiss, nothing of ours.

In: a folder with vectors.npy, bounds.npy and cases.npz. Out: a JSON on stdout: what the build took, and for each case
p50 and recall@10. An IVF of float16 vectors with 2 √N lists; a box is a selector of row numbers, which are found by the
same comparison of bounds that ours makes, timed with it. For each case the fewest lists that reach 0.98.
Run: by search.py.
"""

import importlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

PROBES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
TARGET = 0.98


def inside(bounds_N4: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Which rows lie within a box."""
    west, south, east, north = box
    rows = np.flatnonzero(bounds_N4[:, 0] >= west)
    for side, is_upper, limit in ((2, True, east), (1, False, south), (3, True, north)):
        values = bounds_N4[rows, side]
        rows = rows[values <= limit if is_upper else values >= limit]
    return rows


def ask(faiss: Any, index: Any, bounds_N4: np.ndarray, query_E: np.ndarray, box: np.ndarray, probes: int) -> list[int]:
    """Numbers of the ten nearest rows within a box (NaN: no filter)."""
    if np.isnan(box[0]):
        parameters = faiss.SearchParametersIVF(nprobe=probes)
    else:
        selector = faiss.IDSelectorBatch(inside(bounds_N4, box))
        parameters = faiss.SearchParametersIVF(nprobe=probes, sel=selector)
    return index.search(query_E[None], 10, params=parameters)[1][0].tolist()


def measure(
    faiss: Any, index: Any, bounds_N4: np.ndarray, case: dict[str, np.ndarray], num_lists: int
) -> tuple[dict[str, float], int]:
    """For the first number of lists that reaches the target, else the last; and that number."""
    result: dict[str, float] = {}
    probes = 0
    for probes in [number for number in PROBES if number < num_lists] + [num_lists]:
        seconds, cpu_seconds, found = [], [], 0
        for query_E, box, truth in zip(case["queries"], case["boxes"], case["truths"], strict=True):
            started, cpu_started = time.perf_counter(), time.process_time()
            numbers = ask(faiss, index, bounds_N4, query_E, box, probes)
            seconds.append(time.perf_counter() - started)
            cpu_seconds.append(time.process_time() - cpu_started)
            found += len(set(numbers) & set(truth.tolist()))
        recall = found / case["truths"].size
        p50_ms, cpu_ms = (1e3 * float(np.median(taken)) for taken in (seconds, cpu_seconds))
        result = {"p50_ms": p50_ms, "cpu_ms": cpu_ms, "recall": recall}
        if recall >= TARGET:
            break
    return result, probes


def main() -> None:
    """Build, then one line of JSON."""
    faiss = importlib.import_module("faiss")
    folder = Path(sys.argv[1])
    vectors_NE, bounds_N4 = np.load(folder / "vectors.npy", mmap_mode="r"), np.load(folder / "bounds.npy")
    num_lists = round(2 * np.sqrt(len(vectors_NE)))  # as many as ours
    started, cpu_started = time.perf_counter(), time.process_time()
    width = vectors_NE.shape[1]
    quantizer = faiss.IndexFlatIP(width)
    kind = faiss.ScalarQuantizer.QT_fp16
    index = faiss.IndexIVFScalarQuantizer(quantizer, width, num_lists, kind, faiss.METRIC_INNER_PRODUCT)
    sample = np.linspace(0, len(vectors_NE) - 1, min(len(vectors_NE), 64 * num_lists)).astype(int)
    index.train(vectors_NE[sample].astype(np.float32))
    for start in range(0, len(vectors_NE), 50_000):
        index.add(vectors_NE[start : start + 50_000].astype(np.float32))
    built, built_cpu = time.perf_counter() - started, time.process_time() - cpu_started
    stored = np.load(folder / "cases.npz")
    names = stored["names"].tolist()
    cases, visited = {}, {}
    for number, name in enumerate(names):
        case = {part: stored[f"{part}_{number}"] for part in ("queries", "boxes", "truths")}
        cases[name], visited[name] = measure(faiss, index, bounds_N4, case, num_lists)
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    told = {"version": faiss.__version__, "build_s": built, "build_cpu_s": built_cpu, "peak_gb": peak_gb}
    print(json.dumps(told | {"cases": cases, "probes": visited}))


if __name__ == "__main__":
    main()
