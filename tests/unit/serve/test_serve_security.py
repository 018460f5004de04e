"""The guard: body caps that chunks cannot pass, slow bodies, keys, hosts, addresses."""

import asyncio
import hashlib
from typing import Any

import pytest
from starlette.types import Message

from rsplatform.config import ConfigError
from rsplatform.serve.guard import Guard, Guarded
from rsplatform.serve.security import KEYS_VARIABLE, check_address, is_loopback, key_hashes

KEY = "a long and secret key"
HASH = hashlib.sha256(KEY.encode()).hexdigest()


async def echo(scope: Any, receive: Any, send: Any) -> None:
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


def call(limits: Guarded, messages: list[Message], headers: dict[str, str] | None = None, path: str = "/v1/x") -> Any:
    given = {"host": "127.0.0.1:8000"} | (headers or {})
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "client": ("127.0.0.1", 4000),
        "headers": [(k.encode(), v.encode()) for k, v in given.items()],
    }
    sent: list[Any] = []

    async def receive() -> Message:
        if messages:
            return messages.pop(0)
        return await asyncio.get_running_loop().create_future()  # a client that says no more

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Guard(echo, limits)(scope, receive, send))
    return sent


def chunk(body: bytes, more: bool = True) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


def test_a_body_within_the_limit_arrives_whole() -> None:
    sent = call(Guarded(10, 1), [chunk(b"12345"), chunk(b"67890", more=False)])
    assert sent[0]["status"] == 200 and sent[1]["body"] == b"1234567890"
    assert b"content-security-policy" in dict(sent[0]["headers"])


def test_chunks_without_a_length_stop_at_the_limit() -> None:
    messages = [chunk(b"x" * 6) for _ in range(1000)]
    assert call(Guarded(10, 1), messages)[0]["status"] == 413
    assert len(messages) == 998  # nothing beyond the limit was read


def test_a_declared_length_is_refused_before_the_body_is_read() -> None:
    messages = [chunk(b"x", more=False)]
    assert call(Guarded(10, 1), messages, {"content-length": "11"})[0]["status"] == 413
    assert len(messages) == 1
    assert call(Guarded(10, 1), [], {"content-length": "-1"})[0]["status"] == 400


def test_a_body_that_never_ends_times_out() -> None:
    assert call(Guarded(10, 0.05), [chunk(b"x")])[0]["status"] == 408


def test_without_keys_another_host_name_is_refused() -> None:
    assert call(Guarded(10, 1), [chunk(b"", more=False)], {"host": "evil.example"})[0]["status"] == 421
    assert call(Guarded(10, 1), [chunk(b"", more=False)], {"host": "[::1]:8000"})[0]["status"] == 200


@pytest.mark.parametrize(
    ("authorization", "status"),
    [(f"Bearer {KEY}", 200), ("Bearer wrong", 401), (KEY, 401), ("", 401), (f"Basic {KEY}", 401)],
)
def test_keys(authorization: str, status: int) -> None:
    headers = {"authorization": authorization, "host": "maps.example"}
    assert call(Guarded(10, 1, (HASH,)), [chunk(b"", more=False)], headers)[0]["status"] == status


def test_the_page_and_health_need_no_key() -> None:
    for path in ("/", "/health", "/static/app.js"):
        assert call(Guarded(10, 1, (HASH,)), [chunk(b"", more=False)], path=path)[0]["status"] == 200


def test_an_open_server_listens_on_loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("127.0.0.1", "localhost", "::1"):
        check_address(host, ())
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        with pytest.raises(ConfigError, match="loopback"):
            check_address(host, ())
        check_address(host, (HASH,))
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    with pytest.raises(ConfigError, match="every interface"):
        check_address("127.0.0.1", ())
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY")
    monkeypatch.setenv("RAY_SERVE_DEFAULT_HTTP_HOST", "0.0.0.0")
    with pytest.raises(ConfigError, match="RAY_SERVE_DEFAULT_HTTP_HOST"):
        check_address("127.0.0.1", ())
    assert not is_loopback("127.0.0.1.evil.example")


def test_keys_at_rest_are_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEYS_VARIABLE, f" {HASH.upper()} , {HASH}")
    assert key_hashes() == (HASH, HASH)
    monkeypatch.setenv(KEYS_VARIABLE, KEY)
    with pytest.raises(ConfigError, match="SHA-256"):
        key_hashes()
