"""Ray Serve with the application of replicas.py, started and stopped as one: the front door's runtime."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
from ray import serve
from ray.serve.config import ProxyLocation
from ray.serve.schema import LoggingConfig

from rsplatform.config import ConfigError
from rsplatform.runtime import ray_runtime
from rsplatform.serve.replicas import Served, build_application
from rsplatform.serve.security import check_address

APPLICATION = "rsplatform"
# For the first answer of the application.
START_TIMEOUT_S = 180
CONNECT_RETRIES = 5
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def running(served: Served) -> Iterator[str]:
    """Ray Serve with this application inside the block; yields its base URL once /health answers.

    A port of 0 takes a free one. Everything that was started is stopped at the end: Serve, and Ray if it is ours.

    Raises:
        ConfigError: an address that others can reach, without API keys, or that cannot be listened at.
        RuntimeError: the application did not become healthy.
    """
    placement = served.cluster.serve
    check_address(placement.host, served.guard.key_hashes)
    port = _free_port(placement.host, placement.port)
    handlers = _signal_handlers()
    joined = served.cluster.ray_address is not None or "RAY_ADDRESS" in os.environ
    # the controller's: what a replica holds that hangs is given up with it, not after the time of a graceful stop
    os.environ.setdefault("RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS", "1")
    with ray_runtime(served.cluster):
        _handle_again(handlers)
        http = {
            "host": placement.host,
            "port": port,
            "request_timeout_s": proxy_timeout_s(served),
        }  # the guard first
        try:
            # one line per request would drown the job's own output; errors still show
            quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
            serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=http, logging_config=quiet)
            serve.run(build_application(served), name=APPLICATION, route_prefix="/", logging_config=quiet)
            base_url = f"http://{placement.host}:{port}"
            _check_health(base_url)
            yield base_url
        finally:
            if joined:  # a cluster that others use: take down only what is ours
                serve.delete(APPLICATION)
            else:
                serve.shutdown()


def proxy_timeout_s(served: Served) -> float:
    """Serve's own limit, which knows no Retry-After: one wait for others, then the guard's limits, which come first."""
    return 2 * (served.guard.max_body_seconds + served.guard.max_request_seconds) + 5


def _free_port(host: str, port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"metadata.rsplatform.serve: cannot listen at {host} port {port} ({error.strerror}); stop what listens "
                "there, or add cluster.serve.port=8001 (0: any free one) to the command"
            ) from error
        return probe.getsockname()[1]


def _check_health(base_url: str) -> None:
    """One request through the whole application.

    serve.start returns when the proxy listens, and serve.run when replicas run, seconds after the controller has told
    the proxy their routes; the proxy holds a request until a replica takes it. So nothing is asked twice.
    """
    transport = httpx.HTTPTransport(retries=CONNECT_RETRIES)
    try:
        with httpx.Client(transport=transport, timeout=START_TIMEOUT_S, trust_env=False) as client:
            response = client.get(f"{base_url}/health")
    except httpx.TransportError as error:
        raise RuntimeError(f"{base_url}/health does not answer ({error}); see Ray Serve's logs") from error
    if response.status_code != 200:
        raise RuntimeError(f"{base_url}/health answers {response.status_code} {response.text[:200]}")


@contextlib.contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, in place of killing the process before it has cleaned up."""
    stopped = threading.Event()
    earlier = _signal_handlers()
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: stopped.set())
    try:
        yield stopped
    finally:
        _handle_again(earlier)


def _signal_handlers() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in STOP_SIGNALS}


def _handle_again(handlers: dict[int, Any]) -> None:
    """Put handlers back where starting Ray has replaced them: its own aborts the process on SIGTERM."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)
