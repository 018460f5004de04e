"""How much work is let in: a rate per API key, and a number of requests and bytes that are held at once.

Counts live in one process: with several replicas each has its share. Nothing here waits; who is not let in is told
when to come again.
"""

import math
import time
from collections.abc import Callable

# What a refused caller is told to wait, in seconds.
RETRY_AFTER_S = 2


class RateLimit:
    """A bucket of tokens per key, full at the start and refilled evenly: bursts of a minute's worth, then the rate."""

    def __init__(self, requests_per_minute: float, now: Callable[[], float] = time.monotonic) -> None:
        self._capacity = max(1.0, requests_per_minute)
        self._per_second = requests_per_minute / 60
        self._now = now
        self._left: dict[str, tuple[float, float]] = {}  # tokens, and when they were counted

    def wait_s(self, key: str, cost: float = 1) -> int:
        """Take `cost` tokens (at most 1): 0, or the whole seconds until there are so many."""
        now = self._now()
        left, counted = self._left.get(key, (self._capacity, now))
        left = min(self._capacity, left + (now - counted) * self._per_second)
        taken = left > cost - 1e-6  # sums of floats: the promised wait must be enough
        self._left[key] = (left - cost if taken else left, now)
        return 0 if taken else max(1, math.ceil((cost - left) / self._per_second))


class Admission:
    """Requests and bytes of their bodies that this process holds at the moment."""

    def __init__(self, max_requests: int, max_bytes: int) -> None:
        self._max_requests, self._max_bytes = max_requests, max_bytes
        self.requests, self.bytes = 0, 0

    def enter(self) -> bool:
        """Count a request in, unless there are too many; call `leave` for one that was let in."""
        if self.requests >= self._max_requests:
            return False
        self.requests += 1
        return True

    def hold(self, num_bytes: int) -> bool:
        """Count bytes in; False if that is more than may be held, they count nevertheless until `leave`."""
        self.bytes += num_bytes
        return self.bytes <= self._max_bytes

    def leave(self, num_bytes: int) -> None:
        """Count a request and all its bytes out."""
        self.requests -= 1
        self.bytes -= num_bytes
