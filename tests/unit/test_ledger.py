"""The ledger: every drop has a reason, and nothing is lost or doubled."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsplatform.artifacts import Artifact
from rsplatform.ledger import Drop, counts, read_drops, write_drops


@given(st.integers(0, 50), st.lists(st.sampled_from(["nodata", "no_landmark", "unreadable"])))
def test_inputs_are_kept_plus_dropped(num_kept: int, reasons: list[str]) -> None:
    funnel = counts(num_kept + len(reasons), num_kept, reasons)
    assert funnel["inputs"] == funnel["kept"] + sum(funnel["dropped"].values())
    with pytest.raises(ValueError, match="lost or doubled"):
        counts(num_kept + len(reasons) + 1, num_kept, reasons)


def test_a_part_written_twice_counts_once(root: str) -> None:
    artifact = Artifact(root, "chips/a/v1")
    for _ in range(2):
        write_drops(artifact, "ingest", "part-0", [Drop("a", "nodata", "0.9 of the chip")])
    write_drops(artifact, "ingest", "part-1", [Drop("b", "unreadable")])
    write_drops(artifact, "ingest", "part-2", [])
    rows = read_drops(artifact).to_pylist()
    assert [(row["id"], row["stage"], row["reason"]) for row in rows] == [
        ("a", "ingest", "nodata"),
        ("b", "ingest", "unreadable"),
    ]
