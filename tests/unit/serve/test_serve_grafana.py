"""The dashboard asks for series that exist, under names of ours or of the Ray that is installed."""

import json
import re
from pathlib import Path

import ray.serve

REPOSITORY = Path(__file__).resolve().parents[3]


def test_every_series_of_the_dashboard_is_written_by_somebody() -> None:
    dashboard = json.loads((REPOSITORY / "cluster" / "grafana.json").read_text())
    queries = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    names = {re.sub(r"_(bucket|count|sum)$", "", name) for name in re.findall(r"\bray_(\w+)", queries)}
    ours = (REPOSITORY / "rsplatform" / "serve" / "metrics.py").read_text()
    serve = "".join(path.read_text() for path in Path(ray.serve.__file__).parent.rglob("*.py"))
    assert len(names) >= 6
    assert not {name for name in names if f'"{name}"' not in ours + serve}
