"""One training batch, as the loader makes it and the loop reads it. Torch only; what fills it is in loader.py.

Shapes: B batch, H W pixels, C channels, T tokens.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """This process's share of a global batch: uint8 pictures, int64 token ids (0 = pad) and the sample ids.

    `ground_sample_distance_m_B` is that of the pixels here, after resizing and cropping; NaN (or None) is unknown.
    """

    images_BHWC: Tensor
    tokens_BT: Tensor
    sample_ids: tuple[str, ...]
    ground_sample_distance_m_B: Tensor | None = None

    def distances_on(self, device: torch.device) -> Tensor | None:
        """The ground sample distances on `device`."""
        distance_m_B = self.ground_sample_distance_m_B
        return None if distance_m_B is None else distance_m_B.to(device)

    def rows(self, start: int, end: int) -> "Batch":
        """Samples start … end - 1 of every field."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return replace(self, **{name: None if value is None else value[start:end] for name, value in values.items()})
