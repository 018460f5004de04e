"""An index that is exchanged while it is searched: the next version is opened beside the old one, then takes its place.

A caller reads `current` once a request and uses that one throughout, so that a request sees one version from its first
search to its last look-up; an old version is freed when the last request that uses it ends.
"""

import threading

import numpy as np

from rsplatform.index.store import ChipIndex


class LiveIndex:
    """One index at a time, for the model with `model_hash`. Threads may read `current` while one of them swaps.

    Raises:
        ConfigError: the index holds vectors of another model.
    """

    def __init__(self, artifact_uri: str, model_hash: str) -> None:
        self._model_hash = model_hash
        self._swapping = threading.Lock()
        self.current = self._opened(artifact_uri)

    def swap(self, artifact_uri: str) -> ChipIndex:
        """Open a finished index and make it the current one; the old one, which stays as it is if this fails.

        Raises:
            ConfigError: the new index holds vectors of another model.
        """
        with self._swapping:
            new = self._opened(artifact_uri)
            old, self.current = self.current, new  # one assignment: a reader gets the one or the other
        return old

    def _opened(self, artifact_uri: str) -> ChipIndex:
        index = ChipIndex(artifact_uri, self._model_hash)
        # files are read and caches filled now, not by the first request
        index.search(np.full(index.meta.embedding_width, index.meta.embedding_width**-0.5, np.float32), 1)
        return index
