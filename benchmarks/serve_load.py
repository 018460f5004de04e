"""Clients that search without a pause while something happens to the replicas that answer: benchmarks and tests.

In: a base URL of a server of this process's Ray Serve. Out: every answer with when it came, how long it took and how
often it was sent, and what failed twice.
"""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import httpx
from ray.serve.context import _get_global_client

from rsplatform.serve.app import APPLICATION

CLIENT_TIMEOUT_S = 80


@dataclass(frozen=True)
class Answer:
    """One answered search. `at` is a time of `time.monotonic`, when it was complete."""

    document: dict
    at: float
    seconds: float
    was_sent_twice: bool


@dataclass
class Load:
    """A read that fails is sent once more, as client.py does; `make_body` gives the body of the n-th request."""

    base_url: str
    make_body: Callable[[int], dict]
    answers: list[Answer] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    first_failures: list[str] = field(default_factory=list)
    asked: int = 0
    stopped: bool = False

    async def client(self) -> None:
        """One connection until `stopped`."""
        timeout = httpx.Timeout(CLIENT_TIMEOUT_S)
        async with httpx.AsyncClient(base_url=self.base_url, timeout=timeout, trust_env=False) as http:
            while not self.stopped:
                self.asked += 1
                await self._ask(http, self.make_body(self.asked))

    async def _ask(self, http: httpx.AsyncClient, body: dict) -> None:
        started = time.monotonic()
        outcome = await _sent(http, body)
        was_sent_twice = isinstance(outcome, str)
        if isinstance(outcome, str):
            self.first_failures.append(outcome)
            outcome = await _sent(http, body)
        if isinstance(outcome, str):
            self.failures.append(outcome)
            return
        now = time.monotonic()
        self.answers.append(Answer(outcome, now, now - started, was_sent_twice))

    async def more(self, number: int) -> None:
        """Until so many more answers have come."""
        wanted = len(self.answers) + number
        await until(lambda: len(self.answers) >= wanted)

    def longest_gap_s(self) -> float:
        """The longest time without an answer to anybody."""
        times = sorted(answer.at for answer in self.answers)
        return max((b - a for a, b in itertools.pairwise(times)), default=0.0)


async def _sent(http: httpx.AsyncClient, body: dict) -> dict | str:
    try:
        response = await http.post("/v1/search", json=body)
    except httpx.TransportError as error:
        return f"{type(error).__name__}"
    return response.json() if response.status_code == 200 else f"{response.status_code} {response.text[:80]}"


async def until(holds: Callable[[], bool]) -> None:
    """Wait for a condition."""
    while not holds():
        await asyncio.sleep(0.05)


async def under_load(load: Load, clients: int, during: Callable[[Load], Awaitable[None]], patience_s: float) -> Load:
    """Run `during` while so many clients ask, and stop them after it.

    Raises:
        TimeoutError: it takes longer than `patience_s`.
    """
    async with asyncio.timeout(patience_s), asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(load.client())
        try:
            await during(load)
        finally:
            load.stopped = True
    return load


def replica_pids(deployment: str) -> set[int]:
    """Processes of the running replicas of one deployment."""
    controller = _get_global_client()
    assert controller is not None
    details = controller.get_serve_details()
    replicas = details["applications"][APPLICATION]["deployments"][deployment]["replicas"]
    return {replica["pid"] for replica in replicas if replica["state"] == "RUNNING"}


async def replaced(deployment: str, victim: int, number: int = 2) -> None:
    """Until a replica is gone and as many as before run again."""
    await until(lambda: victim not in (now := replica_pids(deployment)) and len(now) == number)
