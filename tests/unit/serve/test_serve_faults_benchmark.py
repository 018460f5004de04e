"""What the benchmark of faults makes of the answers around a swap."""

import importlib
from pathlib import Path
from typing import Any

import pytest

from rsplatform.serve.query import read_query


def test_an_answer_counts_for_its_own_text_and_by_when_it_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[3] / "benchmarks"))
    faults = importlib.import_module("serve_faults")  # as a script finds its neighbours
    texts = faults.TEXTS
    assert [read_query(text).wanted for text in texts] == [(text,) for text in texts]
    a, b = texts[:2]
    old, new = {a: ["1"], b: ["2"]}, {a: ["3"], b: ["2"]}

    def answer(text: str, found: str, at: float) -> Any:
        document = {"read_as": {"wanted": [text]}, "results": [{"chip_id": found}]}
        return faults.Answer(document, at, seconds=1, was_sent_twice=False)

    answers = [answer(a, "1", 5), answer(a, "3", 5), answer(b, "2", 5), answer(a, "2", 5), answer(b, "1", 5)]
    answers += [answer(a, "1", 10.5), answer(a, "1", 12), answer(a, "3", 12)]
    assert faults.answers_of(answers, old, new, swapped_at=10) == {
        **{"old": 2, "new": 1, "both": 1, "neither": 2},  # those of another text are neither's
        **{"old, asked late": 1, "new, asked late": 1},
    }
