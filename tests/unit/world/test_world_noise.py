"""Noise: the fast code gives what the obvious slow code gives, and the same place always the same value."""

import numpy as np

from rsplatform.world.noise import TABLE_SIZE, nearest_crowns, random_table, value_noise

SEED = 9


def _slow_value(x: float, y: float, period_m: float) -> float:
    """Bilinear between the four lattice values around a point, with smoothed positions."""
    table = random_table(SEED) * 2 - 1
    column, row = int(np.floor(x / period_m)), int(np.floor(y / period_m))
    right, up = (((value / period_m) % 1) for value in (x, y))
    right, up = (share * share * (3 - 2 * share) for share in (right, up))
    low, high = (
        table[(row + step) % TABLE_SIZE, column % TABLE_SIZE] * (1 - right)
        + table[(row + step) % TABLE_SIZE, (column + 1) % TABLE_SIZE] * right
        for step in (0, 1)
    )
    return float(low * (1 - up) + high * up)


def test_value_noise_is_bilinear_on_its_lattice() -> None:
    x_W, y_H = np.linspace(-90, 130, 23), np.linspace(240, -40, 17)
    slow = np.array([[_slow_value(x, y, 21.0) for x in x_W] for y in y_H])
    np.testing.assert_allclose(value_noise(x_W, y_H, 21.0, SEED), slow, atol=1e-5)


def test_noise_belongs_to_the_place_not_to_the_grid() -> None:
    x_W, y_H = np.arange(0.0, 200.0, 2.0), np.arange(100.0, 0.0, -2.0)
    whole = value_noise(x_W, y_H, 30.0, SEED)
    np.testing.assert_array_equal(whole[10:, 20:], value_noise(x_W[20:], y_H[10:], 30.0, SEED))


def test_nearest_crown_is_the_nearest_of_all() -> None:
    rng = np.random.default_rng(0)
    x_N, y_N = rng.uniform(20, 60, 200), rng.uniform(20, 60, 200)
    spacing = 8.0
    tables = [random_table(SEED * 7 + part) for part in range(2)]
    cells = np.arange(0, 12)
    centre_x = ((cells[None] + 0.15 + 0.7 * tables[0][:12, :12]) * spacing).ravel()
    centre_y = ((cells[:, None] + 0.15 + 0.7 * tables[1][:12, :12]) * spacing).ravel()
    slow = np.hypot(x_N[:, None] - centre_x, y_N[:, None] - centre_y).min(axis=1)
    offset_x, offset_y, _ = nearest_crowns(x_N, y_N, spacing, SEED)
    np.testing.assert_allclose(np.hypot(offset_x, offset_y), slow, atol=1e-3)
