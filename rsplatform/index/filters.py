"""What a search may be narrowed by, as a typed value. It narrows nothing:
held_rows.py does, before anything is compared.

No text of a request is ever part of a query language: every value is a checked number, a parsed time or a plain string.
"""

import math
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from rsplatform.geo import BoundsLonLat
from rsplatform.records import parse_time

Interval = tuple[datetime | None, datetime | None]


@dataclass(frozen=True)
class SearchFilter:
    """Conditions that a chip must meet; an unset one lets every chip pass.

    `bounds_lonlat` is (west, south, east, north) in degrees; west > east crosses the antimeridian (GeoJSON).
    "intersects" (STAC's meaning) takes chips that touch the box, "within" only chips that lie wholly inside. A chip
    whose place is unknown passes no box, one without a date no datetime condition, one without a scale no scale.
    `kinds` takes chips with at least one of the landmarks.

    Raises:
        ValueError: a number that is not finite.
    """

    bounds_lonlat: BoundsLonLat | None = None
    relation: Literal["intersects", "within"] = "intersects"
    interval: Interval = (None, None)
    ground_sample_distance_m: tuple[float, float] | None = None
    kinds: tuple[str, ...] = ()
    excluded_id: str | None = None

    def __post_init__(self) -> None:
        for value in (*(self.bounds_lonlat or ()), *(self.ground_sample_distance_m or ())):
            if not math.isfinite(value):
                raise ValueError(f"{value} is not a finite number")


def parse_interval(text: str) -> Interval:
    """An RFC 3339 time, or `start/end` where `..` or nothing leaves a side open (STAC's datetime).

    Raises:
        ValueError: not of that form, or the start lies after the end.
    """
    sides = text.split("/")
    if len(sides) > 2:
        raise ValueError(f"datetime {text!r}: expected one time or start/end")
    times = [None if side in {"", ".."} else parse_time(side) for side in sides]
    if times == [None] * len(times):
        raise ValueError(f"datetime {text!r}: at least one side must be a time")
    start, end = times[0], times[-1]
    if start and end and start > end:
        raise ValueError(f"datetime {text!r}: the start lies after the end")
    return start, end
