"""What travels between stages, as Arrow schemas and small records.

Image bytes are written once, with the chip or the web pair; captions, scores and embeddings are small tables
keyed by sample id beside them.
"""

from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa

LANDMARK = pa.struct(
    [
        ("id", pa.string()),
        ("kind", pa.string()),
        ("name", pa.string()),
        ("position", pa.string()),  # "centre", "north", … of the chip
        ("area_fraction", pa.float32()),  # of the chip that the landmark covers
    ]
)

# One chip: a fixed-size cut of a scene at one ground sample distance.
CHIP_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.binary()),  # JPEG
        ("scene", pa.string()),
        ("split", pa.string()),  # train | val: chips of held-out scenes are val
        ("row_px", pa.float32()),  # window in the scene's pixels
        ("column_px", pa.float32()),
        ("height_px", pa.float32()),
        ("width_px", pa.float32()),
        ("bounds_lonlat", pa.list_(pa.float64(), 4)),  # west, south, east, north
        ("ground_sample_distance_m", pa.float32()),
        ("datetime", pa.string()),  # RFC 3339, empty if unknown
        ("nodata_fraction", pa.float32()),
        ("landmarks", pa.list_(LANDMARK)),
    ]
)

# One web pair that passed the overhead filter and the text rules.
WEB_PAIR_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.binary()),
        ("captions", pa.list_(pa.string())),
        ("source", pa.string()),
        ("split", pa.string()),
        ("overhead_score", pa.float32()),
    ]
)

# Captions of chips, keyed by chip id; each claim names the landmark that supports it.
CAPTION_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("claims", pa.list_(pa.struct([("text", pa.string()), ("landmark_id", pa.string())]))),
        ("captioner", pa.string()),
    ]
)

# A training set: row ids over dataset versions, never another copy of the pictures.
SAMPLE_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("table", pa.string()),  # artifact ref of the Lance table that holds the image
        ("row", pa.int64()),  # row in that table
        ("source", pa.string()),  # name of the dataset's source, which mixtures call it by
        ("captions", pa.list_(pa.string())),
        ("caption_weights", pa.list_(pa.float32())),  # how often each is drawn, relative to the sample's others
        ("split", pa.string()),
        ("weight", pa.float32()),  # of the sample, relative to others of its source
        ("ground_sample_distance_m", pa.float32()),  # NaN for web pairs, whose scale is unknown
    ]
)


@dataclass(frozen=True)
class Landmark:
    """One mapped thing: id in its source, kind ("stadium"), name (may be empty), geometry in lon/lat (shapely)."""

    id: str
    kind: str
    name: str
    geometry: object


def parse_time(text: str) -> datetime:
    """An RFC 3339 time or date as an aware datetime; without an offset it is UTC. ValueError otherwise."""
    try:
        time = datetime.fromisoformat(text)
        return time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"datetime {text!r}: not an RFC 3339 time such as 2024-06-01T00:00:00Z") from None
