"""The size of smooth attention's window, as recipes give it: one type, so that every job refuses the same ones."""

from typing import Annotated

from pydantic import AfterValidator, Field

# Tiles and their overlap grow with the window: at 31 a tile of any model is 64 patches a side or more (our default).
MAX_WINDOW = 31


def _has_centre(window: int) -> int:
    if window % 2 == 0:
        raise ValueError(f"a window of {window} patches has no centre patch; take {window - 1} or {window + 1}")
    return window


SmoothWindow = Annotated[int, Field(ge=1, le=MAX_WINDOW), AfterValidator(_has_centre)]
