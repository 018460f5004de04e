"""What Ray Train needs to follow a cluster that grows and shrinks: worker counts that fit a batch, and a warning taken.

In: the numbers of workers to choose from. Out: a trainer that starts the most of them that fit the cluster, a word when
a worker's machine is about to go, and a Ctrl-C that stops the workers. Ray's own policy takes every number of a range,
so 256 samples would meet three workers. Rounding it down overrides two methods that Ray keeps to itself: read them
again with a new version of Ray.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import ray.train
from ray.train import Result, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy


class CountsPolicy(ElasticScalingPolicy):
    """Ray's elastic policy, but for `counts` alone: surplus workers are not started."""

    def __init__(self, scaling_config: ScalingConfig, counts: tuple[int, ...]) -> None:
        super().__init__(scaling_config)
        self._counts = counts

    def _count_possible_workers(self, reserved_resources: dict[str, dict[str, float]]) -> int:
        possible = super()._count_possible_workers(reserved_resources)
        return max((count for count in self._counts if count <= possible), default=0)


class ElasticTrainer(TorchTrainer):
    """TorchTrainer that keeps to `counts` where its `scaling_config` is a range of workers."""

    def __init__(self, *arguments: Any, counts: tuple[int, ...], **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._counts = counts

    def _initialize_and_run_controller(self, **settings: Any) -> Result:
        if self.scaling_config.elasticity_enabled:
            settings["scaling_policy"] = CountsPolicy(self.scaling_config, self._counts)
        return super()._initialize_and_run_controller(**settings)


class PreemptionNotice:
    """Tells once that the machine of some worker is about to be taken away. To be called by all workers together.

    Training goes on meanwhile: Ray starts again when the machine is gone, and a run that ended now would be taken for
    finished.
    """

    def __init__(self) -> None:
        self._is_known = False

    def __call__(self) -> bool:
        """Whether there is a notice that was not told before."""
        if self._is_known:
            return False
        self._is_known = ray.train.get_preemption_info() is not None
        return self._is_known


@contextlib.contextmanager
def stopped_by_ctrl_c() -> Iterator[None]:
    """A SIGINT inside stops the workers, then is the KeyboardInterrupt that it is anywhere else; after it as before.

    Ray Train installs its handler for good: it exits the process without a word, and swallows what comes after a run.
    """
    earlier = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as exited:
        raise KeyboardInterrupt from exited
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, earlier)
