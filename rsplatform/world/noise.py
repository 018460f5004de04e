"""Seeded noise over metres: coordinates and a seed in, values out; the same place always gets the same value.

Letters: H, W rows and columns of a grid; N loose pixels. Coordinates are local metres, x east, y north.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
TABLE_SIZE = 256  # the noise repeats after this many lattice cells


def random_table(seed: int) -> Floats:
    """(TABLE_SIZE, TABLE_SIZE) uniform values in [0, 1)."""
    return np.random.default_rng(seed).random((TABLE_SIZE, TABLE_SIZE), dtype=np.float32)


def _cells(values_m: Floats, period_m: float) -> tuple[NDArray[np.int64], Floats]:
    """Lattice cell of each coordinate and the smoothed position in it."""
    scaled = values_m / period_m
    cell = np.floor(scaled)
    position = (scaled - cell).astype(np.float32)
    return cell.astype(np.int64), position * position * (3 - 2 * position)


def value_noise(x_W: Floats, y_H: Floats, period_m: float, seed: int) -> Floats:
    """(H, W) smooth noise in [-1, 1] with blobs of about `period_m`. Rows first, then columns: a grid is separable."""
    table = random_table(seed) * 2 - 1
    row, row_position = _cells(y_H, period_m)
    column, column_position = _cells(x_W, period_m)
    row_position = row_position[:, None]
    rows = table[row % TABLE_SIZE] * (1 - row_position) + table[(row + 1) % TABLE_SIZE] * row_position
    left = np.take(rows, column % TABLE_SIZE, axis=1)
    right = np.take(rows, (column + 1) % TABLE_SIZE, axis=1)
    right -= left
    right *= column_position
    right += left
    return right


def fractal_noise(x_W: Floats, y_H: Floats, weights_by_period_m: dict[float, float], seed: int) -> Floats:
    """(H, W) sum of value noises, each weighted; the octave is part of the seed."""
    total = np.zeros((len(y_H), len(x_W)), np.float32)
    for octave, (period_m, weight) in enumerate(weights_by_period_m.items()):
        total += weight * value_noise(x_W, y_H, period_m, seed * 31 + octave)
    return total


def cell_values(column_N: NDArray[np.int64], row_N: NDArray[np.int64], seed: int) -> Floats:
    """One uniform value in [0, 1) for each lattice cell."""
    return random_table(seed)[row_N % TABLE_SIZE, column_N % TABLE_SIZE]


def nearest_crowns(x_N: Floats, y_N: Floats, spacing_m: float, seed: int) -> tuple[Floats, Floats, Floats]:
    """Round things scattered one to a cell: offset (x, y) to the nearest centre in metres, and its own random value.

    Each pixel asks the 3x3 cells around it, so that a crown may reach over its cell's border.
    """
    column = np.floor(x_N / spacing_m).astype(np.int64)
    row = np.floor(y_N / spacing_m).astype(np.int64)
    table_x, table_y, table_value = (random_table(seed * 7 + part) for part in range(3))
    nearest = np.full(x_N.shape, np.inf, np.float32)
    offset_x, offset_y, value = (np.zeros(x_N.shape, np.float32) for _ in range(3))
    for row_step in (-1, 0, 1):
        for column_step in (-1, 0, 1):
            at = ((row + row_step) % TABLE_SIZE, (column + column_step) % TABLE_SIZE)
            to_x = x_N - ((column + column_step + 0.15 + 0.7 * table_x[at]) * spacing_m).astype(np.float32)
            to_y = y_N - ((row + row_step + 0.15 + 0.7 * table_y[at]) * spacing_m).astype(np.float32)
            distance = to_x * to_x + to_y * to_y
            closer = distance < nearest
            nearest = np.where(closer, distance, nearest)
            offset_x, offset_y = np.where(closer, to_x, offset_x), np.where(closer, to_y, offset_y)
            value = np.where(closer, table_value[at], value)
    return offset_x, offset_y, value
