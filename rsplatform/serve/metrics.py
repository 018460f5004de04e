"""Metrics of answered requests through Ray, which Prometheus scrapes from each node (cluster/grafana.json shows them).

In: request records. Out: `ray_rsplatform_*` series. Serve itself adds queue lengths.
"""

from ray.util.metrics import Counter, Histogram

from rsplatform.serve.record import RequestRecord

SECONDS = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30]
UNKNOWN_ROUTE = "none"  # paths that name no route are the caller's words, and without end


class RequestMetrics:
    """Requests and their seconds by route and status, seconds by stage, bytes of bodies."""

    def __init__(self) -> None:
        self._seconds = Histogram(
            "rsplatform_request_seconds", "From the first byte to the last", SECONDS, ("route", "status")
        )
        self._stages = Histogram("rsplatform_stage_seconds", "Of one request", SECONDS, ("route", "stage"))
        self._bytes = Counter("rsplatform_body_bytes_total", "Bytes of request bodies", ("route",))

    def add(self, record: RequestRecord) -> None:
        """Count one answered request."""
        route = record.route or UNKNOWN_ROUTE
        self._seconds.observe(record.seconds, {"route": route, "status": str(record.status)})
        for name, seconds in record.stages.items():
            self._stages.observe(seconds, {"route": route, "stage": name})
        if record.body_bytes:
            self._bytes.inc(record.body_bytes, {"route": route})


class BatchMetrics:
    """Sizes of the batches of one kind of forward in this process."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._sizes = Histogram("rsplatform_batch_size", "Items of a forward", [1, 2, 4, 8, 16, 32], ("kind",))

    def add(self, size: int) -> None:
        """Count one batch."""
        self._sizes.observe(size, {"kind": self._kind})
