"""How far training is, as the driver sees it: a bar on a terminal, a line now and then elsewhere.

In: an MLflow run that rank 0 writes to. It is read from here, because the workers' own logs need not reach the driver.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rsplatform.tracking import Run

POLL_SECONDS = 2.0
LINE_EVERY_SECONDS = 15.0
STEP_METRIC = "train/step"
logger = logging.getLogger(__name__)


@contextlib.contextmanager
def shown_progress(run: Run | None, num_steps: int) -> Iterator[None]:
    """Show the run's progress while the block works; without a run there is nothing to show."""
    if run is None:
        yield
        return
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(run, num_steps, stop), name="progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def _watch(run: Run, num_steps: int, stop: threading.Event) -> None:
    columns = (
        TextColumn("pretrain"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    console = Console(stderr=True)
    last_line, last_step, latest = time.monotonic(), -1, LatestMetrics(run)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting workers", total=num_steps)
        while not stop.wait(POLL_SECONDS):
            metrics = latest.read()
            step = int(metrics.get(STEP_METRIC, 0))
            if step == last_step or "train/loss" not in metrics:
                continue
            last_step = step
            bar.update(task, completed=step, description=describe(metrics))
            if not console.is_terminal and time.monotonic() - last_line > LINE_EVERY_SECONDS:
                last_line = time.monotonic()
                logger.info("step %d/%d  %s", step, num_steps, describe(metrics))


class LatestMetrics:
    """A run's metrics as they were last readable: a tracking server that is away must not end the display."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.is_readable = True
        self._last: dict[str, float] = {}

    def read(self) -> dict[str, float]:
        """The metrics now, or those of the last successful read; one warning for each absence."""
        try:
            self._last = self.run.latest_metrics()
        except Exception as error:  # whatever a database or server may say
            if self.is_readable:
                logger.warning("training goes on, its progress cannot be shown now: %s", error)
            self.is_readable = False
        else:
            self.is_readable = True
        return self._last


def describe(metrics: Mapping[str, float]) -> str:
    """One line: loss and its parts, pace, data wait."""
    parts = [metrics.get(f"train/{name}", float("nan")) for name in ("loss", "contrastive", "caption")]
    pace, waiting = (metrics.get(f"train/{name}", float("nan")) for name in ("samples_per_s", "data_wait_fraction"))
    return (
        f"loss {parts[0]:.3f} (contrastive {parts[1]:.3f}, caption {parts[2]:.3f})  "
        f"{pace:.1f} samples/s  data wait {100 * waiting:.1f} %"
    )
