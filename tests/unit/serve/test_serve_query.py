"""What is wanted and what not: how texts are split, and the vector that a search compares with."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsplatform.serve.query import Query, query_vector, read_query


@pytest.mark.parametrize(
    ("text", "wanted", "unwanted"),
    [
        ("harbour, not marina", ("harbour",), ("marina",)),
        ("harbour but not a marina", ("harbour",), ("a marina",)),
        ("a road without any trees or cars", ("a road",), ("trees", "cars")),
        ("harbour; a stadium, no water", ("harbour", "a stadium"), ("water",)),
        ("Fields except for forest", ("Fields",), ("forest",)),
        ("not water, harbour", ("harbour",), ("water",)),
        ("a knot of roads, nothing else", ("a knot of roads, nothing else",), ()),
        ("a road and a field, with water", ("a road and a field, with water",), ()),
        ("a place that is not far from the sea", ("a place that is not far from the sea",), ()),
    ],
)
def test_texts_are_read_as_a_person_means_them(text: str, wanted: tuple[str, ...], unwanted: tuple[str, ...]) -> None:
    assert read_query(text) == Query(wanted, unwanted)


@pytest.mark.parametrize("text", ["not a marina", "without water", ";", " , "])
def test_a_text_that_wants_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="what to look for"):
        read_query(text)


@given(st.text(max_size=80))
def test_no_text_breaks_the_reader(text: str) -> None:
    try:
        query = read_query(text)
    except ValueError:
        return
    assert query.wanted and all(part.strip() for part in (*query.wanted, *query.unwanted))


def test_one_wanted_text_is_its_own_vector_and_the_unwanted_is_farther_away() -> None:
    rng = np.random.default_rng(0)
    vectors_PE = rng.normal(size=(3, 16)).astype(np.float32)
    vectors_PE /= np.linalg.norm(vectors_PE, axis=1, keepdims=True)
    wanted_PE, unwanted_PE = vectors_PE[:1], vectors_PE[1:2]
    none_PE = vectors_PE[:0]
    assert (query_vector(wanted_PE, none_PE) == wanted_PE[0]).all()
    without_E = query_vector(wanted_PE, unwanted_PE)
    assert without_E @ unwanted_PE[0] < wanted_PE[0] @ unwanted_PE[0] and without_E @ wanted_PE[0] > 0
    both_E = query_vector(vectors_PE[:2], none_PE)
    assert both_E @ vectors_PE[0] == pytest.approx(both_E @ vectors_PE[1], abs=1e-5)
    assert np.isfinite(query_vector(wanted_PE, wanted_PE / 0.75)).all()  # nothing is left: the wanted one stays
