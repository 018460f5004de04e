"""One training batch, as the loader makes it and the loop reads it. Torch only; what fills it is in loader.py.

Shapes: B batch, H W pixels, C channels, T tokens.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """This process's share of a global batch: uint8 pictures, int64 token ids (0 = pad) and the sample ids."""

    images_BHWC: Tensor
    tokens_BT: Tensor
    sample_ids: tuple[str, ...]
