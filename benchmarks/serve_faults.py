"""What goes wrong while many search: a replica killed, one hung, the index swapped, too much asked, poisoned pictures.

In: a finished demo and a second index over the same chips. Out: for each fault how many requests failed (reads are
sent once more), how long until all replicas ran again, the longest time without an answer, and memory.
Two replicas of each kind; every fault has a run of its own, on one server after the other.
Run: `python benchmarks/serve_faults.py --root artifacts --other-index index/demo/v2 [--clients 32] [--seconds 60]`
"""

import argparse
import asyncio
import base64
import os
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import numpy as np
import psutil
from ray import serve
from serve_load import Load, replaced, replica_pids, under_load

from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster, ServePlacement
from rsplatform.index.embed import load_embedder
from rsplatform.index.store import ChipIndex
from rsplatform.serve.app import APPLICATION, running
from rsplatform.serve.deployment import ServeConfig, served_by
from rsplatform.serve.replicas import MAX_ONGOING_REQUESTS, MAX_QUEUED_REQUESTS, build_application, picture_deployment
from rsplatform.serve.versions import STABLE

TEXTS = [f"an aerial image of a {kind}" for kind in ("harbour", "stadium", "runway", "forest", "road", "field")]
K = 20
PATIENCE_S = 570
WAIT_S = 300
POISONED = {
    "no picture": b"not a picture",
    "half a JPEG": b"\xff\xd8\xff\xe0" + bytes(64),
    "a PNG of 2³¹ pixels a side": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\x7f\xff\xff\xff\x7f\xff\xff\xff\x08\x02\0\0\0"
    + bytes(20),
    "a GIF": b"GIF89a\x01\0\x01\0\x80\0\0" + bytes(16),
    "a script in SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>",
}


class Faults:
    """A running server, and what is done to it."""

    def __init__(self, base_url: str, config: ServeConfig, cluster: Cluster, arguments: argparse.Namespace) -> None:
        self.base_url, self.config, self.cluster, self.arguments = base_url, config, cluster, arguments

    def load(self, **body: object) -> Load:
        """Clients that ask one of the texts."""
        return Load(self.base_url, lambda n: {"text": TEXTS[n % len(TEXTS)], "k": K, **body})

    def run(self, name: str, load: Load, happens: Callable[[Load], Awaitable[str]]) -> Load:
        """Load for the wanted seconds, or until what happens after a sixth of them is over, and a line about it."""
        told: list[str] = []

        async def during(load: Load) -> None:
            until_s = time.monotonic() + self.arguments.seconds
            await load.more(1)
            await asyncio.sleep(self.arguments.seconds / 6)
            told.append(await happens(load))
            await load.more(2 * self.arguments.clients)
            await asyncio.sleep(max(0.0, until_s - time.monotonic()))

        asyncio.run(under_load(load, self.arguments.clients, during, PATIENCE_S))
        done = len(load.answers) + len(load.failures)
        p50, p99 = np.percentile([answer.seconds for answer in load.answers], (50, 99))
        failed = f"{len(load.failures)} failed ({100 * len(load.failures) / done:.3f} %)"
        twice = f"{len(load.first_failures)} sent twice {dict(Counter(load.first_failures))}"
        times = (
            f"longest time without an answer {load.longest_gap_s():.1f} s; p50 {1e3 * p50:.0f}, p99 {1e3 * p99:.0f} ms"
        )
        print(f"{name}: {done} requests, {twice}, {failed}; {told[0]}; {times}", flush=True)
        return load

    async def kill(self, deployment: str, number: int) -> str:
        """One replica gets a signal; the seconds until it is replaced."""
        victim, started = min(replica_pids(deployment)), time.monotonic()
        os.kill(victim, number)
        await replaced(deployment, victim)
        return f"two replicas again after {time.monotonic() - started:.1f} s"

    async def swap(self, load: Load) -> str:
        """Deploy the other index in place."""
        started = time.monotonic()
        new = self.config.model_copy(update={"index": self.arguments.other_index})
        application = build_application(served_by(new, self.cluster))
        await asyncio.to_thread(serve.run, application, name=APPLICATION, route_prefix="/")
        return f"swapped after {time.monotonic() - started:.1f} s"

    def check_swap(self, load: Load) -> None:
        """Each answer is that of one of the two indexes, and after the first second of the new one, its."""
        embedder = load_embedder(self.cluster.root, self.config.model)
        expected = []
        for ref in (self.config.index, self.arguments.other_index):
            index = ChipIndex(Artifact(self.cluster.root, ref).uri, embedder.model_hash)
            hits = [[hit.id for hit in index.search(embedder.embed_texts([text])[0], K)] for text in TEXTS]
            expected.append({tuple(ids) for ids in hits})
        found = [tuple(hit["chip_id"] for hit in answer.document["results"]) for answer in load.answers]
        old, new = (sum(ids in each for ids in found) for each in expected)
        both = sum(ids in expected[0] and ids in expected[1] for ids in found)
        wrong = len(found) - old - new + both
        print(f"  answers of the old index {old}, of the new one {new}, alike in both {both}, of neither {wrong}")

    def flood(self) -> None:
        """More requests at once than may wait, each with much to do."""
        number = MAX_QUEUED_REQUESTS + 2 * MAX_ONGOING_REQUESTS + 150
        names = ("gateway", picture_deployment(STABLE))
        processes = [psutil.Process(pid) for name in names for pid in replica_pids(name)]
        before, started = sum(each.memory_info().rss for each in processes), time.monotonic()
        peak = before

        async def ask() -> list[httpx.Response]:
            nonlocal peak
            limits, timeout = httpx.Limits(max_connections=number), httpx.Timeout(WAIT_S)
            async with httpx.AsyncClient(
                base_url=self.base_url, limits=limits, timeout=timeout, trust_env=False
            ) as http:
                body = {"text": TEXTS[0], "k": 64, "localize": True}
                waiting = asyncio.gather(*(http.post("/v1/search", json=body) for _ in range(number)))
                while not waiting.done():
                    peak = max(peak, sum(each.memory_info().rss for each in processes))
                    await asyncio.sleep(0.5)
                return list(waiting.result())

        answers = asyncio.run(ask())
        told = sum("retry-after" in answer.headers for answer in answers if answer.status_code == 503)
        statuses = dict(Counter(answer.status_code for answer in answers))
        memory = f"replicas {before / 2**20:.0f} MB, at most {(peak - before) / 2**20:.0f} MB more"
        took = f"{time.monotonic() - started:.0f} s"
        print(f"overload: {number} at once, {statuses}, {told} with Retry-After, {took}; {memory}", flush=True)

    def poison(self) -> None:
        """Pictures that are none, everywhere where one is taken."""
        bodies = {"/v1/search": {}, "/v1/localize": {"texts": ["a road"]}, "/v1/caption": {}}
        found: Counter[int] = Counter()
        with httpx.Client(base_url=self.base_url, timeout=WAIT_S, trust_env=False) as http:
            for picture in POISONED.values():
                encoded = base64.b64encode(picture).decode()
                found.update(
                    http.post(path, json=body | {"image": encoded}).status_code for path, body in bodies.items()
                )
                found.update([http.post("/v1/embed", json={"images": [encoded]}).status_code])
            is_well = http.get("/health").status_code == 200
        print(f"poisoned pictures: {dict(found)}; healthy afterwards: {is_well}", flush=True)


def parse() -> argparse.Namespace:
    """Where the demo lies, and how hard it is tried; the defaults are the claim's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="artifacts", help="artifact root of a finished demo")
    parser.add_argument("--model", default="model/demo/v1")
    parser.add_argument("--index", default="index/demo/v1")
    parser.add_argument("--other-index", default="index/demo/v2", help="of the same model and chips")
    parser.add_argument("--chips", default="chips/demo/v1")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60, help="of one fault")
    return parser.parse_args()


def main() -> None:
    """One server, one fault after the other."""
    arguments = parse()
    place = ServePlacement(port=0, num_replicas=2, cpus_per_replica=0.2)
    cluster = Cluster(root=str(Path(arguments.root).absolute()), num_cpus=2, serve=place)
    config = ServeConfig(
        output="deployment/benchmark/v1", model=arguments.model, index=arguments.index, chips=arguments.chips
    )
    pictures = picture_deployment(STABLE)
    print(f"{os.cpu_count()} cores, two replicas of each kind, {arguments.clients} clients", flush=True)
    with running(served_by(config, cluster)) as base_url:
        faults = Faults(base_url, config, cluster, arguments)
        faults.poison()
        faults.run("killed, gateway", faults.load(), lambda _: faults.kill("gateway", signal.SIGKILL))
        few = {"k": 3, "localize": True}
        faults.run("killed, pictures", faults.load(**few), lambda _: faults.kill(pictures, signal.SIGKILL))
        faults.run("hung, gateway", faults.load(), lambda _: faults.kill("gateway", signal.SIGSTOP))
        faults.check_swap(faults.run("index swapped", faults.load(), faults.swap))
        faults.flood()


if __name__ == "__main__":
    main()
