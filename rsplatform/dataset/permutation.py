"""A random order of N samples as arithmetic: the sample at any place in O(1), with no table of N numbers.

In: places, N and a key. Out: the samples at those places. A Feistel network over a grid of a × b cells, the smallest
that holds N and is nearly square, with cycle walking (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"):
a bijection by construction, whatever its round function. Not for secrets.
"""

import math

import numpy as np

ROUNDS = 6


def permuted(places: np.ndarray, num_samples: int, key: tuple[int, ...]) -> np.ndarray:
    """int64 samples at `places` (each in [0, num_samples)) of the order that belongs to `key` (not negative).

    Over all places of one key every sample comes out once.
    """
    rows = math.isqrt(num_samples - 1) + 1
    columns = -(-num_samples // rows)
    round_keys = np.random.SeedSequence(key).generate_state(2 * ROUNDS, np.uint64)
    values = _shuffled_cells(places.astype(np.uint64), rows, columns, round_keys)
    while (outside := values >= num_samples).any():  # fewer than one cell in sqrt(N) lies outside: few walk on
        values[outside] = _shuffled_cells(values[outside], rows, columns, round_keys)
    return values.astype(np.int64)


def _shuffled_cells(cells: np.ndarray, rows: int, columns: int, round_keys: np.ndarray) -> np.ndarray:
    """Each half round turns one coordinate by an amount that the other decides, which can be undone: a bijection."""
    num_rows, num_columns = np.uint64(rows), np.uint64(columns)
    row, column = np.divmod(cells, num_columns)
    for row_key, column_key in round_keys.reshape(-1, 2):
        row = (row + _mixed(column + row_key) % num_rows) % num_rows
        column = (column + _mixed(row + column_key) % num_columns) % num_columns
    return row * num_columns + column


def _mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): every bit of the input moves every bit of the output."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
