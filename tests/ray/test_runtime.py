"""The local runtime: it works, a stranger without its token is refused, and it leaves nothing behind."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray

from rsplatform.cluster import Cluster
from rsplatform.runtime import ray_runtime

pytestmark = pytest.mark.ray

JOIN = "import ray, sys; ray.init(address=sys.argv[1], logging_level='ERROR'); print('joined')"


def join(address: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Try to join the runtime at `address` from another process."""
    command = [sys.executable, "-W", "ignore", "-c", JOIN, address]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_strangers_cannot_run_code_on_a_local_runtime(tmp_path) -> None:
    # The token is chosen once a process: Ray keeps what it has read, so the environment is left as it is found.
    with ray_runtime(Cluster(root=str(tmp_path), num_cpus=1)):
        assert os.environ["RAY_AUTH_MODE"] == "token"
        address = ray.get_runtime_context().gcs_address
        assert ray.get(ray.remote(lambda: 7).remote()) == 7
        bare = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.environ["RAY_AUTH_TOKEN"]}
        strangers = ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "guess" * 8})
        with ThreadPoolExecutor() as pool:  # at the same time: Ray takes long to give up
            friend, *others = pool.map(lambda variables: join(address, bare | variables), (own, *strangers))
        assert "joined" in friend.stdout
        for refused in others:
            assert refused.returncode != 0
            assert "joined" not in refused.stdout
    assert not ray.is_initialized()
