"""What to type next: `make serve` and `make mlflow` with the variables that a finished demo needs, ready to paste.

In: the serve recipe and the placement of this run. Out: lines of text. The Makefile's defaults are left out.
"""

import json
import os
import shlex
from pathlib import Path
from typing import Any

from rsplatform.cluster import Cluster
from rsplatform.config import load_config
from rsplatform.serve.deployment import ServeConfig

DEFAULT_RECIPE, DEFAULT_CLUSTER, DEFAULT_ROOT = "world", "cluster/local.yaml", "artifacts"
RECIPES = Path(__file__).resolve().parent.parent / "configs" / "serve"


def lines(serve: ServeConfig, cluster: Cluster) -> list[str]:
    """How to look at the records of all jobs, and how to search."""
    tracking = os.environ.get("MLFLOW_TRACKING_URI")
    records = f"open {tracking}" if tracking else _make("mlflow", {"ROOT": _root(cluster)})
    place = cluster.serve
    address = f"http://{place.host}:{place.port}" if place.port else "the address that it prints"
    search = _make("serve", _serve_variables(serve, cluster))
    return [f"what every job recorded: {records}", f"search it yourself:      {search}    then open {address}"]


def _make(target: str, variables: dict[str, str]) -> str:
    words = [f"{name}={shlex.quote(value)}" for name, value in variables.items() if value]
    return " ".join(["make", target, *words])


def _root(cluster: Cluster) -> str:
    return "" if cluster.root == str(Path(DEFAULT_ROOT).absolute()) else cluster.root


def _serve_variables(serve: ServeConfig, cluster: Cluster) -> dict[str, str]:
    """RECIPE is the recipe that differs least; what differs, and overrides of the cluster file, follow the file."""
    changes = {path.stem: _changes(load_config(ServeConfig, path), serve) for path in sorted(RECIPES.glob("*.yaml"))}
    recipe = min(changes, key=lambda name: len(changes[name]), default=DEFAULT_RECIPE)
    arguments = [*(cluster.arguments or (DEFAULT_CLUSTER,)), *changes.get(recipe, [])]
    placement = shlex.join(arguments)
    return {
        "RECIPE": "" if recipe == DEFAULT_RECIPE else recipe,
        "CLUSTER": "" if placement == DEFAULT_CLUSTER else placement,
    }


def _changes(recipe: ServeConfig, wanted: ServeConfig) -> list[str]:
    """The overrides that make `wanted` of `recipe`."""
    old, new = recipe.model_dump(mode="json"), wanted.model_dump(mode="json")
    return [f"{key}={_yaml(value)}" for key, value in new.items() if value != old[key]]


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
