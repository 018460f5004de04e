"""What a search may be narrowed by, as a typed value, and the SQL predicate that LanceDB runs before the search.

Every value is a checked float, a parsed time or a quoted string: no text of a request reaches the SQL as SQL.
Does not search.
"""

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from rsplatform.geo import BoundsLonLat
from rsplatform.records import parse_time

Interval = tuple[datetime | None, datetime | None]


@dataclass(frozen=True)
class SearchFilter:
    """Conditions that a chip must meet; an unset one lets every chip pass.

    `bounds_lonlat` is (west, south, east, north) in degrees; west > east crosses the antimeridian (GeoJSON).
    "intersects" (STAC's meaning) takes chips that touch the box, "within" only chips that lie wholly inside.
    A chip without a date passes no datetime condition. `kinds` takes chips with at least one of the landmarks.
    """

    bounds_lonlat: BoundsLonLat | None = None
    relation: Literal["intersects", "within"] = "intersects"
    interval: Interval = (None, None)
    ground_sample_distance_m: tuple[float, float] | None = None
    kinds: tuple[str, ...] = ()
    excluded_id: str | None = None

    def sql(self) -> str | None:
        """The predicate, or None if nothing is asked; ValueError for a number that is not finite."""
        parts = [_place(self.bounds_lonlat, self.relation)] if self.bounds_lonlat else []
        start, end = self.interval
        parts += [f"datetime >= {_time(start)}"] if start else []
        parts += [f"datetime <= {_time(end)}"] if end else []
        if self.ground_sample_distance_m:
            low, high = self.ground_sample_distance_m
            parts.append(f"ground_sample_distance_m >= {_number(low)} AND ground_sample_distance_m <= {_number(high)}")
        if self.kinds:
            parts.append(f"array_has_any(kinds, [{', '.join(quoted(kind) for kind in self.kinds)}])")
        parts += [f"id != {quoted(self.excluded_id)}"] if self.excluded_id else []
        return " AND ".join(f"({part})" for part in parts) or None


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


def quoted(text: str) -> str:
    """A string as a SQL literal: quotes doubled, nothing else is special inside."""
    return "'" + text.replace("'", "''") + "'"


def _number(value: float) -> str:
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    return f"CAST({float(value)!r} AS DOUBLE)"


def _time(time: datetime) -> str:
    return f"timestamp '{time.astimezone(UTC).strftime('%Y-%m-%dT%H:%M:%S.%fZ')}'"


def _place(bounds_lonlat: BoundsLonLat, relation: str) -> str:
    west, south, east, north = bounds_lonlat
    if relation == "within":
        latitudes = f"south >= {_number(south)} AND north <= {_number(north)}"
        after_west, before_east = f"west >= {_number(west)}", f"east <= {_number(east)}"
        # a chip inside a box that crosses 180° lies wholly on one side of it
        across = f"(west <= east AND ({after_west} OR {before_east}))"
    else:
        latitudes = f"south <= {_number(north)} AND north >= {_number(south)}"
        after_west, before_east = f"east >= {_number(west)}", f"west <= {_number(east)}"
        across = f"({after_west} OR {before_east})"
    longitudes = across if west > east else f"{after_west} AND {before_east}"
    return f"{latitudes} AND {longitudes}"
