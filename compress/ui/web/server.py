"""The app as one ASGI application: Gradio's page and API, /healthz, the files of runs, and what protects them."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import gradio as gr
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse

from compress.errors import RunError, StorageError
from compress.jobs import Queue
from compress.report import bundle
from compress.runs import MANIFEST
from compress.ui import backend
from compress.ui.errors import WRONG_VALUES, without_traceback
from compress.ui.estimates import Count
from compress.ui.handlers import App, Check, Classify
from compress.ui.page import build_page
from compress.ui.sharing import asks_to_log_in
from compress.ui.texts import all_texts, translations
from compress.ui.theme import STYLE, EspalierTheme, head
from compress.ui.views import results
from compress.ui.web.guard import Guard
from compress.ui.web.limits import Limits
from compress.ui.web.login import HEALTH, Login, login_name
from compress.ui.web.routes import RouteFilter, open_routes
from compress.ui.web.sessions import PendingAnswers, disable_session_state, skip_unchanged_outputs
from compress.ui.web.settings import Settings
from compress.ui.web.streams import allow_many_descriptors
from compress.ui.web.upload_routes import add_upload_routes

log = logging.getLogger("compress.ui")
ADDRESSES_ONLY = (
    "The app listens on {host} and accepts only numeric addresses (such as http://192.0.2.1:7860) and localhost as host names, "
    "because other sites could direct browsers here under names of their own. Set ESPALIER_ALLOWED_HOSTS to the accepted names."
)


def build_app(
    settings: Settings,
    queue: Queue,
    *,
    check: Check,
    classify: Classify,
    count: Count,
    models: Sequence[backend.Offer],
) -> FastAPI:
    """The complete app of a queue, which the caller starts and closes.

    Args:
        check: see `compress.pipeline.check`.
        classify: see `compress.classify.classify`.
        count: see `compress.pruning.profiles.profile`.
        models: the available classifiers.

    Raises:
        RunError: the settings request MCP tools, which cannot be offered.
    """
    handlers = App(queue, check, settings, models, classify, count)
    handlers.uploads.open()

    @asynccontextmanager
    async def while_serving(app: FastAPI) -> AsyncIterator[None]:
        yield
        handlers.uploads.close()

    app = FastAPI(title="Espalier", docs_url=None, redoc_url=None, openapi_url=None, lifespan=while_serving)
    _add_routes(app, queue, tells_why=not settings.accounts)
    add_upload_routes(app, handlers.uploads)
    page = build_page(handlers)
    _mount(page, app, settings, queue)
    _add_middleware(page, app, settings, handlers)
    if page.mcp_error:  # Gradio would start without the tools
        raise RunError(
            f"The tools of ESPALIER_MCP cannot be offered ({page.mcp_error}). Unset it, or correct that first."
        )
    return app


def _mount(page: gr.Blocks, app: FastAPI, settings: Settings, queue: Queue) -> None:
    """Mounts Gradio's app of the page, without what this app does not use."""
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        server_name=settings.host,
        server_port=settings.port,
        theme=EspalierTheme(),
        css=STYLE,
        head=head(all_texts()),
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        i18n=translations(),
        show_error=False,
        enable_monitoring=False,
        mcp_server=settings.mcp,
        auth_dependency=login_name if settings.accounts else None,
        pwa=False,
        allowed_paths=[],
        blocked_paths=[str(queue.data_dir / "runs"), str(queue.data_dir / "consoles")],
        max_file_size=settings.max_upload_mb * 1024 * 1024,
    )
    page.has_launched = True  # launch() sets it; without it Gradio would take any path for an upload of its own
    page.process_api = without_traceback(page.process_api, WRONG_VALUES)  # type: ignore[method-assign]  # no hook for it
    skip_unchanged_outputs(page)
    disable_session_state(page, app.routes[-1].app)  # type: ignore[attr-defined]  # the mount, which has one


def _add_middleware(page: gr.Blocks, app: FastAPI, settings: Settings, handlers: App) -> None:
    """Adds the middleware; the last one added is the first to see a request."""
    routes = open_routes(mcp=settings.mcp, space=asks_to_log_in(os.environ))
    refuses = PendingAnswers(page).refuses
    app.add_middleware(RouteFilter, routes=routes, is_upload=handlers.uploads.has, refuses_session=refuses)
    app.add_middleware(
        Limits,
        requests_per_min=settings.requests_per_min,
        uploads_per_hour=settings.uploads_per_hour,
        max_upload_bytes=settings.max_upload_mb * 1024 * 1024,
    )
    if settings.accounts:
        app.add_middleware(Login, accounts=settings.accounts)
    app.add_middleware(
        Guard, hosts=settings.hosts, local=settings.trusts_visitors, addresses=settings.answers_to_addresses
    )


def _add_routes(app: FastAPI, queue: Queue, *, tells_why: bool) -> None:
    """`tells_why`: /healthz gives the reason of a problem, which can contain paths, to everyone."""

    @app.api_route(HEALTH, methods=["GET", "HEAD"])
    def health() -> Response:
        if (trouble := queue.trouble) is None:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "trouble"} | ({"reason": trouble} if tells_why else {}), status_code=503)

    @app.api_route("/runs/{job_id}/files/{name:path}", methods=["GET", "HEAD"])
    def file(job_id: str, name: str) -> Response:
        """A file of a finished run, always as a download, so that nothing in it runs on this page."""
        try:
            path = queue.artifact(job_id, name)
            digest = queue.artifacts(job_id)[name]["sha256"]
        except RunError as error:
            return PlainTextResponse(str(error), status_code=404)
        except StorageError as error:
            return PlainTextResponse(str(error), status_code=409)
        return FileResponse(
            path,
            media_type="application/octet-stream",
            filename=path.name,
            headers={"etag": f'"{digest}"', "cache-control": "private, no-cache", "x-sha256": digest},
        )

    @app.api_route("/runs/{job_id}/files.zip", methods=["GET", "HEAD"])
    def everything(job_id: str, request: Request) -> Response:
        """All files of a finished run and its manifest, each compared with its hash before the first byte is sent."""
        try:
            listed = queue.artifacts(job_id)
            files = {name: queue.artifact(job_id, name) for name in listed}
        except RunError as error:
            return PlainTextResponse(str(error), status_code=404)
        except StorageError as error:
            return PlainTextResponse(str(error), status_code=409)
        name = results.folder_name(job_id)
        headers = {"content-disposition": f'attachment; filename="{name}.zip"', "cache-control": "private, no-cache"}
        if request.method == "HEAD":
            return Response(media_type="application/zip", headers=headers)
        hashes = {name: str(facts["sha256"]) for name, facts in listed.items()}
        manifest = {MANIFEST: queue.folder(job_id) / MANIFEST}
        pieces = bundle.stream(files | manifest, hashes, name)
        return StreamingResponse(pieces, media_type="application/zip", headers=headers)


def listen(app: FastAPI, settings: Settings) -> None:
    """Answers until the process is told to stop."""
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        log_level="warning",
        timeout_graceful_shutdown=3,
        server_header=False,
        # uvicorn itself would believe whatever this machine's programs say of their address
        proxy_headers="FORWARDED_ALLOW_IPS" in os.environ,
    )


def serve(settings: Settings) -> None:
    """Runs the app until it is stopped. Runs that work then go on; the next start watches them again.

    Raises:
        StorageError: the data folder cannot be used. With a damaged record of runs the app is read-only.
    """
    allow_many_descriptors()
    if settings.answers_to_addresses:
        log.warning("%s", ADDRESSES_ONLY.format(host=settings.host))
    with Queue(settings.data_dir, read_only_when_damaged=True, **settings.queue_limits) as queue:
        app = build_app(
            settings,
            queue,
            check=backend.check,
            classify=backend.classify,
            count=backend.estimate,
            models=backend.models(settings.data_dir / "models.json"),
        )
        listen(app, settings)
