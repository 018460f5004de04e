"""From how well each prompt fits each pixel to one class per pixel, for evaluation and for map products.

In: maps at pixel size. Out: class ids. It fits no threshold, so there is nothing that could be chosen from
masks.
"""

from collections.abc import Sequence

import numpy as np

BACKGROUND = 0
NO_DATA = 255


def label_pixels(maps_PHW: np.ndarray, class_of_prompt: Sequence[int]) -> np.ndarray:
    """Each pixel gets the class of its best prompt, uint8; a pixel with NaN in any map has no data (255).

    Several prompts may stand for one class, above all for the background (0). A tie goes to the lower class,
    so to the background first. Our default. Raises ValueError unless there is one class below 255 for each of
    P maps.
    """
    if maps_PHW.ndim != 3 or not len(maps_PHW) or len(class_of_prompt) != len(maps_PHW):
        raise ValueError(f"maps {maps_PHW.shape} need a class for each prompt, got {len(class_of_prompt)}")
    if not 0 <= min(class_of_prompt) <= max(class_of_prompt) < NO_DATA:
        raise ValueError(f"class_of_prompt must lie in 0…{NO_DATA - 1}, got {sorted(set(class_of_prompt))}")
    by_class = sorted(range(len(maps_PHW)), key=lambda prompt: class_of_prompt[prompt])
    classes = np.array([class_of_prompt[prompt] for prompt in by_class], dtype=np.uint8)
    labels_HW = classes[maps_PHW[by_class].argmax(axis=0)]
    labels_HW[np.isnan(maps_PHW).any(axis=0)] = NO_DATA
    return labels_HW
