"""Our server under Ray Serve against a bare FastAPI + uvicorn process with the same model and index, in one run.

In: a finished demo (its model, index and chips). Out: requests/s and latencies of both for 1, 8 and 32 connections, the
ratios, and what `localize: true` costs. Rounds of both alternate, so that a busy machine slows both alike; the client
is a plain socket loop on loopback, and takes its share of the same cores. Every request asks another text.
Run: `python benchmarks/serve.py --root artifacts`
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster, ServePlacement
from rsplatform.index.embed import load_embedder
from rsplatform.index.store import ChipIndex
from rsplatform.serve.app import running
from rsplatform.serve.deployment import ServeConfig, served_by

KINDS = ("harbour", "stadium", "runway", "forest", "road", "field", "water", "building")


@dataclass(frozen=True)
class Round:
    """Latencies in milliseconds of one round, and how long it took."""

    latencies_ms: list[float]
    seconds: float

    @property
    def per_second(self) -> float:
        """Requests/s."""
        return len(self.latencies_ms) / self.seconds

    def percentile_ms(self, percent: float) -> float:
        """Latency that so many percent of the requests stayed below."""
        return float(np.percentile(self.latencies_ms, percent))


def bare(arguments: argparse.Namespace) -> None:
    """The reference: one process, one route, no batching, no limits, no pictures."""
    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel

    torch.set_num_threads(1)
    embedder = load_embedder(arguments.root, arguments.model)
    index = ChipIndex(Artifact(arguments.root, arguments.index).uri, embedder.model_hash)
    app = FastAPI()

    class Search(BaseModel):
        text: str
        k: int = 10

    @app.get("/health")
    def health() -> str:
        return "ok"

    @app.post("/v1/search")
    def search(request: Search) -> list[dict]:
        hits = index.search(embedder.embed_texts([request.text])[0], request.k)
        return [{"chip_id": hit.id, "score": hit.score, "caption": hit.caption} for hit in hits]

    uvicorn.run(app, host="127.0.0.1", port=arguments.bare, log_level="warning")


async def client(address: tuple[str, int], worker: int, deadline: float, body: dict) -> list[float]:
    """One connection that asks again as soon as it has its answer."""
    reader, writer = await asyncio.open_connection(*address)
    latencies_ms: list[float] = []
    while time.perf_counter() < deadline:
        kind = KINDS[len(latencies_ms) % len(KINDS)]
        text = f"an aerial image of a {kind} number {worker} {len(latencies_ms)}"
        content = json.dumps(body | {"text": text}).encode()
        head = "POST /v1/search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        started = time.perf_counter()
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        await read_answer(reader)
        latencies_ms.append((time.perf_counter() - started) * 1000)
    writer.close()
    return latencies_ms


async def read_answer(reader: asyncio.StreamReader) -> None:
    """Read one answer of a kept connection to its end; anything but 200 ends the benchmark."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    if " 200 " not in head.split("\r\n", 1)[0]:
        raise RuntimeError(f"not answered: {head.splitlines()[0]} {(await reader.read(300)).decode()}")
    if "transfer-encoding: chunked" not in head:
        await reader.readexactly(int(head.split("content-length:")[1].split("\r\n")[0]))
        return
    while size := int(await reader.readuntil(b"\r\n"), 16):
        await reader.readexactly(size + 2)
    await reader.readexactly(2)


def measure(address: tuple[str, int], clients: int, seconds: float, body: dict) -> Round:
    """One round of so many connections."""

    async def run() -> Round:
        started = time.perf_counter()
        workers = [client(address, worker, started + seconds, body) for worker in range(clients)]
        latencies = [each for found in await asyncio.gather(*workers) for each in found]
        return Round(latencies, time.perf_counter() - started)

    return asyncio.run(run())


def compare(addresses: dict[str, tuple[str, int]], clients: int, arguments: argparse.Namespace, body: dict) -> None:
    """Alternating rounds after a warm one, and a line for each side."""
    rounds: dict[str, list[Round]] = {name: [] for name in addresses}
    for number in range(arguments.rounds + 1):
        for name, address in addresses.items():
            done = measure(address, clients, arguments.seconds if number else 1, body)
            if number:
                rounds[name].append(done)
    rates = {name: statistics.median(each.per_second for each in found) for name, found in rounds.items()}
    p50 = {name: statistics.median(each.percentile_ms(50) for each in found) for name, found in rounds.items()}
    p99 = {name: statistics.median(each.percentile_ms(99) for each in found) for name, found in rounds.items()}
    for name in addresses:
        line = f"{clients:3d} clients  {name:9s} {rates[name]:7.1f} requests/s  p50 {p50[name]:7.1f} ms  p99"
        print(f"{line} {p99[name]:7.1f} ms", flush=True)
    first, second = list(addresses)
    ratios = f"throughput {rates[second] / rates[first]:.2f} ×, p50 {p50[second] / p50[first]:.2f} ×"
    print(f"{clients:3d} clients  {second} to {first}: {ratios}", flush=True)


def wait_for(port: int) -> None:
    """Until the bare process listens and has answered."""
    deadline = time.monotonic() + 180
    while True:
        try:
            measure(("127.0.0.1", port), 1, 0.01, {"k": 1})
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def parse() -> argparse.Namespace:
    """Where the demo lies, and for how long to measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="artifacts", help="artifact root of a finished demo")
    parser.add_argument("--model", default="model/demo/v1")
    parser.add_argument("--index", default="index/demo/v1")
    parser.add_argument("--chips", default="chips/demo/v1")
    parser.add_argument("--seconds", type=float, default=8, help="of one round")
    parser.add_argument("--rounds", type=int, default=3, help="of each side, alternating")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--bare", type=int, default=0, help=argparse.SUPPRESS)  # port: this process is the reference
    return parser.parse_args()


def main() -> None:
    """Both servers up, all comparisons, both down."""
    arguments = parse()
    arguments.root = str(Path(arguments.root).absolute())
    if arguments.bare:
        bare(arguments)
        return
    place = ServePlacement(port=0, cpus_per_replica=0.5)
    cluster = Cluster(root=arguments.root, num_cpus=2, serve=place)
    config = ServeConfig(
        output="deployment/benchmark/v1", model=arguments.model, index=arguments.index, chips=arguments.chips
    )
    with running(served_by(config, cluster)) as base_url:
        port = int(base_url.rsplit(":", 1)[1])
        reference = subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--bare", str(port + 1)])
        try:
            wait_for(port + 1)
            addresses = {"bare": ("127.0.0.1", port + 1), "Ray Serve": ("127.0.0.1", port)}
            print(f"{os.cpu_count()} cores, k {arguments.k}, medians of {arguments.rounds} rounds", flush=True)
            for clients in arguments.clients:
                compare(addresses, clients, arguments, {"k": arguments.k})
            body = {"k": arguments.k, "localize": True}
            for clients in (1, 8):
                done = measure(addresses["Ray Serve"], clients, arguments.seconds, body)
                times = f"p50 {done.percentile_ms(50):7.1f} ms  p99 {done.percentile_ms(99):7.1f} ms"
                print(f"{clients:3d} clients  localize  {done.per_second:7.1f} requests/s  {times}", flush=True)
        finally:
            reference.terminate()
            reference.wait()


if __name__ == "__main__":
    main()
