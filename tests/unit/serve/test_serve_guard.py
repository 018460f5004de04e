"""Load, rates, time and what is written down of a request: the guard around applications of a few lines."""

import asyncio
import hashlib
import json
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import ASGIApp
from tiny_service import CHIPS, INDEX, MODEL, tiny_cluster

from rsplatform.serve.admission import Admission, RateLimit
from rsplatform.serve.deployment import ServeConfig, served_by
from rsplatform.serve.guard import Guard, Guarded
from rsplatform.serve.record import RequestRecord, access_line, request_id, stage

KEYS = ("the first key", "the second key")
HASHES = tuple(hashlib.sha256(key.encode()).hexdigest() for key in KEYS)


class Gate:
    """An application that answers once it is opened, after it has read the body."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()
        self.waiting = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        self.waiting += 1
        with stage("work"):
            await self.opened.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})


async def breaks(scope: Any, receive: Any, send: Any) -> None:
    raise KeyError("a secret of the server")


def client(app: ASGIApp) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1:8000")


async def open_after(gate: Gate, number: int, http: httpx.AsyncClient, size: int) -> list[httpx.Response]:
    """`number` requests with bodies of `size` are answered only after as many more were sent as were let in."""
    sent = [asyncio.create_task(http.post("/x", content=b"x" * size)) for _ in range(number)]
    while gate.waiting + sum(task.done() for task in sent) < number:
        await asyncio.sleep(0)
    gate.opened.set()
    return list(await asyncio.gather(*sent))


@pytest.mark.parametrize(
    ("limits", "let_in"),
    [(Guarded(1000, 5, max_requests=3), 3), (Guarded(1000, 5, max_held_bytes=50), 5)],
)
def test_more_than_is_held_gets_503_at_once_and_nothing_stays_counted(limits: Guarded, let_in: int) -> None:
    async def run() -> None:
        gate = Gate()
        guard = Guard(gate, limits)
        async with client(guard) as http:
            answers = await open_after(gate, 12, http, size=10)
            assert sorted(answer.status_code for answer in answers) == [200] * let_in + [503] * (12 - let_in)
            assert all(answer.headers["retry-after"] == "2" for answer in answers if answer.status_code == 503)
            later = [(await http.post("/x", content=b"x")).status_code for _ in range(12)]
            assert later == [200] * 12
        assert guard._admission.requests == guard._admission.bytes == 0

    asyncio.run(run())


def test_an_answer_that_takes_too_long_is_given_up() -> None:
    async def run() -> httpx.Response:
        async with client(Guard(Gate(), Guarded(10, 1, max_request_seconds=0.05))) as http:
            return await http.get("/x")

    response = asyncio.run(run())
    assert response.status_code == 503 and "0.05 s" in response.json()["detail"] and "retry-after" in response.headers


def test_an_error_of_ours_tells_its_id_and_nothing_else() -> None:
    async def run() -> httpx.Response:
        async with client(Guard(breaks, Guarded(10, 1))) as http:
            return await http.get("/x", headers={"x-request-id": "mine-1"})

    response = asyncio.run(run())
    assert response.status_code == 500 and response.headers["x-request-id"] == "mine-1"
    assert "mine-1" in response.json()["detail"] and "secret" not in response.text


def test_each_key_has_its_own_rate() -> None:
    async def run() -> list[int]:
        gate = Gate()
        gate.opened.set()
        guard = Guard(gate, Guarded(10, 1, HASHES, requests_per_minute=2))
        async with client(guard) as http:
            order = [KEYS[0], KEYS[0], KEYS[0], KEYS[1], "wrong"]
            answers = [await http.get("/x", headers={"authorization": f"Bearer {key}"}) for key in order]
        assert int(answers[2].headers["retry-after"]) in range(1, 31)
        return [answer.status_code for answer in answers]

    assert asyncio.run(run()) == [200, 200, 429, 200, 401]


def test_tiles_and_chips_cost_a_tenth_of_what_asks_the_model() -> None:
    async def run(path: str) -> int:
        gate = Gate()
        gate.opened.set()
        guard = Guard(gate, Guarded(10, 1, HASHES, requests_per_minute=2))
        async with client(guard) as http:
            headers = {"authorization": f"Bearer {KEYS[0]}"}
            return sum([(await http.get(path, headers=headers)).status_code == 200 for _ in range(30)])

    counts = {path: asyncio.run(run(path)) for path in ("/tiles/a/1/2/3.png", "/chips/a.jpg", "/heatmaps/a.png")}
    assert counts == {"/tiles/a/1/2/3.png": 20, "/chips/a.jpg": 20, "/heatmaps/a.png": 2}


@pytest.mark.parametrize(("replicas", "most"), [({"num_replicas": 2}, 2), ({"num_replicas": 2, "max_replicas": 6}, 6)])
def test_the_rate_holds_for_as_many_replicas_as_there_may_be(replicas: dict[str, int], most: int) -> None:
    config = ServeConfig(output="deployment/a/v1", model=MODEL, index=INDEX, chips=CHIPS, requests_per_minute=60)
    guard = served_by(config, tiny_cluster("/nowhere", serve=replicas)).guard
    assert guard.requests_per_minute is not None and guard.requests_per_minute * most == pytest.approx(60)


@given(st.lists(st.floats(0, 120), max_size=60), st.integers(1, 600))
def test_no_minute_holds_more_than_a_burst_and_the_rate(gaps: list[float], per_minute: int) -> None:
    clock = [0.0]
    limit = RateLimit(per_minute, now=lambda: clock[0])
    taken = []
    for gap in gaps:
        clock[0] += gap
        wait_s = limit.wait_s("key")
        if wait_s == 0:
            taken.append(clock[0])
        else:
            clock[0] += wait_s
            assert limit.wait_s("key") == 0, "the promised wait was too short"
            taken.append(clock[0])
    for start in taken:
        assert sum(start <= time < start + 60 for time in taken) <= 2 * per_minute + 1


def test_bytes_and_requests_come_back() -> None:
    admission = Admission(max_requests=1, max_bytes=5)
    assert admission.enter() and not admission.enter()
    assert admission.hold(5) and not admission.hold(1)
    admission.leave(6)
    assert (admission.requests, admission.bytes) == (0, 0) and admission.enter()


def test_a_request_leaves_one_line_of_json_without_its_words() -> None:
    records: list[RequestRecord] = []

    async def run() -> httpx.Response:
        gate = Gate()
        gate.opened.set()
        async with client(Guard(gate, Guarded(100, 1), watch=records.append)) as http:
            return await http.post("/v1/x?text=private", content=b"private", headers={"x-request-id": "a\tb"})

    response = asyncio.run(run())
    (record,) = records
    line = json.loads(access_line(record))
    assert line["request_id"] == response.headers["x-request-id"] != "a\tb"
    assert line["status"] == 200 and line["body_bytes"] == 7 and line["path"] == "/v1/x" and "work" in line["stages_ms"]
    assert "private" not in access_line(record)
    forged = RequestRecord("1", "GET", '/x\n{"status": 200}')
    assert "\n" not in access_line(forged)
    assert request_id("ok-1") == "ok-1" and len(request_id("x" * 65)) == 32


def test_without_keys_no_other_machine_is_answered_whatever_host_it_names() -> None:
    async def run(address: str | None) -> int:
        gate = Gate()
        gate.opened.set()
        guard = Guard(gate, Guarded(100, 1))

        async def unnamed(scope: Any, receive: Any, send: Any) -> None:
            await guard(scope | {"client": None}, receive, send)

        transport = httpx.ASGITransport(app=guard if address is not None else unnamed, client=(address or "", 4000))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as http:
            return (await http.get("/x")).status_code

    assert [asyncio.run(run(address)) for address in ("127.0.0.1", "::1")] == [200, 200]
    assert [asyncio.run(run(address)) for address in ("10.0.0.7", "", None)] == [421] * 3  # unknown is not ours


def test_no_origin_elsewhere_may_read_an_answer() -> None:
    async def run() -> None:
        gate = Gate()
        gate.opened.set()
        async with client(Guard(gate, Guarded(100, 1))) as http:
            response = await http.get("/x", headers={"origin": "https://evil.example"})
        assert not [name for name in response.headers if name.startswith("access-control")]
        assert response.headers["cross-origin-resource-policy"] == "same-origin"

    asyncio.run(run())
