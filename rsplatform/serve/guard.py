"""The guard in front of every route: limits of size, time, rate and load, API keys, Host, headers, request ids.

In: an ASGI application. Out: the same behind a guard, which answers what it refuses before the application sees it.
It terminates no TLS, and how long a client may take for its headers is the server's matter.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rsplatform.serve.admission import RETRY_AFTER_S, Admission, RateLimit
from rsplatform.serve.record import CURRENT, RequestRecord, log_request, request_id
from rsplatform.serve.security import HEADERS, OPEN_PATHS, host_name, is_loopback, matching_key

# A map view is dozens of tiles and a search twenty chips, each of them a read without a model: a tenth of a request.
LIGHT_PATHS, LIGHT_COST = ("/tiles/", "/chips/"), 0.1

Watch = Callable[[RequestRecord], None]


@dataclass(frozen=True)
class Guarded:
    """Limits of one process. `key_hashes` are hex SHA-256 of the accepted keys, none means loopback only.

    `requests_per_minute` is each key's, a tile or chip a tenth; None: no limit, and none without keys.
    `max_held_bytes` are bodies of requests that are being answered.
    """

    max_body_bytes: int
    max_body_seconds: float
    key_hashes: tuple[str, ...] = ()
    max_request_seconds: float = 60
    requests_per_minute: float | None = None
    max_requests: int = 256
    max_held_bytes: int = 256 * 2**20


@dataclass(frozen=True)
class Refusal:
    """An answer in place of the application's."""

    status: int
    detail: str
    retry_after_s: int | None = None


BUSY = Refusal(503, "the server is busy; try again later", RETRY_AFTER_S)


class Guard:
    """ASGI middleware; `watch` hears of every request once it is answered."""

    def __init__(self, app: ASGIApp, limits: Guarded, watch: Watch = log_request) -> None:
        self.app = app
        self.limits = limits
        self._watch = watch
        self._admission = Admission(limits.max_requests, limits.max_held_bytes)
        self._rate = RateLimit(limits.requests_per_minute) if limits.requests_per_minute else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"only HTTP is served, not {scope['type']}")
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        record = RequestRecord(request_id(headers.get("x-request-id", "")), scope["method"], scope["path"])
        token, started = CURRENT.set(record), time.perf_counter()
        answer = _Answer(record, send)
        try:
            refusal = self._refusal(headers, record, scope.get("client"))
            refusal = refusal or await self._answered(scope, receive, answer)
            if refusal and not record.status:
                await answer.refuse(refusal)
        finally:
            CURRENT.reset(token)
            record.seconds = time.perf_counter() - started
            record.route = getattr(scope.get("route"), "path", None)
            self._watch(record)

    async def _answered(self, scope: Scope, receive: Receive, answer: "_Answer") -> Refusal | None:
        """Let a request in, read its body and hand it on; or the reason not to."""
        if not self._admission.enter():
            return BUSY
        record = answer.record
        try:
            body = await self._read(receive, record)
            if isinstance(body, Refusal) or body is None:
                return body
            return await self._run(scope, _replay(body, receive), answer)
        except Exception:
            logging.getLogger(__name__).exception("request %s failed", record.id)
            return Refusal(500, f"an error of ours; the server's log has it under request {record.id}")
        finally:
            self._admission.leave(record.body_bytes)

    async def _run(self, scope: Scope, receive: Receive, answer: "_Answer") -> Refusal | None:
        limit = asyncio.timeout(self.limits.max_request_seconds)
        try:
            async with limit:
                await self.app(scope, receive, answer.send)
        except TimeoutError:
            if not limit.expired():
                raise
            seconds = self.limits.max_request_seconds
            return Refusal(503, f"the answer took longer than {seconds:g} s; try again later", RETRY_AFTER_S)
        return None

    def _refusal(
        self, headers: dict[str, str], record: RequestRecord, client: tuple[str, int] | None
    ) -> Refusal | None:
        declared = headers.get("content-length", "0")
        if not declared.isascii() or not declared.isdigit():
            return Refusal(400, "Content-Length is not a number")
        if len(declared) > 18 or int(declared) > self.limits.max_body_bytes:
            return self._too_large()
        if not self.limits.key_hashes:
            # a page elsewhere that points its own name at 127.0.0.1 must not read from this server, nor other machines
            # where someone made the proxy listen to them
            is_own = client is not None and is_loopback(client[0])
            if not is_own or not is_loopback(host_name(headers.get("host", ""))):
                return Refusal(421, "this server has no API keys and answers only to localhost or 127.0.0.1")
            return None
        if record.path in OPEN_PATHS or record.path.startswith("/static/"):
            return None
        key = matching_key(headers.get("authorization", ""), self.limits.key_hashes)
        if key is None:
            return Refusal(401, "an API key is needed: send it as `Authorization: Bearer KEY`")
        record.key = key[:8]
        cost = LIGHT_COST if record.path.startswith(LIGHT_PATHS) else 1
        wait_s = self._rate.wait_s(key, cost) if self._rate else 0
        return Refusal(429, "this API key asks too often; try again later", wait_s) if wait_s else None

    async def _read(self, receive: Receive, record: RequestRecord) -> bytearray | Refusal | None:
        """The whole body, a refusal, or None if the client went away."""
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.max_body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunk = message.get("body", b"")
                    record.body_bytes += len(chunk)
                    if not self._admission.hold(len(chunk)):
                        return BUSY
                    body += chunk
                    if len(body) > self.limits.max_body_bytes:
                        return self._too_large()
                    if not message.get("more_body", False):
                        return body
        except TimeoutError:
            return Refusal(408, f"the request body took longer than {self.limits.max_body_seconds:g} s")

    def _too_large(self) -> Refusal:
        limit = self.limits.max_body_bytes
        return Refusal(413, f"the request body is larger than {limit} bytes; send a smaller picture")


def _replay(body: bytearray, receive: Receive) -> Receive:
    """A receive that gives the body in one piece, then whatever the server says next (a disconnect)."""
    pending: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed


class _Answer:
    """The way out: security headers and the request's id on every answer, its status in the record."""

    def __init__(self, record: RequestRecord, send: Send) -> None:
        self.record = record
        self._send = send

    async def send(self, message: Any) -> None:
        """Pass on a message of the application."""
        if message["type"] == "http.response.start":
            self.record.status = message["status"]
            own = (*HEADERS, (b"x-request-id", self.record.id.encode()))
            message["headers"] = [*message.get("headers", []), *own]
        await self._send(message)

    async def refuse(self, refusal: Refusal) -> None:
        """Answer in place of the application; a client that is gone is no error."""
        body = json.dumps({"detail": refusal.detail}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if refusal.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if refusal.retry_after_s is not None:
            headers.append((b"retry-after", str(refusal.retry_after_s).encode()))
        with contextlib.suppress(OSError):
            await self.send({"type": "http.response.start", "status": refusal.status, "headers": headers})
            await self.send({"type": "http.response.body", "body": body})
