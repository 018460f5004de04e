"""Checkpoints of a training run: one safetensors file each, on a local path or S3, whole or not there at all.

In: named tensors and the progress. Out: the newest checkpoint, or None. Never a pickle. The random state is not
stored: it is a function of (seed, step). Does not decide when to save. Whole states only: a sharded format for
models that do not fit one host is not here.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from rsplatform import storage
from rsplatform.train.pretrain import Progress

_NAME = re.compile(r"^step_(\d{8})\.safetensors$")
_PROGRESS_KEY = "progress"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names the file and the remedy."""


@dataclass(frozen=True)
class CheckpointFolder:
    """Checkpoints below `uri`; the newest `keep_last` are kept."""

    uri: str
    keep_last: int = 2

    def save(self, tensors: Mapping[str, Tensor], progress: Progress) -> None:
        """Write the checkpoint of `progress.step`, then remove those beyond `keep_last`."""
        own = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        data = safetensors.torch.save(own, metadata={_PROGRESS_KEY: json.dumps(asdict(progress))})
        storage.write_bytes(self._path(progress.step), data)
        for step in self.steps()[: -self.keep_last]:
            system, path = storage.filesystem(self._path(step))
            system.delete_file(path)

    def steps(self) -> list[int]:
        """Steps that have a whole checkpoint, ascending; files still being written do not count."""
        names = (_NAME.match(name) for name in storage.list_files(self.uri))
        return sorted(int(match.group(1)) for match in names if match)

    def latest(self) -> tuple[dict[str, Tensor], Progress] | None:
        """Tensors and progress of the newest checkpoint; None if there is none.

        Raises:
            CheckpointError: the file is damaged.
        """
        steps = self.steps()
        if not steps:
            return None
        path = self._path(steps[-1])
        data = storage.read_bytes(path)
        try:
            tensors = safetensors.torch.load(data)
            header_bytes = int.from_bytes(data[:8], "little")
            metadata = json.loads(data[8 : 8 + header_bytes])["__metadata__"]
            return tensors, Progress(**json.loads(metadata[_PROGRESS_KEY]))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path}: not a readable checkpoint ({error}); delete it to resume from the one before"
            ) from error

    def _path(self, step: int) -> str:
        return f"{self.uri}/step_{step:08d}.safetensors"
