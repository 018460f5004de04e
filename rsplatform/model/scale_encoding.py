"""Tells a vision encoder how many metres a pixel of its picture covers: by a vector per picture, by positions, or both.

In: ground sample distances (B,), NaN where unknown. Out: what is added to the patches, exactly zero where the distance
is unknown and before training. Does not resample pictures: the distance is that of the pixels the encoder gets.

ScaleEncoding is our design [D]. ScalePositions has Scale-MAE's formula (arXiv 2212.14532, section 3.1) [F]: sine-cosine
positions whose places are multiplied by the distance, so that the same metres are the same step in all pictures. It has
them in place of any other positions and at full strength; beside the learned ones, with a gain per channel that starts
at zero, they are ours [D], because web pairs have no distance and would have no positions.
Shapes: B batch, F features, H W patches, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Periods in octaves of the distance: 0.1 to 30 m span 8.2 of them, so that the longest is one-to-one over any range.
LONGEST_PERIOD, SHORTEST_PERIOD, NUM_PERIODS = 32.0, 2.0, 8

# Scale-MAE's: metres a pixel at which its positions are the plain ones, and the longest wave, in patches times 2 pi.
REFERENCE_DISTANCE_M, LONGEST_WAVE = 1.0, 10_000.0


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
    distance_B, known_B = _known_distances(ground_sample_distance_m_B)
    octaves_B = distance_B.log2()
    powers_K = torch.arange(NUM_PERIODS, device=distance_B.device, dtype=distance_B.dtype) / (NUM_PERIODS - 1)
    periods_K = LONGEST_PERIOD * (SHORTEST_PERIOD / LONGEST_PERIOD) ** powers_K
    angles_BK = 2 * torch.pi * octaves_B.unsqueeze(1) / periods_K
    return torch.cat([angles_BK.sin(), angles_BK.cos()], dim=1) * known_B.unsqueeze(1)


class ScalePositions(nn.Module):
    """Positions of the patches in metres, with a gain per channel that starts at zero."""

    def __init__(self, width: int):
        super().__init__()
        self.gain_D = nn.Parameter(torch.zeros(width))

    def forward(self, ground_sample_distance_m_B: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, H, W, D). A distance that is no positive finite number counts as unknown."""
        positions_BHWD = scaled_positions(ground_sample_distance_m_B, grid, len(self.gain_D))
        return positions_BHWD.to(self.gain_D.dtype) * self.gain_D


def scaled_positions(ground_sample_distance_m_B: Tensor, grid: tuple[int, int], width: int) -> Tensor:
    """(B, H, W, D): sin and cos of the column's, then of the row's place times distance / 1 m / 10000^(4 i / D), in at
    least float32; zeros where the distance is unknown."""
    distance_B, known_B = _known_distances(ground_sample_distance_m_B)
    powers_F = torch.arange(width // 4, device=distance_B.device, dtype=distance_B.dtype) / (width // 4)
    frequencies_F = LONGEST_WAVE**-powers_F

    def waves(num_places: int) -> Tensor:
        places_P = torch.arange(num_places, device=distance_B.device, dtype=distance_B.dtype)
        angles_BPF = (distance_B / REFERENCE_DISTANCE_M)[:, None, None] * places_P[:, None] * frequencies_F
        return torch.cat([angles_BPF.sin(), angles_BPF.cos()], dim=2) * known_B[:, None, None]

    rows_BHF, columns_BWF = waves(grid[0]), waves(grid[1])
    columns_BHWF = columns_BWF.unsqueeze(1).expand(-1, grid[0], -1, -1)
    return torch.cat([columns_BHWF, rows_BHF.unsqueeze(2).expand(-1, -1, grid[1], -1)], dim=3)


def _known_distances(ground_sample_distance_m_B: Tensor) -> tuple[Tensor, Tensor]:
    """Distances in at least float32, with 1 for unknown ones, and which are known."""
    distance_B = ground_sample_distance_m_B.to(torch.promote_types(ground_sample_distance_m_B.dtype, torch.float32))
    known_B = distance_B.isfinite() & (distance_B > 0)
    return torch.where(known_B, distance_B, 1.0), known_B
