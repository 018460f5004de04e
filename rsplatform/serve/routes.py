"""The HTTP routes as a FastAPI application over `Services`; the same under Ray Serve, uvicorn and in tests.

In: services and limits. Out: a guarded ASGI application. Routes only translate; limits of size and time are the
guard's, limits of content are api.py's.
"""

import random
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Query, Response
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp

from rsplatform.serve.admission import RETRY_AFTER_S
from rsplatform.serve.api import (
    ID_PATTERN,
    MAX_TEXT_CHARACTERS,
    MAX_UNWANTED,
    Health,
    Problem,
    SearchRequest,
    SearchResponse,
    Stats,
    Text,
)
from rsplatform.serve.api_pictures import (
    CaptionRequest,
    CaptionResponse,
    EmbedRequest,
    EmbedResponse,
    LocalizeRequest,
    LocalizeResponse,
)
from rsplatform.serve.guard import Guard, Guarded, Watch
from rsplatform.serve.localization import heatmap_png
from rsplatform.serve.predict import PredictRequest, PredictResponse
from rsplatform.serve.record import log_request
from rsplatform.serve.services import RequestError, Services
from rsplatform.serve.versions import Versions, only

PAGES = Path(__file__).parent / "pages"
DESCRIPTION = "Ask in words or with a picture, get the chips and the spot in each of them."
# What every route may answer when it refuses; the models of success stand at the routes.
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": reason}
    for status, reason in {
        400: "The body is no JSON",
        401: "No API key",
        404: "No such chip, scene or tile",
        408: "The body came too slowly",
        413: "The body is too large",
        421: "The Host is not this machine",
        422: "A field is wrong; `detail` names it",
        429: "This API key asks too often; Retry-After says when to ask again",
        503: "Overloaded or starting; Retry-After says when to ask again",
    }.items()
}
CACHED = {"cache-control": "private, max-age=3600"}
NOT_CACHED = {"cache-control": "no-store"}
PICTURE = {"content": {"image/png": {}, "image/jpeg": {}}, "description": "The picture"}

KEYED = [Depends(HTTPBearer(scheme_name="APIKey", auto_error=False))]  # for the document: the guard has looked already

ChipIdInPath = Annotated[str, PathParameter(pattern=ID_PATTERN, description="As /v1/search gives it")]
SceneInPath = Annotated[str, PathParameter(pattern=ID_PATTERN, description="As /v1/stats gives it")]
TileNumber = Annotated[int, PathParameter(description="Of the web-mercator pyramid, y from the north")]
TileForm = Annotated[Literal["jpg", "png"], PathParameter(description="png is clear where the scene has no pixels")]
QueryText = Annotated[
    str | None, Query(min_length=1, max_length=MAX_TEXT_CHARACTERS, description="Read as /v1/search reads it")
]
QueryTexts = Annotated[list[Text] | None, Query(max_length=MAX_UNWANTED, description="What is not wanted")]
QueryChip = Annotated[str | None, Query(pattern=ID_PATTERN, description="Another chip, in place of a text")]


QueryVersion = Annotated[
    str | None, Query(pattern=r"^[a-z0-9_-]{1,40}$", description="One of several versions by name; else by weight")
]
QueryState = Annotated[
    str | None,
    Query(
        pattern=r"^[0-9a-f]{12}$",
        description="Model and index of the answer that the link is from; only what they still are is cached",
    ),
]


def given_services(request: HttpRequest, response: Response, version: QueryVersion = None) -> Services:
    """The version that answers this request: the one asked for, else drawn by weight."""
    services = request.app.state.versions.choose(version, random.random())
    response.headers["x-model-version"] = services.version
    return services


def caching(services: Services, state: str | None) -> dict[str, str]:
    """Headers of a picture: while an index is swapped, what the other one answers must not stay under this link."""
    kept = CACHED if state == services.retrieval.state else NOT_CACHED
    return kept | {"x-model-version": services.version}  # FastAPI adds none to a response that a route has made


Provided = Annotated[Services, Depends(given_services)]


def build_app(services: Services | Versions, limits: Guarded, watch: Watch = log_request) -> ASGIApp:
    """The guarded application over one or several versions; `watch` hears of every request once it is answered."""
    return Guard(build_routes(services if isinstance(services, Versions) else only(services)), limits, watch)


def build_routes(versions: Versions) -> FastAPI:
    """The routes without the guard in front."""
    app = FastAPI(
        title="rsplatform",
        version="1",
        description=DESCRIPTION,
        docs_url=None,  # FastAPI's pages load scripts from a CDN
        redoc_url=None,
        responses=REFUSALS,
    )

    app.state.versions = versions
    app.exception_handler(RequestError)(_request_error)
    app.exception_handler(RequestValidationError)(_validation_error)
    app.exception_handler(Exception)(_own_error)
    _add_queries(app)
    _add_pictures(app)
    _add_pages(app)
    return app


def _add_queries(app: FastAPI) -> None:
    @app.get("/health")
    async def health(services: Provided) -> Health:
        """Encodes one sample text: "ok" means that the model answers."""
        await services.check()
        return Health(status="ok", model_hash=services.model_hash, num_chips=services.retrieval.index.meta.num_rows)

    @app.post("/v1/search", dependencies=KEYED)
    async def search(request: SearchRequest, services: Provided) -> SearchResponse:
        """Chips that fit a text, a picture or a chip, narrowed by place, date, scale and kind before the search."""
        return await services.search(request)

    @app.post("/v1/localize", dependencies=KEYED)
    async def localize(request: LocalizeRequest, services: Provided) -> LocalizeResponse:
        """Where in a picture or chip each text is."""
        return await services.localize(request)

    @app.post("/v1/embed", dependencies=KEYED)
    async def embed(request: EmbedRequest, services: Provided) -> EmbedResponse:
        """Unit vectors of texts and pictures, comparable by their dot product."""
        return await services.embed(request)

    @app.post("/v1/caption", dependencies=KEYED)
    async def caption(request: CaptionRequest, services: Provided) -> CaptionResponse:
        """What the model itself says about a picture or chip."""
        return await services.caption(request)

    @app.post("/predict", dependencies=KEYED)
    async def predict(request: PredictRequest, services: Provided) -> PredictResponse:
        """Embeddings or scores in the form of the closed product."""
        return await services.predict(request)

    @app.get("/v1/stats", dependencies=KEYED)
    async def stats(services: Provided) -> Stats:
        """What is served: artifacts, model, number of chips, kinds of landmarks, scenes with bounds and zooms."""
        return Stats.model_validate(services.stats())


def _add_pictures(app: FastAPI) -> None:
    @app.get("/chips/{chip_id}.jpg", response_class=Response, responses={200: PICTURE}, dependencies=KEYED)
    async def chip(chip_id: ChipIdInPath, services: Provided, state: QueryState = None) -> Response:
        """The picture of a chip."""
        image = await services.chip_image(chip_id)
        return Response(image, media_type="image/jpeg", headers=caching(services, state))

    @app.get("/heatmaps/{chip_id}.png", response_class=Response, responses={200: PICTURE}, dependencies=KEYED)
    async def heatmap(
        chip_id: ChipIdInPath,
        services: Provided,
        text: QueryText = None,
        like: QueryChip = None,
        without: QueryTexts = None,
        state: QueryState = None,
    ) -> Response:
        """Transparent overlay of where in a chip a text is, or what resembles another chip."""
        scores_HW = await services.heatmap(chip_id, text, like, without or [])
        return Response(heatmap_png(scores_HW), media_type="image/png", headers=caching(services, state))

    @app.get(
        "/tiles/{scene}/{z}/{x}/{y}.{form}",
        response_class=Response,
        responses={200: PICTURE, 204: {"description": "The scene has no pixels here"}},
        dependencies=KEYED,
    )
    async def tile(
        scene: SceneInPath, z: TileNumber, x: TileNumber, y: TileNumber, form: TileForm, services: Provided
    ) -> Response:
        """Web-mercator tile of a scene, 256 px; 204 where the scene has no pixels."""
        data = await services.tile(scene, z, x, y, form)
        if data is None:
            return Response(status_code=204, headers=CACHED)
        return Response(data, media_type="image/jpeg" if form == "jpg" else "image/png", headers=CACHED)


def _add_pages(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGES / "index.html")

    app.mount("/static/maplibre", StaticFiles(directory=_maplibre_folder()), name="maplibre")
    app.mount("/static", StaticFiles(directory=PAGES), name="static")


def _maplibre_folder() -> Path:
    """MapLibre GL's script and style as the PyPI package ships them, found without importing it."""
    spec = find_spec("maplibre")
    if spec is None or spec.origin is None:
        raise RuntimeError("the map page needs the package maplibre; install it with the rest of rsplatform")
    return Path(spec.origin).parent / "srcjs"


async def _request_error(_: HttpRequest, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    headers = {"retry-after": str(RETRY_AFTER_S)} if error.status == 503 else None
    return JSONResponse({"detail": error.detail}, status_code=error.status, headers=headers)


async def _own_error(_: HttpRequest, __: Exception) -> JSONResponse:
    """What an error of ours looks like from outside; the guard logs it, with its traceback."""
    return JSONResponse({"detail": "an error of ours; the server's log has it under this X-Request-Id"}, 500)


async def _validation_error(_: HttpRequest, error: Exception) -> JSONResponse:
    """One sentence per bad field; what was sent is not repeated (it may be megabytes, or no JSON)."""
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    sentences = []
    for problem in problems[:5]:
        where = ".".join(str(part) for part in problem["loc"] if part != "body")
        sentences.append(f"{where}: {problem['msg']}" if where else problem["msg"])
    status = 400 if any(problem["type"] == "json_invalid" for problem in problems) else 422
    return JSONResponse({"detail": "; ".join(sentences).removeprefix("Value error, ")}, status_code=status)
