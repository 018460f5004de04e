"""The encoded pictures of hits, read from where they were first written: a chips artifact or a folder."""

from collections.abc import Callable, Sequence

import lance

from rsplatform.dataset.store import open_table
from rsplatform.index.store import Hit
from rsplatform.storage import read_bytes


class Pictures:
    """Reads pictures of hits; opens each table once. `resolve` turns a recipe's path into a place (Cluster.resolve)."""

    def __init__(self, root: str, resolve: Callable[[str], str]) -> None:
        self._root = root
        self._resolve = resolve
        self._tables: dict[str, lance.LanceDataset] = {}

    def read(self, hits: Sequence[Hit]) -> list[bytes]:
        """Encoded bytes of each hit's picture, in their order.

        Raises:
            ArtifactError: the chips that a hit points to are gone.
            FileNotFoundError: the file is.
            RuntimeError: the chips were made again since, and another chip lies in the row.
        """
        images: dict[str, bytes] = {}
        for table in {hit.table for hit in hits if hit.row >= 0}:
            own = [hit for hit in hits if hit.table == table]
            rows = self._opened(table).take([hit.row for hit in own], columns=["id", "image"]).to_pylist()
            for hit, row in zip(own, rows, strict=True):
                if not hit.id.startswith(row["id"]):  # the index may have added a suffix
                    raise RuntimeError(
                        f"index and chips disagree: row {hit.row} of {table} is {row['id']}, not {hit.id}"
                    )
                images[hit.id] = row["image"]
        for hit in hits:
            if hit.row < 0:
                images[hit.id] = read_bytes(f"{self._resolve(hit.table)}/{hit.file}")
        return [images[hit.id] for hit in hits]

    def _opened(self, ref: str) -> lance.LanceDataset:
        if ref not in self._tables:
            self._tables[ref] = open_table(self._root, ref)
        return self._tables[ref]
