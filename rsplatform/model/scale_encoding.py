"""Tells a vision encoder how many metres a pixel of its picture covers: a vector per picture, added to each patch.

In: ground sample distances (B,), NaN where unknown. Out: (B, D), exactly zero where unknown and before training.
Does not resample pictures: the distance is that of the pixels the encoder gets.

Our design [D]. Scale-MAE (arXiv 2212.14532), the published one, multiplies the places in fixed sin-cos positions by
the distance. Not taken here, because learned positions of a checkpoint would be lost, because every picture would
need a distance (web pairs have none), and because a patch's encoding would depend on where its tile was cut: maps of
whole scenes would show the tiles. Shapes: B batch, F features, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Periods in octaves of the distance: 0.1 to 30 m span 8.2 of them, so that the longest is one-to-one over any range.
LONGEST_PERIOD, SHORTEST_PERIOD, NUM_PERIODS = 32.0, 2.0, 8


class ScaleEncoding(nn.Module):
    """Sines and cosines of log2 of the distance, through one linear map that starts at zero."""

    def __init__(self, width: int):
        super().__init__()
        self.weight_DF = nn.Parameter(torch.zeros(width, 2 * NUM_PERIODS))

    def forward(self, ground_sample_distance_m_B: Tensor) -> Tensor:
        """(B, D). A distance that is no positive finite number counts as unknown."""
        return F.linear(scale_features(ground_sample_distance_m_B).to(self.weight_DF.dtype), self.weight_DF)


def scale_features(ground_sample_distance_m_B: Tensor) -> Tensor:
    """(B, F): sin and cos of 2 pi log2(distance / 1 m) / period, in at least float32; zeros where it is unknown."""
    distance_B = ground_sample_distance_m_B.to(torch.promote_types(ground_sample_distance_m_B.dtype, torch.float32))
    known_B = distance_B.isfinite() & (distance_B > 0)
    octaves_B = torch.where(known_B, distance_B, 1.0).log2()
    powers_K = torch.arange(NUM_PERIODS, device=distance_B.device, dtype=distance_B.dtype) / (NUM_PERIODS - 1)
    periods_K = LONGEST_PERIOD * (SHORTEST_PERIOD / LONGEST_PERIOD) ** powers_K
    angles_BK = 2 * torch.pi * octaves_B.unsqueeze(1) / periods_K
    return torch.cat([angles_BK.sin(), angles_BK.cos()], dim=1) * known_B.unsqueeze(1)
