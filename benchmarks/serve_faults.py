"""What goes wrong while many search: a replica killed, one hung, the index swapped, too much asked, poisoned pictures.

In: a finished demo and a second index over the same chips. Out: for each fault how many requests failed (reads are
sent once more), how long until all replicas ran again, the longest time without an answer, and memory; and for each bar
whether it holds. It ends with 1 if one does not.
Two replicas of each kind; every fault has a run of its own, on one server after the other.
Run: `python benchmarks/serve_faults.py --root artifacts --other-index index/demo/v2 [--clients 32] [--seconds 60]`
"""

import argparse
import asyncio
import base64
import math
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
from serve_load import Answer, Load, replaced, replica_pids, under_load

from rsplatform.artifacts import Artifact
from rsplatform.cluster import Cluster, ServePlacement
from rsplatform.index.embed import load_embedder
from rsplatform.index.store import ChipIndex
from rsplatform.model.embedder import Embedder
from rsplatform.serve.app import APPLICATION, running
from rsplatform.serve.deployment import ServeConfig, served_by
from rsplatform.serve.replicas import MAX_ONGOING_REQUESTS, MAX_QUEUED_REQUESTS, build_application, picture_deployment
from rsplatform.serve.versions import STABLE

TEXTS = [f"an aerial image of a {kind}" for kind in ("harbour", "stadium", "runway", "forest", "road", "field")]
K = 20
MOST_FAILED, REPLACED_WITHIN_S = 0.001, 30.0
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
        self.swapped_at = math.inf
        self.all_hold = True

    def verdict(self, bar: str, holds: bool) -> None:
        """A line about one bar."""
        self.all_hold &= holds
        print(f"  {'holds' if holds else 'DOES NOT HOLD'}: {bar}", flush=True)

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
        self.verdict(f"at most {MOST_FAILED:.1%} failed", len(load.failures) <= MOST_FAILED * done)
        return load

    def kill(self, name: str, load: Load, deployment: str, number: int) -> None:
        """A run in which one replica gets a signal."""
        seconds: list[float] = []

        async def killed(_: Load) -> str:
            seconds.append(await self._killed(deployment, number))
            return f"two replicas again after {seconds[0]:.1f} s"

        self.run(name, load, killed)
        self.verdict(f"two replicas again within {REPLACED_WITHIN_S:g} s", seconds[0] < REPLACED_WITHIN_S)

    async def _killed(self, deployment: str, number: int) -> float:
        """The seconds until a replica that gets a signal is replaced."""
        victim, started = min(replica_pids(deployment)), time.monotonic()
        os.kill(victim, number)
        await replaced(deployment, victim)
        return time.monotonic() - started

    async def swap(self, load: Load) -> str:
        """Deploy the other index in place."""
        started = time.monotonic()
        new = self.config.model_copy(update={"index": self.arguments.other_index})
        application = build_application(served_by(new, self.cluster))
        await asyncio.to_thread(serve.run, application, name=APPLICATION, route_prefix="/")
        self.swapped_at = time.monotonic()
        return f"swapped after {self.swapped_at - started:.1f} s"

    def check_swap(self, load: Load) -> None:
        """Each answer is what one of the two indexes gives for its text; what is asked after the swap, the new one."""
        embedder = load_embedder(self.cluster.root, self.config.model)
        old, new = (
            self._found(ChipIndex(Artifact(self.cluster.root, ref).uri, embedder.model_hash), embedder)
            for ref in (self.config.index, self.arguments.other_index)
        )
        counts = answers_of(load.answers, old, new, self.swapped_at)
        print(f"  answers as of the index {dict(counts)}")
        alike = sum(old[text] == new[text] for text in TEXTS)
        self.verdict(f"the indexes differ for some of {len(TEXTS)} texts ({alike} alike)", alike < len(TEXTS))
        wrong = counts["neither"] + counts["neither, asked late"]
        self.verdict("each answer is one index's for its own text", not wrong)
        late = counts["new, asked late"] + counts["both, asked late"]
        self.verdict("what was asked after the swap is the new one's", late > 0 and not counts["old, asked late"])

    def _found(self, index: ChipIndex, embedder: Embedder) -> dict[str, list[str]]:
        """What a text finds, as the service reads it."""
        return {text: [hit.id for hit in index.search(embedder.embed_texts([text])[0], K)] for text in TEXTS}

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
        refused = statuses.get(503, 0)
        are_known = set(statuses) <= {200, 503} and refused == told
        self.verdict("answered, or refused with Retry-After", are_known)

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
        self.verdict("all 4xx, and healthy", is_well and all(400 <= status < 500 for status in found))


def answers_of(
    answers: list[Answer], old: dict[str, list[str]], new: dict[str, list[str]], swapped_at: float
) -> Counter[str]:
    """How many answers are what the old, the new, both or neither index finds for their own text, and asked when."""
    counts: Counter[str] = Counter()
    for answer in answers:
        text = answer.document["read_as"]["wanted"][0]
        ids = [hit["chip_id"] for hit in answer.document["results"]]
        of = (ids == old[text]) + 2 * (ids == new[text])
        is_late = answer.at - answer.seconds > swapped_at
        counts[f"{('neither', 'old', 'new', 'both')[of]}{', asked late' if is_late else ''}"] += 1
    return counts


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
        faults.kill("killed, gateway", faults.load(), "gateway", signal.SIGKILL)
        few = {"k": 3, "localize": True}
        faults.kill("killed, pictures", faults.load(**few), pictures, signal.SIGKILL)
        faults.kill("hung, gateway", faults.load(), "gateway", signal.SIGSTOP)
        faults.check_swap(faults.run("index swapped", faults.load(), faults.swap))
        faults.flood()
    raise SystemExit(0 if faults.all_hold else 1)


if __name__ == "__main__":
    main()
