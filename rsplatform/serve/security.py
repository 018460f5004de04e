"""Who may ask, and from where: API keys, loopback addresses, and what a browser may do with our answers.

Keys come from the environment as hashes; without any, only loopback addresses are accepted. guard.py enforces it.
"""

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Sequence

from rsplatform.config import ConfigError

# MapLibre starts its worker from a blob; nothing else needs an exception. Tiles, chips and heatmaps are our own.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self' data:; "
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
        ConfigError: `host` or Ray Serve's own default is not loopback, or its HAProxy mode (which listens everywhere
            and opens the replicas' ports) is on, and there are no API keys.
    """
    if hashes:
        return
    remedy = f"set {KEYS_VARIABLE} to the SHA-256 of your API keys, or listen on 127.0.0.1"
    if not is_loopback(host):
        raise ConfigError(f"serve.host {host}: without API keys only a loopback address is accepted; {remedy}")
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "0") == "1":
        raise ConfigError(f"RAY_SERVE_ENABLE_HA_PROXY=1 listens on every interface; unset it, or {remedy}")
    replicas_host = os.environ.get("RAY_SERVE_DEFAULT_HTTP_HOST") or "127.0.0.1"  # where direct ingress listens
    if not is_loopback(replicas_host):
        raise ConfigError(f"RAY_SERVE_DEFAULT_HTTP_HOST={replicas_host}: not a loopback address; unset it, or {remedy}")


def is_loopback(host: str) -> bool:
    """Whether an address or the name `localhost` means this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def host_name(host: str) -> str:
    """The name in a Host header, without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def matching_key(authorization: str, hashes: Sequence[str]) -> str | None:
    """The hash of the key in an Authorization header if it is one of ours; takes as long for any key."""
    scheme, _, key = authorization.partition(" ")
    digest = hashlib.sha256(key.strip().encode()).hexdigest()
    matches = [known for known in hashes if hmac.compare_digest(digest, known)]  # no early exit
    return matches[0] if matches and scheme.lower() == "bearer" else None
