"""Ray for a job: start a local one or join the cluster that the placement names, and leave nothing behind.

Only definitions; a job that needs no Ray never pays for it.
"""

import contextlib
import importlib
import logging
import os
import secrets
from collections.abc import Iterator

import ray

from rsplatform.cluster import Cluster
from rsplatform.storage import gdal_options


@contextlib.contextmanager
def ray_runtime(cluster: Cluster) -> Iterator[None]:
    """Ray inside this block: an already connected one is used and left alone, else ours is started and stopped.

    `cluster.ray_address` None starts a local Ray (or joins the one that `ray job submit` announces). Ray's internal
    ports listen on every interface, and who reaches them may run code: a local runtime asks for a token of its own.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    joins = cluster.ray_address is not None or "RAY_ADDRESS" in os.environ
    env_vars = {key: str(value) for key, value in gdal_options().items()}
    if joins:
        ray.init(address=cluster.ray_address, runtime_env={"env_vars": env_vars}, logging_level=logging.WARNING)
    else:
        _use_own_token()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no network beyond what the user asked for
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves training beside any other work
        ray.init(
            address="local",
            num_cpus=cluster.num_cpus,
            include_dashboard=False,
            # Jobs report progress themselves; without a dashboard Ray Train would print a warning every second.
            log_to_driver=False,
            runtime_env={"env_vars": env_vars},
            logging_level=logging.WARNING,
            _node_ip_address="127.0.0.1",
        )
    try:
        yield
    finally:
        ray.shutdown()


def _use_own_token() -> None:
    """A random token for this process and its children, unless the environment has chosen a mode itself."""
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # Ray has read its settings when it was imported; this is how its own `ray start` makes it read them again.
        raylet = importlib.import_module("ray._raylet")
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()
