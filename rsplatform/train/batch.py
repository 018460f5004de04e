"""One training batch, as the loader makes it and the loop reads it. Torch only; what fills it is in loader.py.

Shapes: B batch, H W pixels, C channels, T tokens.
"""

from dataclasses import dataclass, fields, replace

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """This process's share of a global batch: uint8 pictures, int64 token ids (0 = pad) and the sample ids."""

    images_BHWC: Tensor
    tokens_BT: Tensor
    sample_ids: tuple[str, ...]

    def rows(self, start: int, end: int) -> "Batch":
        """Samples start … end - 1 of every field."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return replace(self, **{name: None if value is None else value[start:end] for name, value in values.items()})
