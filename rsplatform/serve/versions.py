"""Several versions of the service side by side: each request is answered by one, drawn by weight or asked for by name.

A canary gets a small share before it gets all; an answer is never a mix of two. Versions share chips and scenes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from rsplatform.serve.services import RequestError, Services

STABLE = "stable"
CANARY = "canary"


@dataclass(frozen=True)
class Versions:
    """Services by name, and the share of requests (0…1, together 1) that each gets unasked."""

    services: Mapping[str, Services]
    weights: Mapping[str, float]

    def choose(self, name: str | None, draw: float) -> Services:
        """The version of that name, else the one that a number in 0…1 falls to.

        Raises:
            RequestError: 404 for a name that is not served.
        """
        if name is not None:
            if name not in self.services:
                raise RequestError(404, f"no version {name!r} is served; there are {', '.join(self.services)}")
            return self.services[name]
        reached = 0.0
        for known, weight in self.weights.items():
            reached += weight
            if draw < reached:
                return self.services[known]
        return next(iter(self.services.values()))


def only(services: Services) -> Versions:
    """One version, which gets every request."""
    return Versions({services.version: services}, {services.version: 1.0})
