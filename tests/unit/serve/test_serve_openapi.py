"""openapi.json is complete and true: examples work, answers fit their schemas, and no input is a server error."""

import asyncio
import base64
import json
from typing import Any
from urllib.parse import quote

import httpx
import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openapi_values import Values
from tiny_service import CHIPS, INDEX, MODEL, SCENE, jpeg, make_all, tiny_cluster

from rsplatform.serve.guard import Guarded
from rsplatform.serve.retrieval import Retrieval
from rsplatform.serve.routes import build_app
from rsplatform.serve.services import local_services

OPERATIONS = [
    *(("post", path) for path in ("/v1/search", "/v1/localize", "/v1/embed", "/v1/caption", "/predict")),
    *(("get", path) for path in ("/health", "/v1/stats", "/chips/{chip_id}.jpg", "/heatmaps/{chip_id}.png")),
    ("get", "/tiles/{scene}/{z}/{x}/{y}.{form}"),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any], Values]:
    """The application, its OpenAPI document, and values that fit it."""
    root = str(tmp_path_factory.mktemp("served") / "artifacts")
    make_all(root)
    retrieval = Retrieval(tiny_cluster(root), MODEL, INDEX, CHIPS)
    app = build_app(local_services(retrieval), Guarded(max_body_bytes=2_000_000, max_body_seconds=5))
    west, south, east, north = retrieval.catalogue.scenes[SCENE].bounds_lonlat
    pixels = (retrieval.embedder.embed_texts(["x"])[0][:48].reshape(4, 4, 3) * 100 + 100).astype("uint8")
    known = {
        "chip_id": [f"{SCENE}-0003"],
        "scene": [SCENE],
        "scene_id": [SCENE],
        "like": [f"{SCENE}-0004"],
        "state": [retrieval.state],
        "bbox": [[west, south, east, north], [west, south, (west + east) / 2, north]],
        "image": [base64.b64encode(jpeg(pixels)).decode()],
        "datetime": ["2021-01-01T00:00:00Z/.."],
        "z": [0, 15],
    }
    document = asked(app, "get", "/openapi.json").json()
    return app, document, Values(document, known)


def asked(app: Any, method: str, path: str, **content: Any) -> httpx.Response:
    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            return await client.request(method, path, **content)

    return asyncio.run(once())


def check_answer(document: dict[str, Any], operation: dict[str, Any], response: httpx.Response) -> None:
    """No server error, a documented status, and a body of the documented schema."""
    assert response.status_code < 500, response.text
    assert str(response.status_code) in operation["responses"], response.status_code
    if response.headers.get("content-type") == "application/json":
        schema = operation["responses"][str(response.status_code)]["content"]["application/json"]["schema"]
        jsonschema.validate(response.json(), schema | {"components": document["components"]})


def test_the_operations_are_those_that_are_tested(served: tuple[Any, dict[str, Any], Values]) -> None:
    found = {(method, path) for path, methods in served[1]["paths"].items() for method in methods}
    assert found == set(OPERATIONS)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_nothing_that_is_sent_is_a_server_error(
    served: tuple[Any, dict[str, Any], Values], method: str, path: str, data: st.DataObject
) -> None:
    app, document, values = served
    operation = document["paths"][path][method]
    place, query = path, {}
    for parameter in operation.get("parameters", []):
        name = parameter["name"]
        value = data.draw(values.nearly({"type": "object", "properties": {name: parameter["schema"]}}), name)
        value = value.get(name) if isinstance(value, dict) else value
        if parameter["in"] == "path":
            place = place.replace("{" + name + "}", quote(str(value), safe=""))
        elif value is not None:
            query[name] = value if isinstance(value, list) else str(value)
    content = {}
    if method == "post":
        body = data.draw(values.nearly(operation["requestBody"]["content"]["application/json"]["schema"]), "body")
        text = json.dumps(body, ensure_ascii=True)
        content = {"content": text, "headers": {"content-type": "application/json"}}
    params = {
        name: [str(each) for each in value] if isinstance(value, list) else value for name, value in query.items()
    }
    check_answer(document, operation, asked(app, method, place, params=params, **content))


@pytest.mark.parametrize(("method", "path"), [each for each in OPERATIONS if each[0] == "post"])
def test_the_examples_are_good_requests_and_answers_have_examples_that_fit(
    served: tuple[Any, dict[str, Any], Values], method: str, path: str
) -> None:
    app, document, _ = served
    operation = document["paths"][path][method]
    name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
    examples = document["components"]["schemas"][name]["examples"]
    for example in examples:
        response = asked(app, method, path, json=example)
        assert response.status_code in {200, 404}, response.text  # 404: the ids of the examples are not ours
        check_answer(document, operation, response)
    schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
    answer = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    for example in answer["examples"]:
        jsonschema.validate(example, answer | {"components": document["components"]})


def test_every_operation_says_what_it_does_and_how_to_be_let_in(served: tuple[Any, dict[str, Any], Values]) -> None:
    document = served[1]
    for method, path in OPERATIONS:
        operation = document["paths"][path][method]
        assert operation["summary"] and operation["description"], path
        assert {"401", "413", "429", "503"} <= set(operation["responses"]), path
        assert all(part.get("description") for part in operation.get("parameters", [])), path
        assert bool(operation.get("security")) == (path != "/health"), path
    assert document["components"]["securitySchemes"]["APIKey"]["scheme"] == "bearer"
