"""The nearest vectors to a query among some rows, exactly: float16 vectors in, rows and cosines out.

A first pass in float16 (Torch multiplies it as it lies, a third of a microsecond for a row of 512) leaves those that
rounding may have put in the wrong order; these are compared in float32. Shapes: N rows, E embedding, k found.
"""

import numpy as np
import torch

# A bound on twice the error of a float16 score of unit vectors: the query's rounding 2⁻¹¹, the score's 2⁻¹², the norm
# of a rounded vector 2⁻¹².
ROUNDING = 2 * (2**-11 + 2**-12 + 2**-12)
# Rows that are gathered at once: 64 MB at a width of 512.
BLOCK_ROWS = 65_536


def nearest(
    vectors_NE: torch.Tensor, query_E: np.ndarray, k: int, rows: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The `k` of `rows` (None: all) with the highest cosine to the query: their numbers and cosines, best first.

    Equal cosines stand in the order of the rows; fewer than k only where there are fewer rows.
    """
    unit_E = torch.from_numpy(query_E.astype(np.float32) / max(float(np.linalg.norm(query_E)), 1e-12))
    num_rows = len(vectors_NE) if rows is None else len(rows)
    if num_rows > k:
        rough = _rough_scores(vectors_NE, unit_E.half(), rows)
        bar = torch.topk(rough, k).values[-1].float() - ROUNDING
        close = torch.nonzero(rough.float() >= bar)[:, 0].numpy()
        rows = close if rows is None else rows[close]
    elif rows is None:
        rows = np.arange(num_rows)
    return ranked(vectors_NE, unit_E, k, rows)


def ranked(vectors_NE: torch.Tensor, unit_E: torch.Tensor, k: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`rows` by their cosine to a unit query in float32, the best k: numbers and cosines."""
    chosen = vectors_NE[torch.from_numpy(rows)].float()
    cosines = ((chosen @ unit_E) / chosen.norm(dim=1).clamp_min(1e-12)).numpy()
    order = np.lexsort((rows, -cosines))[:k]
    return rows[order], cosines[order]


def _rough_scores(vectors_NE: torch.Tensor, unit_E: torch.Tensor, rows: np.ndarray | None) -> torch.Tensor:
    if rows is None:
        return vectors_NE @ unit_E
    index = torch.from_numpy(rows)
    return torch.cat([vectors_NE[part] @ unit_E for part in index.split(BLOCK_ROWS)])
