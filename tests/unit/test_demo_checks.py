"""The demo's exit gate: what reaches each bar passes, what does not is an error that names the number."""

import contextlib
import math
from contextlib import AbstractContextManager

import pytest

from rsplatform.demo import DemoChecks, DemoFailed, check, check_overhead

CHECKS = DemoChecks(
    retrieval="val", min_recall_over_chance=5, segmentation="masks", min_overhead_average_precision=0.95
)


def benchmarks(*, recall: float = 4.0, raw: float = 20.0, smooth: float = 21.0) -> dict[str, dict[str, float]]:
    """Passing numbers, with chance at 0.5 %."""
    return {
        "val": {"t2i_r10": recall, "chance_t2i_r10": 0.5},
        "masks": {"raw_miou": raw, "smooth_miou": smooth},
    }


def passes_if(passes: bool, words: str) -> AbstractContextManager:
    return contextlib.nullcontext() if passes else pytest.raises(DemoFailed, match=words)


@pytest.mark.parametrize(("recall", "passes"), [(2.49, False), (2.5, True), (2.51, True), (math.nan, False)])
def test_recall_must_reach_its_multiple_of_chance(recall: float, passes: bool) -> None:
    with passes_if(passes, r"R@10 on val is .* × chance, below 5\.0 ×"):
        check(CHECKS, benchmarks(recall=recall))


@pytest.mark.parametrize(
    ("smooth", "raw", "passes"), [(19.9, 20, False), (20, 20, False), (20.1, 20, True), (math.nan, 20, False)]
)
def test_smooth_attention_must_beat_raw_patches(smooth: float, raw: float, passes: bool) -> None:
    with passes_if(passes, r"smooth mIoU .* on masks is not above raw 20\.0"):
        check(CHECKS, benchmarks(smooth=smooth, raw=raw))


def test_without_a_segmentation_benchmark_only_recall_is_demanded() -> None:
    check(CHECKS.model_copy(update={"segmentation": None}), benchmarks(smooth=1, raw=20))


@pytest.mark.parametrize(("precision", "passes"), [(0.949, False), (0.95, True), (0.951, True), (math.nan, False)])
def test_every_test_of_the_overhead_filter_must_reach_the_bar(precision: float, passes: bool) -> None:
    with passes_if(passes, r"whu_average_precision .* is below 0\.95"):
        metrics = {"held_out_average_precision": 0.99, "whu_average_precision": precision, "held_out_recall": 0.1}
        check_overhead(CHECKS, metrics)
