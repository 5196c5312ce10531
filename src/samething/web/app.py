"""The HTTP side: routes and their parameters, metrics, and the page's files."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import fastapi
import prometheus_client
from fastapi import Body, File, Form, Query, UploadFile
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles

import samething
from samething.errors import InputError, SamethingError
from samething.index import Where
from samething.search import Searcher
from samething.search.queries import conditions
from samething.web.guards import COOKIE, Access, Guard, Guesses, Limits, is_loopback, sender_of
from samething.web.projection import drawn
from samething.web.schemas import (
    FAILURES,
    Answer,
    DeleteRequest,
    ErrorAnswer,
    SearchAnswer,
    UnknownImageError,
    box_of,
    failed,
    failure,
    plain,
)
from samething.web.service import Service

STATIC: Final = Path(__file__).parent.parent / "static"
LOOPBACK_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1"})


class Metrics:
    """Counts for Prometheus, of one server."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self.requests = prometheus_client.Counter(
            "samething_requests", "Requests answered", ["route", "status"], registry=self.registry
        )
        self.seconds = prometheus_client.Histogram(
            "samething_request_seconds", "Time to answer", ["route"], registry=self.registry
        )
        self.batches = prometheus_client.Histogram(
            "samething_batch_images", "Images embedded together", buckets=(1, 2, 4, 8),
            registry=self.registry,
        )  # fmt: skip

    def watch(self, service: Service) -> None:
        """Also tell how many images wait and how many there are."""
        waiting = prometheus_client.Gauge(
            "samething_waiting_images", "Images waiting for the model", registry=self.registry
        )
        waiting.set_function(lambda: service.batcher.num_waiting)
        rows = prometheus_client.Gauge(
            "samething_index_images", "Images in the index", registry=self.registry
        )
        rows.set_function(service.searcher.index.count)

    def count(self, scope: Any, status: int, seconds: float) -> None:
        """Count one answer. Only known routes make a series of their own."""
        route = getattr(scope.get("route"), "path", "") or "other"
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)


def create_app(
    searcher: Searcher,
    *,
    token: str | None = None,
    is_public: bool = False,
    allow_urls: bool = False,
    uploads: Path | None = None,
    limits: Limits | None = None,
    host_names: frozenset[str] | None = LOOPBACK_NAMES,
) -> Guard:
    """The application that serves an index; any ASGI server runs it.

    Args:
        searcher: the index and its model.
        token: what changes need, and everything if ``is_public``; None: no changes.
        is_public: whether others than this machine's users reach it.
        allow_urls: whether a query may be the address of an image on the public internet.
        uploads: folder of the images that are added; by default ``uploads`` in the index folder.
        limits: how much requests may take.
        host_names: names under which it may be addressed; None: any.

    Raises:
        InputError: public without a token.
    """
    if is_public and not token:
        raise InputError(
            "a server that others can reach, without a token",
            expected="a token",
            next_step="give one with --token, or bind to 127.0.0.1",
        )
    limits = limits or Limits()
    metrics = Metrics()
    service = Service(
        searcher, limits=limits, uploads=uploads, allow_urls=allow_urls, on_batch=metrics.batches.observe
    )
    metrics.watch(service)

    @asynccontextmanager
    async def closing(app: fastapi.FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(app.state.service.close)

    app = fastapi.FastAPI(
        title="samething",
        version=samething.__version__,
        description="Find the same thing in an image collection.",
        docs_url=None,
        redoc_url=None,
        lifespan=closing,
        servers=[{"url": "./"}],  # beside the description itself, also below a path of a proxy
        default_response_class=Answer,
        responses={
            status: {"model": ErrorAnswer, "description": text}
            for status, text in {
                400: "cannot be used as it is", 401: "needs the token", 403: "not allowed here",
                413: "too large", 422: "not as described here", 429: "come back in a second",
            }.items()
        },
    )  # fmt: skip
    guesses = Guesses()
    app.state.service, app.state.metrics, app.state.token, app.state.guesses = (
        service,
        metrics,
        token,
        guesses,
    )
    app.include_router(_asking)
    app.include_router(_images)
    app.include_router(_changing)
    app.include_router(_pages, include_in_schema=False)
    app.mount("/static", StaticFiles(directory=STATIC))
    _mount_installed(app)
    for kind in FAILURES:
        app.add_exception_handler(kind, failed)
    access = Access(token or None, reads_need_token=is_public, host_names=host_names, guesses=guesses)
    return Guard(app, access=access, limits=limits, on_answer=metrics.count)


def _mount_installed(app: fastapi.FastAPI) -> None:
    """Scripts that installed packages bring along: nothing comes from elsewhere."""
    import fastapi_offline

    app.mount("/docs/static", StaticFiles(directory=Path(fastapi_offline.__file__).parent / "static"))
    try:
        import bokeh
    except ImportError:
        return
    app.mount(
        "/static-bokeh", StaticFiles(directory=Path(bokeh.__file__).parent / "server" / "static" / "js")
    )


# ---- asking

_asking = fastapi.APIRouter(tags=["search"])


def _service(request: fastapi.Request) -> Service:
    service: Service = request.app.state.service
    return service


def _where(
    service: Service, domain: list[str], label: list[str], folder: str | None, where: list[str]
) -> Where:
    texts = [*domain, *label, folder or "", *where]
    if not any(texts):
        return {}
    if any("\0" in text for text in texts):
        raise InputError("a text with a null character", expected="plain text", next_step="leave it out")
    return conditions(
        service.searcher.index.description,
        domain=domain,
        label=label,
        folder=folder or None,
        where=[text for text in where if text],
    )


def _asked(
    request: fastapi.Request,
    k: Annotated[int, Query(ge=1, description="number of matches")] = 24,
    domain: Annotated[list[str] | None, Query(description="look in these domains only")] = None,
    label: Annotated[list[str] | None, Query(description="look among these labels only")] = None,
    folder: Annotated[str | None, Query(description="look below this folder only")] = None,
    where: Annotated[list[str] | None, Query(description="COLUMN=TEXT or COLUMN=LOW..HIGH")] = None,
) -> tuple[int, Where]:
    service = _service(request)
    return _count(service, k), _where(service, domain or [], label or [], folder, where or [])


_Asked = Annotated[tuple[int, Where], fastapi.Depends(_asked)]
_Again = Annotated[str | None, Query(description="a second look at the best hundred: geometry, …")]


def _count(service: Service, k: int) -> int:
    if k > service.limits.max_results:
        raise InputError(
            f"k={k}", expected=f"at most {service.limits.max_results}", next_step="ask for fewer"
        )
    return k


async def _how(
    combine: Annotated[Literal["mean", "max"], Form(description="of several images")] = "mean",
    rerank: Annotated[str | None, Form(description="a second look at the best hundred: geometry, …")] = None,
) -> tuple[Literal["mean", "max"], str | None]:
    return combine, rerank


_How = Annotated[tuple[Literal["mean", "max"], str | None], fastapi.Depends(_how)]


@_asking.post("/search", response_model=SearchAnswer, summary="Find the same thing as in an image")
async def search(
    request: fastapi.Request,
    how: _How,
    image: Annotated[list[UploadFile] | None, File(description="the image, or several of one thing")] = None,
    url: Annotated[str | None, Form(description="an image's address, where the server allows it")] = None,
    k: Annotated[int, Form(ge=1, description="number of matches")] = 24,
    domain: Annotated[list[str] | None, Form(description="look in these domains only")] = None,
    label: Annotated[list[str] | None, Form(description="look among these labels only")] = None,
    folder: Annotated[str | None, Form(description="look below this folder only")] = None,
    where: Annotated[list[str] | None, Form(description="COLUMN=TEXT or COLUMN=LOW..HIGH")] = None,
    crop: Annotated[str | None, Form(description="the part to look for: left,top,right,bottom")] = None,
) -> Response:
    """The matches, best first. An upload is looked at and forgotten."""
    service = _service(request)
    chosen = _where(service, domain or [], label or [], folder, where or [])
    box, count = box_of(crop), _count(service, k)
    if len(image or []) > service.limits.max_images:
        raise InputError(
            f"{len(image or [])} images",
            expected=f"at most {service.limits.max_images}",
            next_step="send the best of them",
        )
    contents = [await upload.read() for upload in image or []]
    if url:
        contents.append(await run_in_threadpool(service.fetched, url))
    if not contents:
        raise InputError("no image to look for", expected="an upload", next_step="send an image")
    found = await service.find(contents, k=count, where=chosen, crop=box, combine=how[0], rerank=how[1])
    return Answer(plain(found))


@_asking.post("/standing-out", summary="Parts of an image that stand out, to look for one of them")
async def standing_out(request: fastapi.Request, image: UploadFile) -> Response:
    """Boxes for ``crop``, the clearest first, at most 8: left, top, right and bottom in pixels."""
    found = await run_in_threadpool(_service(request).standing_out, await image.read())
    return Answer({"boxes": [list(box) for box in found]})


@_asking.get(
    "/similar/{row_id}", response_model=SearchAnswer, summary="What looks like an image of the index"
)
def similar(request: fastapi.Request, row_id: str, asked: _Asked, rerank: _Again = None) -> Response:
    """The matches, best first, the image itself left out."""
    k, where = asked
    return Answer(plain(_service(request).similar(row_id, k=k, where=where, rerank=rerank)))


@_asking.get("/similar", response_model=SearchAnswer, summary="What looks like the images of a label")
def similar_to_label(
    request: fastapi.Request,
    to_label: Annotated[str, Query(description="look for what the index knows by this label")],
    asked: _Asked,
    combine: Annotated[Literal["mean", "max"], Query(description="of several images")] = "mean",
    rerank: _Again = None,
) -> Response:
    """The matches, best first, the label's own images left out."""
    k, where = asked
    service = _service(request)
    searcher = service.searcher
    look = service.second_look(searcher, rerank)
    found = searcher.find_label(to_label, k=k, where=where, combine=combine, rerank=look)
    return Answer(plain(found))


@_asking.get("/info", summary="Domains, labels, columns, model, limits")
def info(request: fastapi.Request) -> Response:
    """What a page or program needs to know before it asks."""
    service = _service(request)
    return Answer({**service.overview(), "can_change": request.app.state.token is not None})


@_asking.get("/status", summary="Number of images, and what goes on in the background")
def status(request: fastapi.Request) -> Response:
    """The index, the sync and the map as they are now."""
    service = _service(request)
    index = service.searcher.index
    jobs = {name: job.to_json() for name, job in service.jobs.items()}
    location = Path(index.location)
    shown = str(location) if is_loopback(sender_of(request.scope)) else location.name
    return Answer({"location": shown, "num_images": index.count(), **jobs})


@_asking.get("/health", summary="Whether the server is up")
def health(request: fastapi.Request) -> Response:
    """200 where the index can be searched, else 503. Answers without a token; says nothing of the index."""
    try:
        _service(request).require_answers()
    except SamethingError:
        return Answer({"status": "the index cannot be used", "version": samething.__version__}, 503)
    return Answer({"status": "ok", "version": samething.__version__})


@_asking.get("/metrics", summary="Counts for Prometheus", response_class=Response)
def metrics(request: fastapi.Request) -> Response:
    """In Prometheus's text format."""
    content = prometheus_client.generate_latest(request.app.state.metrics.registry)
    return Response(content, media_type=prometheus_client.CONTENT_TYPE_LATEST)


# ---- images

_images = fastapi.APIRouter(tags=["images"])
_IMAGE: Final[dict[int | str, dict[str, Any]]] = {
    200: {"content": {"image/*": {}}, "description": "the image"},
    404: {"model": ErrorAnswer, "description": "no such image"},
}


@_images.get("/images/{row_id}", response_class=Response, responses=_IMAGE, summary="An image of the index")
def image(
    request: fastapi.Request,
    row_id: str,
    side: Annotated[int | None, Query(ge=16, le=4096, description="longer side at most, in pixels")] = None,
) -> Response:
    """JPEG, PNG, WebP and GIF as they are, everything else as JPEG. Only files that the index knows."""
    content, media_type = _service(request).image(row_id, side=side)
    return _sent(request, content, media_type)


@_images.get("/thumbnails/{row_id}", response_class=Response, responses=_IMAGE, summary="A small JPEG")
def small(request: fastapi.Request, row_id: str) -> Response:
    """The thumbnail that the index keeps, also where the file is gone."""
    content = _service(request).row(row_id, ["thumbnail"])["thumbnail"]
    if not content:
        raise UnknownImageError(row_id)
    return _sent(request, content, "image/jpeg")


def _sent(request: fastapi.Request, content: bytes, media_type: str) -> Response:
    """An image as an answer, or 304 where the browser has the same bytes already."""
    mark = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {"cache-control": "private, max-age=3600", "etag": mark}
    known = [part.strip().removeprefix("W/") for part in request.headers.get("if-none-match", "").split(",")]
    if mark in known or known == ["*"]:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=media_type, headers=headers)


@_images.get("/map", summary="The map of all images, as a Bokeh figure")
def image_map(request: fastapi.Request, dark: bool = False) -> Response:
    """``figure`` is null while the map is being made: ask again."""
    found = _service(request).map_when_ready()
    return Answer({"figure": None if found is None else drawn(found, dark=dark)})


# ---- changing

_changing = fastapi.APIRouter(tags=["changes (these need the token)"])


@_changing.post("/add", summary="Add an image", status_code=201)
async def add(
    request: fastapi.Request,
    image: Annotated[UploadFile, File()],
    label: Annotated[str, Form(description="which thing it shows")] = "",
    domain: Annotated[str, Form()] = "default",
) -> Response:
    """Keeps the file and makes it searchable; when this is answered, both outlive the server."""
    content = await image.read()
    row_id = await run_in_threadpool(_service(request).add, content, label=label, domain=domain)
    return Answer({"id": row_id}, 201)


@_changing.post("/delete", summary="Delete images from the index")
def delete(request: fastapi.Request, wanted: Annotated[DeleteRequest, Body()]) -> Response:
    """Uploaded files are deleted too; files of followed folders stay, and the next sync finds them again."""
    return Answer({"deleted": _service(request).delete(wanted.ids)})


@_changing.post("/sync", summary="Bring the index up to date with its folders", status_code=202)
def sync(request: fastapi.Request) -> Response:
    """Starts it; ``/status`` says how far it is."""
    return Answer(_service(request).start_sync().to_json(), 202)


@_changing.post("/login", summary="Keep the token in a cookie, for pages", status_code=204)
async def login(
    request: fastapi.Request, token: Annotated[str, Body(embed=True, max_length=500)]
) -> Response:
    """The cookie lets pages show images; changes need the token itself."""
    given, sender = token.encode("utf-8", "replace").decode(), sender_of(request.scope)
    refusal = request.app.state.guesses.refusal(given, request.app.state.token, sender, what="not the token")
    if refusal is not None:
        await asyncio.sleep(0.5)
        return failure(refusal[0], refusal[1], None, "ask who runs this server")
    answer = Response(status_code=204)
    is_https = request.url.scheme == "https"
    answer.set_cookie(COOKIE, token, httponly=True, samesite="strict", secure=is_https, path="/")
    return answer


# ---- pages

_pages = fastapi.APIRouter()


@_pages.get("/")
async def page() -> Response:
    """The page."""
    return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})


@_pages.get("/favicon.ico")
async def icon() -> Response:
    """The page's mark."""
    return FileResponse(STATIC / "mark.svg")


@_pages.get("/docs")
async def documentation() -> Response:
    """The API's page: Swagger UI from an installed package."""
    return FileResponse(STATIC / "docs.html", headers={"cache-control": "no-cache"})
