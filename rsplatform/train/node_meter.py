"""What the machine under a worker does: its cores, its memory, its cards, read when a report is due and by no thread.

In: the worker's device. Out: metrics `system/node_<rank>/…`, named as MLflow's own monitor names them, so that its page
of system metrics shows them. Nodes are numbered, so that curves of different runs compare; a tag of the run names the
host of each. Percentages of cores are means since the last reading, those of cards the driver's last fraction of a
second. One worker a node reads.
"""

import logging
import os
import socket
from collections.abc import Callable

import psutil
import torch

from rsplatform.tracking import Run, is_server

Report = Callable[[dict[str, float], int], None]
logger = logging.getLogger("rsplatform.train")


def reporting_node(report: Report, run: Run | None, device: torch.device, *, is_first: bool) -> Report:
    """`report`, and on the first worker of each node the node's use to `run` with every pace that is reported.

    Other nodes than the first write only where MLflow is a server: a SQLite file is no place for several machines.
    """
    if run is None or not _is_first_of_node() or not (is_first or is_server(run.uri)):
        return report
    meter = NodeMeter(device)
    run.set_tags({node_name(): socket.gethostname()})
    send = run.queue_metrics if is_first else run.going_on().log_metrics  # the first's report sends both at once

    def report_both(metrics: dict[str, float], step: int) -> None:
        if "samples_per_s" in metrics:
            send(meter.read(), step)
        report(metrics, step)

    return report_both


def node_name() -> str:
    """`node_0` for the first worker's machine, and so on; Ray Train sets the number."""
    return f"node_{os.environ.get('NODE_RANK', '0')}"


def _is_first_of_node() -> bool:
    """As Ray Train and torch's launchers tell it; a worker alone is."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


class NodeMeter:
    """Reads the node of a worker that trains on `device`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._asks_driver = device.type == "cuda"
        psutil.cpu_percent()  # the first call has nothing to compare with

    def read(self) -> dict[str, float]:
        """Use of cores, memory and visible cards now."""
        memory = psutil.virtual_memory()
        used = memory.total - memory.available
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": used / 1e6,
            "system_memory_usage_percentage": 100 * used / memory.total,
        }
        return {f"system/{node_name()}/{name}": value for name, value in (values | self._cards()).items()}

    def _cards(self) -> dict[str, float]:
        """All visible cards by their driver; where it cannot be asked, the memory of the worker's own card."""
        if self.device.type != "cuda":
            return {}
        if self._asks_driver:
            try:
                return _cards_by_driver()
            except Exception as error:  # the driver's library is missing, too old, or refuses: training goes on
                self._asks_driver = False
                logger.warning("use of the cards is not recorded, only the own one's memory: %s", error)
        free, total = torch.cuda.mem_get_info(self.device)
        return _memory(self.device.index or 0, total - free, total)


def _cards_by_driver() -> dict[str, float]:
    """Through torch, which knows the visible cards; it needs nvidia-ml-py (or amdsmi) and says so."""
    values: dict[str, float] = {}
    for index in range(torch.cuda.device_count()):
        total = torch.cuda.get_device_properties(index).total_memory
        values |= _memory(index, torch.cuda.device_memory_used(index), total)
        values[f"gpu_{index}_utilization_percentage"] = float(torch.cuda.utilization(index))
    return values


def _memory(index: int, used: int, total: int) -> dict[str, float]:
    name = f"gpu_{index}_memory_usage"
    return {f"{name}_megabytes": used / 1e6, f"{name}_percentage": 100 * used / total}
