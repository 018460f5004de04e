"""IoU equals counting sets of pixels, streamed or at once; one decision rule serves every method."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsplatform.config import ConfigError
from rsplatform.evaluate.segmentation import ConfusionMatrix, decide


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), num_classes=st.integers(2, 5), pictures=st.integers(1, 4))
def test_iou_equals_pixel_sets_streamed(seed, num_classes, pictures):
    generator = np.random.default_rng(seed)
    matrix = ConfusionMatrix(num_classes)
    all_masks, all_predictions = [], []
    for _ in range(pictures):
        mask = generator.integers(0, num_classes, (5, 4)).astype(np.uint8)
        mask[generator.random((5, 4)) < 0.3] = 255
        mask[0, 0] = 0
        prediction = generator.integers(0, num_classes, (5, 4)).astype(np.uint8)
        matrix.update(prediction, mask)
        all_masks.append(mask)
        all_predictions.append(prediction)
    mask, prediction = np.stack(all_masks), np.stack(all_predictions)
    counted, scores = mask != 255, matrix.scores()
    assert set(scores.iou_by_class) == set(np.unique(mask[counted]))
    for label, iou in scores.iou_by_class.items():
        both = ((mask == label) & (prediction == label) & counted).sum()
        either = (((mask == label) | (prediction == label)) & counted).sum()
        assert iou == pytest.approx(100 * both / either)
    assert scores.mean_iou == pytest.approx(np.mean(list(scores.iou_by_class.values())))
    assert matrix.counts.sum() == counted.sum()


def test_best_prompt_decides_and_the_background_wins_ties():
    maps = np.array([[[0.9, 0.1]], [[0.5, 0.1]], [[0.2, 0.1]]])
    assert decide(maps, [2, 0, 1], (1, 2)).tolist() == [[2, 0]]
    assert decide(maps, [2, 2, 1], (1, 2)).tolist() == [[2, 1]]
    assert decide(torch.rand(3, 4, 4), [0, 1, 2], (37, 50)).shape == (37, 50)


def test_bad_input_is_named():
    matrix = ConfusionMatrix(2)
    with pytest.raises(ConfigError, match="masks: no pixel.*give masks"):
        matrix.scores()
    with pytest.raises(ValueError, match="differ in shape"):
        matrix.update(np.zeros((2, 2)), np.zeros((2, 3)))
    with pytest.raises(ValueError, match="prediction holds"):
        matrix.update(np.full((2, 2), 7), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="NaN"):
        decide(np.full((2, 1, 1), np.nan), [0, 1], (1, 1))
    with pytest.raises(ValueError, match="a class for each"):
        decide(np.zeros((2, 1, 1)), [0], (1, 1))
