"""Search in an index of 1 M × 512 vectors, with a box on the map and without: ours, FAISS and bare LanceDB.

In: a model's folder and RSICD. Out: a table of p50 and recall@10 for each share of the rows that a box holds, one
query after the other, and of build times and peak memory. Vectors are real embeddings of RSICD's pictures; copies of
them, jittered to the distance of a real tenth neighbour, make up the number (search_data.py); queries are captions.
A query of ours ends with the ten rows' columns read; FAISS's ends with their numbers.

Bare LanceDB compares every row that its filter leaves: its IVF-PQ over this many float16 vectors is not trained within
20 minutes on 2 cores (vector_index.py). `--data` keeps the made rows in a folder, and takes them from there.

1 B vectors, on paper: benchmarks/search_paper.py.
Run: `python benchmarks/search.py MODEL_FOLDER …/rsicd [--rows 1000000] [--faiss-python PYTHON] [--data FOLDER]`
"""

import argparse
import json
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lance
import numpy as np
import pyarrow as pa
import torch
from lancedb.index import BTree
from search_data import Data, inside, kept_data, make_data, random_box

from rsplatform.index.filters import SearchFilter
from rsplatform.index.finish import EXACT_BELOW_ROWS, finish_index
from rsplatform.index.store import ChipIndex
from rsplatform.index.table import ROWS_PATH, index_schema, open_lancedb

FRACTIONS = {"box ≤ 0.1 %": 0.001, "box ≤ 1 %": 0.01, "box ≤ 25 %": 0.25, "no filter": 1.0}
MODEL_HASH = "0" * 64
BARE_QUERIES = 8
SIDES = ("west", "south", "east", "north")
Box = tuple[float, float, float, float]


class Case(NamedTuple):
    """Queries of one share: their vectors, boxes (None: no filter) and the numbers of the ten nearest rows."""

    queries_QE: np.ndarray
    boxes: list[Box | None]
    truths_QK: np.ndarray

    def first(self, number: int) -> "Case":
        """So many of the queries."""
        return Case(self.queries_QE[:number], self.boxes[:number], self.truths_QK[:number])


class Measured(NamedTuple):
    """Medians in milliseconds, by the clock and of all threads' CPU time (which a busy machine leaves alone)."""

    p50_ms: float
    cpu_ms: float
    recall: float


def batches(data: Data) -> Iterator[pa.RecordBatch]:
    """The rows as the pipeline of build_index would write them."""
    schema = index_schema(data.vectors_NE.shape[1])
    for start in range(0, len(data.vectors_NE), 16_384):
        part = slice(start, min(start + 16_384, len(data.vectors_NE)))
        number = np.arange(part.start, part.stop)
        flat = pa.array(data.vectors_NE[part].ravel())
        made: dict[str, Any] = {
            "id": [f"chip-{n:09d}" for n in number],
            "vector": pa.FixedSizeListArray.from_arrays(flat, schema.field("vector").type.list_size),
            "row": number,
            "scene": [f"scene-{n // 400}" for n in number],
            "caption": [f"{n % len(data.tuning_texts_QE)}" for n in number],
            "kinds": [[] for _ in number],
            **{name: data.bounds_N4[part, side] for side, name in enumerate(SIDES)},
        }
        columns = [
            pa.array(made[name], schema.field(name).type) if name in made and name != "vector" else None
            for name in schema.names
        ]
        filled = [
            made["vector"]
            if name == "vector"
            else column
            if column is not None
            else _blank(schema.field(name).type, len(number))
            for name, column in zip(schema.names, columns, strict=True)
        ]
        yield pa.RecordBatch.from_arrays(filled, schema=schema)


def _blank(kind: pa.DataType, number: int) -> pa.Array:
    return pa.array([""] * number, kind) if pa.types.is_string(kind) else pa.nulls(number, kind)


def make_cases(data: Data) -> dict[str, Case]:
    """For each share a box of its own for every query, and the exact answers in float32."""
    rng = np.random.default_rng(1)
    scores_QN = np.empty((len(data.texts_QE), len(data.vectors_NE)), np.float32)
    texts = torch.from_numpy(data.texts_QE)
    for start in range(0, len(data.vectors_NE), 50_000):
        block = torch.from_numpy(data.vectors_NE[start : start + 50_000]).float()
        unit = block / block.norm(dim=1, keepdim=True)
        scores_QN[:, start : start + len(block)] = (texts @ unit.T).numpy()
    cases = {}
    for name, fraction in FRACTIONS.items():
        boxes = [random_box(data.bounds_N4, fraction, rng) if fraction < 1 else None for _ in data.texts_QE]
        truths = []
        for scores_N, box in zip(scores_QN, boxes, strict=True):
            rows = np.arange(len(scores_N)) if box is None else np.flatnonzero(inside(data.bounds_N4, box))
            truths.append(rows[np.argsort(-scores_N[rows], kind="stable")[:10]])
        cases[name] = Case(data.texts_QE, boxes, np.array(truths))
    return cases


def measure(case: Case, ask: Callable[[np.ndarray, Box | None], list[int]]) -> Measured:
    """After one query for warmth."""
    ask(case.queries_QE[0], case.boxes[0])
    seconds, cpu_seconds, found = [], [], 0
    for query_E, box, truth in zip(*case, strict=True):
        started, cpu_started = time.perf_counter(), time.process_time()
        numbers = ask(query_E, box)
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
        found += len(set(numbers) & set(truth.tolist()))
    p50_ms, cpu_ms = (1e3 * float(np.median(taken)) for taken in (seconds, cpu_seconds))
    return Measured(p50_ms, cpu_ms, found / case.truths_QK.size)


def ours(folder: str) -> Callable[[np.ndarray, Box | None], list[int]]:
    """A search that ends with hits, as the service gets them."""
    index = ChipIndex(folder, MODEL_HASH)

    def ask(query_E: np.ndarray, box: Box | None) -> list[int]:
        wanted = SearchFilter(bounds_lonlat=box, relation="within") if box else None
        return [hit.row for hit in index.search(query_E, 10, wanted)]

    return ask


def bare_lancedb(folder: str) -> Callable[[np.ndarray, Box | None], list[int]]:
    """LanceDB's own search over the same table, its filter first, with an index on each side of the bounds."""
    table = open_lancedb(folder)

    def ask(query_E: np.ndarray, box: Box | None) -> list[int]:
        query = table.search(query_E, vector_column_name="vector").distance_type("cosine").select(["row"]).limit(10)
        if box:
            west, south, east, north = box
            limits = f"west >= {west} AND east <= {east} AND south >= {south} AND north <= {north}"
            query = query.where(limits, prefilter=True)
        return query.to_arrow()["row"].to_pylist()

    return ask


def build(folder: str, tuning_texts_QE: np.ndarray, results: Any) -> None:
    """Finish the index of the written rows; in a process of its own, for its peak memory."""
    started = time.perf_counter()
    # the rows' captions are numbers of these texts
    finish_index(folder, MODEL_HASH, EXACT_BELOW_ROWS, lambda captions: tuning_texts_QE[[int(n) for n in captions]])
    used = resource.getrusage(resource.RUSAGE_SELF)
    results.put((time.perf_counter() - started, used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20))


def built_apart(folder: str, tuning_texts_QE: np.ndarray) -> tuple[float, float, float]:
    """Seconds by the clock, of CPU, and peak GB of `build`."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=build, args=(folder, tuning_texts_QE, results))
    process.start()
    measured = results.get()
    process.join()
    return measured


def faiss_row(folder: Path, data: Data, cases: dict[str, Case], python: str) -> dict[str, Any] | None:
    """What search_faiss.py says; None where that Python has no FAISS."""
    np.save(folder / "vectors.npy", data.vectors_NE)
    np.save(folder / "bounds.npy", data.bounds_N4)
    none = (np.nan,) * 4
    stored: dict[str, Any] = {"names": np.array(list(cases))}
    for number, case in enumerate(cases.values()):
        stored |= {f"queries_{number}": case.queries_QE, f"truths_{number}": case.truths_QK}
        stored[f"boxes_{number}"] = np.array([box or none for box in case.boxes])
    np.savez(folder / "cases.npz", **stored)
    script = Path(__file__).with_name("search_faiss.py")
    done = subprocess.run([python, str(script), str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"FAISS: no row ({done.stderr.strip().splitlines()[-1]}); give --faiss-python")
        return None
    return json.loads(done.stdout)


def parse() -> argparse.Namespace:
    """Sizes; the defaults are the claim's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder that save_model wrote")
    parser.add_argument("rsicd", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument("--pictures", type=int, default=4000)
    parser.add_argument("--data", type=Path, help="a folder that keeps the made rows for another run")
    parser.add_argument("--faiss-python", default=sys.executable, help="a Python that has faiss-cpu")
    return parser.parse_args()


def main() -> None:
    """Build all and print the table."""
    given = parse()
    wanted = (given.model, given.rsicd, given.rows, given.width, given.queries, given.pictures)
    data = kept_data(given.data, wanted) if given.data else make_data(*wanted)
    print(
        f"{given.rows:,} × {given.width}: {data.num_real} real embeddings, the rest copies of them jittered by "
        f"{data.neighbour_distance:.3f}, the median distance of a tenth neighbour; {given.queries} captions as queries"
    )
    cases = make_cases(data)
    with tempfile.TemporaryDirectory(prefix="search-") as name:
        reader = pa.RecordBatchReader.from_batches(index_schema(given.width), batches(data))
        lance.write_dataset(reader, f"{name}/{ROWS_PATH}")
        build_s, build_cpu_s, peak_gb = built_apart(name, data.tuning_texts_QE)
        meta = ChipIndex(name, MODEL_HASH).meta
        print(f"ours: built in {build_s:.0f} s, {build_cpu_s:.0f} s of CPU, peak {peak_gb:.1f} GB; {meta}")
        print(f"{'p50 ms, CPU ms (recall)':22}" + "".join(f"{case:>22}" for case in cases), flush=True)
        show("ours", {case: measure(cases[case], ours(name)) for case in cases})
        found = faiss_row(Path(name), data, cases, given.faiss_python)
        if found:
            show(f"FAISS {found['version']} IVF fp16", {case: Measured(**row) for case, row in found["cases"].items()})
            times = f"built in {found['build_s']:.0f} s, {found['build_cpu_s']:.0f} s of CPU"
            print(f"FAISS: {times}, peak {found['peak_gb']:.1f} GB, lists visited {found['probes']}")
        table, started = open_lancedb(name), time.process_time()
        for side in SIDES:
            table.create_index(side, config=BTree())
        print(f"bare LanceDB: the same table, {time.process_time() - started:.0f} s of CPU for indexes of the sides")
        some = {case: cases[case].first(BARE_QUERIES) for case in cases}
        show(f"bare LanceDB ({BARE_QUERIES} each)", {case: measure(some[case], bare_lancedb(name)) for case in some})


def show(label: str, row: dict[str, Measured]) -> None:
    """A line of the table."""
    parts = (f"{f'{each.p50_ms:.1f}, {each.cpu_ms:.1f} ({each.recall:.3f})':>22}" for each in row.values())
    print(f"{label:22}" + "".join(parts), flush=True)


if __name__ == "__main__":
    main()
