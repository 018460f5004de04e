"""The guard in front of every route: body size and time (chunked bodies too), API keys, Host, response headers.

In: an ASGI application. Out: the same behind a guard. Without API keys only loopback addresses are accepted.
It counts no requests and terminates no TLS.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import os
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rsplatform.config import ConfigError

# MapLibre starts its worker from a blob; nothing else needs an exception. Tiles, chips and heatmaps are our own.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "worker-src blob:; font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
KEYS_VARIABLE = "RSPLATFORM_API_KEY_SHA256"
# What a person must reach before a key can be given: the page, its files, and whether the server lives.
OPEN_PATHS = ("/", "/health", "/openapi.json")


@dataclass(frozen=True)
class Guarded:
    """Limits of the guard; `key_hashes` are hex SHA-256 of the accepted keys, none means loopback only."""

    max_body_bytes: int
    max_body_seconds: float
    key_hashes: tuple[str, ...] = ()


def key_hashes() -> tuple[str, ...]:
    """Hashes of API keys from the environment (comma-separated hex SHA-256): keys at rest are never in clear.

    Raises:
        ConfigError: an entry that is no SHA-256 in hex.
    """
    entries = tuple(item.strip().lower() for item in os.environ.get(KEYS_VARIABLE, "").split(",") if item.strip())
    for entry in entries:
        if len(entry) != 64 or set(entry) - set("0123456789abcdef"):
            raise ConfigError(f"{KEYS_VARIABLE}: {entry[:6]}… is no SHA-256 in hex; hash the key with sha256sum")
    return entries


def check_address(host: str, hashes: tuple[str, ...]) -> None:
    """Refuse to listen where others can reach an open server.

    Raises:
        ConfigError: `host` is not loopback, or Ray Serve's HAProxy mode (which listens everywhere) is on, and
            there are no API keys.
    """
    if hashes:
        return
    remedy = f"set {KEYS_VARIABLE} to the SHA-256 of your API keys, or listen on 127.0.0.1"
    if not is_loopback(host):
        raise ConfigError(f"serve.host {host}: without API keys only a loopback address is accepted; {remedy}")
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "0") == "1":
        raise ConfigError(f"RAY_SERVE_ENABLE_HA_PROXY=1 listens on every interface; unset it, or {remedy}")


def is_loopback(host: str) -> bool:
    """Whether an address or the name `localhost` means this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """ASGI middleware: refuses before the application sees anything, and sets the security headers."""

    def __init__(self, app: ASGIApp, limits: Guarded) -> None:
        self.app = app
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"only HTTP is served, not {scope['type']}")
        guarded_send = _with_headers(send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope["path"], headers)
        if refusal:
            await _refuse(guarded_send, *refusal)
            return
        body = await self._read(receive)
        if isinstance(body, tuple):
            await _refuse(guarded_send, *body)
        elif body is not None:
            await self.app(scope, _replay(body, receive), guarded_send)

    def _refusal(self, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        declared = headers.get("content-length", "0")
        if not declared.isascii() or not declared.isdigit():
            return 400, "Content-Length is not a number"
        if int(declared) > self.limits.max_body_bytes:
            return self._too_large()
        if not self.limits.key_hashes:
            # a page elsewhere that points its own name at 127.0.0.1 must not read from this server
            if not is_loopback(_host_name(headers.get("host", ""))):
                return 421, "this server has no API keys and answers only to localhost or 127.0.0.1"
            return None
        if path in OPEN_PATHS or path.startswith("/static/"):
            return None
        if not self._has_key(headers):
            return 401, "an API key is needed: send it as `Authorization: Bearer KEY`"
        return None

    def _has_key(self, headers: dict[str, str]) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode()).hexdigest()
        matches = [hmac.compare_digest(digest, known) for known in self.limits.key_hashes]  # no early exit
        return scheme.lower() == "bearer" and any(matches)

    async def _read(self, receive: Receive) -> bytearray | tuple[int, str] | None:
        """The whole body, a refusal (status, detail), or None if the client went away."""
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.max_body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self.limits.max_body_bytes:
                        return self._too_large()
                    if not message.get("more_body", False):
                        return body
        except TimeoutError:
            return 408, f"the request body took longer than {self.limits.max_body_seconds:g} s"

    def _too_large(self) -> tuple[int, str]:
        return 413, f"the request body is larger than {self.limits.max_body_bytes} bytes; send a smaller picture"


def _host_name(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def _replay(body: bytearray, receive: Receive) -> Receive:
    """A receive that gives the body in one piece, then whatever the server says next (a disconnect)."""
    pending: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed


def _with_headers(send: Send) -> Send:
    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *HEADERS]
        await send(message)

    return sending


async def _refuse(send: Send, status: int, detail: str) -> None:
    body = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
