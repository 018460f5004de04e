"""A real Ray Serve on a free port: search, localize, refusals, and nothing left behind."""

import base64
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from tiny_service import CHIPS, INDEX, MODEL, SCENE, make_all, tiny_cluster

from rsplatform.artifacts import Artifact
from rsplatform.config import ConfigError
from rsplatform.serve.client import ApiError, Client
from rsplatform.serve.deployment import ServeConfig, application, served_by, serving

pytestmark = pytest.mark.ray

CHIP = f"{SCENE}-0003"
REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = ServeConfig(output="deployment/tiny/v1", model=MODEL, index=INDEX, chips=CHIPS, max_body_bytes=100_000)


@pytest.fixture(scope="module")
def served_root(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = str(tmp_path_factory.mktemp("served") / "artifacts")
    make_all(root)
    return root


@pytest.fixture(scope="module")
def base_url(served_root: str) -> Iterator[str]:
    with serving(CONFIG, tiny_cluster(served_root)) as url:
        yield url


@pytest.fixture
def client(base_url: str) -> Iterator[Client]:
    with Client(base_url) as client:
        yield client


def test_the_deployment_pins_what_it_serves(base_url: str, served_root: str, client: Client) -> None:
    artifact = Artifact(served_root, CONFIG.output)
    assert set(artifact.manifest()["inputs"]) == {MODEL, INDEX, CHIPS}
    assert "openapi.json" in artifact.manifest()["checksums"]
    assert client.health().num_chips == 64


def test_search_by_text_image_chip_and_box(client: Client, base_url: str) -> None:
    assert len(client.search("a stadium", k=7).results) == 7
    image = httpx.get(f"{base_url}/chips/{CHIP}.jpg", trust_env=False).content
    best = client.search(image=image, k=1).results[0]
    assert best.chip_id == CHIP and best.score > 0.99
    assert CHIP not in {item.chip_id for item in client.search(chip_id=CHIP, k=10).results}
    assert best.bounds_lonlat
    found = client.search("x", k=64, bbox=list(best.bounds_lonlat), bbox_relation="within").results
    assert [item.chip_id for item in found] == [CHIP]


def test_localize_across_replicas(client: Client, base_url: str) -> None:
    for item in client.search("a road", k=3, localize=True).results:
        assert item.spot and item.spot.peak_lonlat and item.heatmap_url and item.bounds_lonlat
        west, south, east, north = item.bounds_lonlat
        assert west <= item.spot.peak_lonlat[0] <= east and south <= item.spot.peak_lonlat[1] <= north
        heatmap = httpx.get(base_url + item.heatmap_url, trust_env=False)
        assert heatmap.headers["content-type"] == "image/png"
    assert len(client.localize(["road", "water"], chip_id=CHIP).maps) == 2
    geojson = client.localize(["road"], chip_id=CHIP, output="geojson").geojson
    assert geojson and geojson["features"]
    assert isinstance(client.caption(chip_id=CHIP), str)


def test_many_texts_at_once_give_the_vectors_of_each_alone(client: Client) -> None:
    together = client.embed_texts(["road", "a stadium beside a road", "water"])
    for text, vector in zip(["road", "a stadium beside a road", "water"], together, strict=True):
        assert abs(client.embed_texts([text])[0] - vector).max() < 1e-5


def test_bad_inputs_are_refused_in_words(client: Client) -> None:
    with pytest.raises(ApiError, match=r"422.*k: "):
        client.search("x", k=0)
    with pytest.raises(ApiError, match=r"422.*image"):
        client.search(image=b"\xff\xd8\xff broken")
    with pytest.raises(ApiError, match=r"404.*nowhere"):
        client.search(chip_id="nowhere")
    with pytest.raises(ApiError, match=r"422.*exactly one"):
        client.search()


def test_the_body_cap_holds_for_declared_and_chunked_bodies(base_url: str) -> None:
    body = b'{"image": "' + base64.b64encode(bytes(200_000)) + b'"}'
    headers = {"content-type": "application/json"}
    for content in (body, (body[i : i + 5000] for i in range(0, len(body), 5000))):
        response = httpx.post(f"{base_url}/v1/search", content=content, headers=headers, trust_env=False)
        assert response.status_code == 413 and "larger than 100000 bytes" in response.json()["detail"]


def test_another_host_name_is_refused(base_url: str) -> None:
    response = httpx.get(f"{base_url}/v1/stats", headers={"host": "evil.example"}, trust_env=False)
    assert response.status_code == 421


def test_replicas_use_the_gpu_that_the_cluster_file_grants_them(served_root: str) -> None:
    for gpus, device in ((0, "cpu"), (0.25, "cuda")):
        cluster = tiny_cluster(served_root, serve={"gpus_per_replica": gpus})
        assert served_by(CONFIG, cluster).device == device


def test_an_open_address_is_refused_before_anything_starts(served_root: str) -> None:
    cluster = tiny_cluster(served_root, serve={"host": "0.0.0.0", "port": 0})
    with pytest.raises(ConfigError, match="loopback"), serving(CONFIG, cluster):
        pass


def test_haproxy_mode_without_keys_is_refused_before_anything_starts(
    served_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It listens on every interface, whatever `host` says, and the replicas then see HAProxy's own address."""
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    cluster = tiny_cluster(served_root)
    refusal = "RAY_SERVE_ENABLE_HA_PROXY=1 listens on every interface; unset it, or set RSPLATFORM_API_KEY_SHA256"
    with pytest.raises(ConfigError, match=refusal), serving(CONFIG, cluster):
        pass
    recipe, placement = tmp_path / "serve.yaml", tmp_path / "cluster.yaml"
    recipe.write_text(yaml.safe_dump(CONFIG.model_dump()))
    placement.write_text(yaml.safe_dump({"metadata": {"rsplatform": cluster.model_dump(mode="json")}}))
    with pytest.raises(ConfigError, match=refusal):  # what `serve deploy` calls
        application({"recipe": str(recipe), "cluster": str(placement)})


def test_a_taken_port_is_refused_before_anything_starts(served_root: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        cluster = tiny_cluster(served_root, serve={"host": "127.0.0.1", "port": port})
        refusal = rf"cannot listen at 127\.0\.0\.1 port {port} \(Address already in use\).*cluster\.serve\.port="
        with pytest.raises(ConfigError, match=refusal), serving(CONFIG, cluster):
            pass


def test_the_job_stops_on_sigterm_and_leaves_no_process(tmp_path: Path) -> None:
    root = str(tmp_path / "artifacts")
    make_all(root)
    recipe, cluster = tmp_path / "serve.yaml", tmp_path / "cluster.yaml"
    recipe.write_text(yaml.safe_dump(CONFIG.model_dump()))
    cluster.write_text(yaml.safe_dump({"metadata": {"rsplatform": tiny_cluster(root).model_dump(mode="json")}}))
    command = [sys.executable, str(REPOSITORY / "jobs/serve.py"), str(recipe), str(cluster)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_ADDRESS")}
    marker = f"rsplatform-test-{os.getpid()}"
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment | {"SERVE_TEST_MARKER": marker})
    try:
        assert job.stderr is not None
        lines = []
        for line in job.stderr:
            lines.append(line)
            if "serving" in line:
                break
        assert job.poll() is None, "".join(lines)
        job.send_signal(signal.SIGTERM)
        job.stderr.read()
        assert job.wait(timeout=60) == 0
    finally:
        job.kill()
    assert Artifact(root, CONFIG.output).is_finished
    assert processes_with(marker) == []


def processes_with(marker: str) -> list[str]:
    """Command lines of living processes whose environment holds `marker` (children inherit it)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # gone meanwhile, or another user's
    return found
