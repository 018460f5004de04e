"""Schemathesis over openapi.json against a real HTTP server: no server error, no answer but those documented."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from test_serve_openapi import OPERATIONS
from tiny_service import CHIPS, INDEX, MODEL, make_all, tiny_cluster
from uvicorn_server import on_uvicorn

from rsplatform.serve.guard import Guarded
from rsplatform.serve.retrieval import Retrieval
from rsplatform.serve.routes import build_app
from rsplatform.serve.services import local_services

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install -e '.[dev]'")

CHECKED = ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"]


@pytest.fixture(scope="module")
def base_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The application on uvicorn."""
    root = str(tmp_path_factory.mktemp("served") / "artifacts")
    make_all(root)
    app = build_app(local_services(Retrieval(tiny_cluster(root), MODEL, INDEX, CHIPS)), Guarded(2_000_000, 5))
    with on_uvicorn(app) as url:
        yield url


@pytest.fixture(scope="module")
def document(base_url: str) -> Any:
    """The schema as schemathesis reads it from the server."""
    return schemathesis.openapi.from_url(f"{base_url}/openapi.json")


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_request_is_a_server_error(document: Any, method: str, path: str) -> None:
    """Not by its decorator: 4.32 reads an attribute of pytest's items that pytest 9 has no more."""

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
    @given(case=document[path][method].as_strategy())
    def check(case: Any) -> None:
        case.validate_response(case.call(timeout=60), checks=schemathesis.checks.CHECKS.get_by_names(CHECKED))

    check()
