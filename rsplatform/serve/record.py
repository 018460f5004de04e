"""What is known of a request once it is answered: its id, route, status, and the seconds of each stage.

In: the guard opens a record, any code below it times its stages. Out: one JSON line of the log `rsplatform.access`;
app.py also makes metrics of it. Paths are logged, queries and bodies (people's words and pictures) are not.
"""

import contextlib
import json
import logging
import re
import time
import uuid
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

ACCESS_LOG = "rsplatform.access"
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass
class RequestRecord:
    """One request; `route` is the path with names in place of ids, None until a route was found."""

    id: str
    method: str
    path: str
    route: str | None = None
    status: int = 0
    seconds: float = 0.0
    body_bytes: int = 0
    key: str = ""  # the first digits of the key's hash
    stages: dict[str, float] = field(default_factory=dict)  # seconds


CURRENT: ContextVar[RequestRecord | None] = ContextVar("request", default=None)


def request_id(given: str) -> str:
    """The caller's own id if it is a short plain word, else a new one."""
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Add the time of this block to the request that is being answered; stages of the same name add up."""
    started = time.perf_counter()
    try:
        yield
    finally:
        record = CURRENT.get()
        if record is not None:
            record.stages[name] = record.stages.get(name, 0.0) + time.perf_counter() - started


def log_request(record: RequestRecord) -> None:
    """One line of JSON; 5xx as errors, all others as information."""
    level = logging.ERROR if record.status >= 500 else logging.INFO
    logging.getLogger(ACCESS_LOG).log(level, "%s", access_line(record))


def access_line(record: RequestRecord) -> str:
    """The record as JSON, milliseconds for seconds; control characters are escaped, so that a line is one request."""
    stages = {name: round(seconds * 1000, 1) for name, seconds in record.stages.items()}
    values = {
        "request_id": record.id,
        "method": record.method,
        "path": record.path[:300],
        "route": record.route,
        "status": record.status,
        "ms": round(record.seconds * 1000, 1),
        "body_bytes": record.body_bytes,
        "stages_ms": stages,
    }
    return json.dumps(values | ({"key": record.key} if record.key else {}))
