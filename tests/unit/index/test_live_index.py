"""An index is exchanged under load: every answer is wholly that of one version, and none fails."""

import threading
from pathlib import Path

import pytest
from index_rows import HASH, Compared, make_index, make_rows, query

from rsplatform.config import ConfigError
from rsplatform.index.live import LiveIndex
from rsplatform.index.store import ChipIndex


def test_no_answer_is_wrong_or_fails_while_versions_change(tmp_path: Path) -> None:
    folders, answers = [tmp_path / "v1", tmp_path / "v2"], []
    for number, folder in enumerate(folders):
        rows = make_rows(600, seed=number)
        make_index(rows, folder)
        answers.append(Compared(rows).ids(query(), 10))
    assert answers[0] != answers[1]
    live, stop, seen, failures = LiveIndex(str(folders[0]), HASH), threading.Event(), [], []

    def ask() -> None:
        while not stop.is_set():
            try:
                index = live.current
                ids = [hit.id for hit in index.search(query(), 10)]
                assert set(index.get(ids)) == set(ids)  # a look-up in the same version
                seen.append(answers.index(ids))
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(1, 13):
        old = live.swap(str(folders[number % 2]))
        assert [hit.id for hit in old.search(query(), 10)] == answers[(number + 1) % 2]  # still whole
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures and set(seen) == {0, 1}


def test_a_version_that_cannot_be_opened_leaves_the_old_one(tmp_path: Path) -> None:
    make_index(make_rows(50), tmp_path / "v1")
    make_index(make_rows(50), tmp_path / "other")
    live = LiveIndex(str(tmp_path / "v1"), HASH)
    served = live.current
    text = (tmp_path / "other" / "meta.json").read_text()
    (tmp_path / "other" / "meta.json").write_text(text.replace(HASH, "b" * 64))
    with pytest.raises(ConfigError, match="built with model"):
        live.swap(str(tmp_path / "other"))
    with pytest.raises(FileNotFoundError):
        live.swap(str(tmp_path / "nowhere"))
    assert live.current is served and isinstance(served, ChipIndex) and len(served.search(query(), 5)) == 5
