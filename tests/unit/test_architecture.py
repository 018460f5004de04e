"""The house rules that a machine can check: directions of imports, the rims, sizes and names."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "rsplatform"

# Lower rooms may not import higher ones. The floor is what every room stands on.
FLOOR = {
    "records",
    "geo",
    "config",
    "dotted_keys",
    "cluster",
    "storage",
    "refused_writes",
    "shared_file",
    "artifacts",
    "raw_inputs",
    "lease",
    "ledger",
}
FLOOR |= {"provenance", "tracking", "stage", "runtime", "cli"}
FLOW = [
    "world",
    "sources",
    "model",
    "curate",
    "dataset",
    "train",
    "localize",
    "evaluate",
    "index",
    "serve",
    "commands",
    "summary",
    "demo",
]

RAY_RIM = {
    "runtime.py",
    "curate/pipeline.py",
    "train/worker.py",
    "train/launch.py",
    "train/elastic.py",
    "train/sweep.py",
    "index/build.py",
    "serve/app.py",
    "serve/replicas.py",
    "serve/metrics.py",
}
MLFLOW_RIM = {"tracking.py"}
DEEPSPEED_RIM = {"train/deepspeed.py"}
LOOP = ("rsplatform/train/pretrain.py", "fit")

# These run where only torch is (and NumPy, which it brings), with everything of ours that they import.
TORCH_ONLY = [
    "model/mammut.py",
    "model/losses.py",
    "train/pretrain.py",
    "train/engine.py",
    "localize/smooth_attention.py",
    "localize/guided_filter.py",
]
TORCH_ONLY_ALLOWED = {"torch", "numpy"}
# The rest of the model: files and pictures, but no framework of ours around it.
MODEL_ALLOWED = TORCH_ONLY_ALLOWED | {"PIL", "simplejpeg", "safetensors", "tokenizers"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@functools.cache
def imported(path: Path) -> list[str]:
    """Every module name that a file imports, at any depth of the code."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize(("library", "rim"), [("ray", RAY_RIM), ("mlflow", MLFLOW_RIM), ("deepspeed", DEEPSPEED_RIM)])
def test_libraries_stay_at_their_rim(library: str, rim: set[str]) -> None:
    users = {
        path.relative_to(PACKAGE).as_posix()
        for path in modules()
        if any(name.split(".")[0] == library for name in imported(path))
    }
    assert users <= rim, f"{library} is imported outside its rim by {sorted(users - rim)}"


def test_imports_follow_the_flow() -> None:
    wrong = []
    for path in modules():
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name in imported(path):
            target = room(name) if name.startswith("rsplatform.") else ""
            if own in FLOOR and target in FLOW:
                wrong.append(f"{path.name}: the floor imports {name}")
            if own in FLOW and target in FLOW and FLOW.index(target) > FLOW.index(own):
                wrong.append(f"{path.relative_to(PACKAGE)}: {own} imports {target}, which comes later")
    assert not wrong, wrong


def test_every_module_has_a_place() -> None:
    names = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in modules()} - {"__init__"}
    assert names <= FLOOR | set(FLOW), f"unknown rooms: {names - FLOOR - set(FLOW)}"


@pytest.mark.parametrize("place", TORCH_ONLY)
def test_core_runs_where_only_torch_is(place: str) -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in closure(PACKAGE / place)
        for name in imported(path)
        if not is_allowed(name, TORCH_ONLY_ALLOWED | {"rsplatform"})
    ]
    assert not wrong, f"{place} reaches more than torch through {wrong}"


def test_the_model_needs_no_framework() -> None:
    wrong = [
        f"{path.name}: {name}"
        for path in sorted((PACKAGE / "model").glob("*.py"))
        for name in imported(path)
        if not is_allowed(name, MODEL_ALLOWED) and not name.startswith("rsplatform.model")
    ]
    assert not wrong, f"the model may import only torch and its few friends: {wrong}"


def closure(start: Path) -> list[Path]:
    """A module of ours and every module of ours that it imports, directly or not, packages' __init__ included."""
    found, waiting = set(), [start]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += [target for name in imported(path) for target in files_of(name)]
    return sorted(found)


def files_of(name: str) -> list[Path]:
    """The files that importing the module `name` of ours runs; for a name inside of a module, nothing more."""
    parts = name.split(".")
    if parts[0] != "rsplatform":
        return []
    places = [REPOSITORY.joinpath(*parts[: number + 1]) for number in range(len(parts))]
    candidates = [file for place in places for file in (place / "__init__.py", place.with_suffix(".py"))]
    return [file for file in candidates if file.is_file()]


def is_allowed(name: str, libraries: set[str]) -> bool:
    top = name.split(".")[0]
    return top in sys.stdlib_module_names or top in libraries


def test_the_closure_follows_indirect_imports() -> None:
    names = {path.relative_to(PACKAGE).as_posix() for path in closure(PACKAGE / "train" / "pretrain.py")}
    assert {"train/optimizer.py", "model/positions.py", "train/__init__.py"} <= names  # through engine.py, mammut.py
    assert "storage.py" in {path.name for path in closure(PACKAGE / "train" / "worker.py")}


def test_nothing_is_imported_relatively_and_no_room_is_called_utils() -> None:
    for path in modules():
        assert path.stem not in {"utils", "util", "helpers", "common", "misc"}, path
        relative = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.level]
        assert not relative, path


def test_files_and_functions_stay_small() -> None:
    """Only the training loop may be longer than other functions, and by name."""
    long = []
    scripts = [path for folder in ("jobs", "benchmarks") for path in sorted((REPOSITORY / folder).glob("*.py"))]
    for path in [*modules(), *scripts]:
        text = path.read_text()
        if text.count("\n") > 300:
            long.append(f"{path.relative_to(REPOSITORY)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                is_loop = (path.relative_to(REPOSITORY).as_posix(), node.name) == LOOP
                limit = 80 if is_loop else 40
                if length > limit:
                    long.append(f"{path.relative_to(REPOSITORY)}:{node.lineno} {node.name}: {length} lines")
    assert not long, long


def test_modules_hold_only_definitions() -> None:
    """Importing a module does no work: no calls at module level but constants and `__main__`."""
    allowed = (
        ast.Import,
        ast.ImportFrom,
        ast.FunctionDef,
        ast.AsyncFunctionDef,
        ast.ClassDef,
        ast.Assign,
        ast.AnnAssign,
    )
    for path in modules():
        for node in ast.parse(path.read_text()).body:
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            assert isinstance(node, allowed) or is_docstring, f"{path}:{node.lineno} does work at import"


def test_at_most_two_rules_are_silenced() -> None:
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    marks = ("# " + "noqa", "# " + "type: ignore", "# " + "pyright: ignore")
    silenced = [
        f"{name}:{number}"
        for name in tracked.stdout.split()
        if (REPOSITORY / name).exists()
        for number, line in enumerate((REPOSITORY / name).read_text().splitlines(), 1)
        if any(mark in line for mark in marks)
    ]
    assert len(silenced) <= 2, silenced


def test_jobs_are_short_and_runnable() -> None:
    jobs = sorted((REPOSITORY / "jobs").glob("*.py"))
    names = {path.stem for path in jobs}
    expected = (
        "ingest_scenes train_overhead filter_web caption build_dataset pretrain tune evaluate build_index localize"
    )
    assert set(expected.split()) | {"self_train", "serve", "demo"} <= names
    for path in jobs:
        assert len(path.read_text().splitlines()) <= 25, path
        assert path.read_text().startswith("#!"), path
        assert path.stat().st_mode & 0o111, f"{path} lacks the run bit"
