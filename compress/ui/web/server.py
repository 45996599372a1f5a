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
from compress.ui import shell
from compress.ui.estimates import Count
from compress.ui.handlers import App, Check, Classify
from compress.ui.page import build_page
from compress.ui.sharing import asks_to_log_in
from compress.ui.theme import STYLE, EspalierTheme, head
from compress.ui.told import WRONG_VALUES, without_traceback
from compress.ui.views import results
from compress.ui.web.guard import Guard
from compress.ui.web.limits import Limits
from compress.ui.web.login import HEALTH, Login, login_name
from compress.ui.web.receiving import add_upload_routes
from compress.ui.web.routes import Door, open_routes
from compress.ui.web.sessions import Unfetched, forget_sessions, skip_what_stays
from compress.ui.web.settings import Settings
from compress.ui.web.streams import allow_many_descriptors
from compress.ui.words import texts, translations

log = logging.getLogger("compress.ui")
ADDRESSES_ONLY = (
    "The app listens on {host} and answers to numeric addresses and localhost only, such as http://192.0.2.1:7860, because other "
    "sites could send browsers here under a name of theirs. Set ESPALIER_ALLOWED_HOSTS to the names that it shall answer to."
)


def build_app(
    settings: Settings,
    queue: Queue,
    *,
    check: Check,
    classify: Classify,
    count: Count,
    models: Sequence[shell.Offer],
) -> FastAPI:
    """The whole app around a queue, which the caller starts and closes.

    Args:
        check: request -> what a run of it would do; see `compress.pipeline.check`.
        classify: (run folder, image) -> the answers of its models; see `compress.classify.classify`.
        count: structure -> what pruning would leave of it; see `compress.pruning.profiles.profile`.
        models: the classifiers on offer.

    Raises:
        RunError: MCP is asked for and cannot be offered.
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
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        server_name=settings.host,
        server_port=settings.port,
        theme=EspalierTheme(),
        css=STYLE,
        head=head(texts()),
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
    routes = open_routes(mcp=settings.mcp, space=asks_to_log_in(os.environ))
    page.process_api = without_traceback(page.process_api, WRONG_VALUES)  # handlers tell of their own mistakes
    skip_what_stays(page)
    forget_sessions(page, app.routes[-1].app)
    app.add_middleware(Door, routes=routes, is_upload=handlers.uploads.has, refuses_session=Unfetched(page).refuses)
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
    if page.mcp_error:  # Gradio would go on without
        raise RunError(f"The tools of ESPALIER_MCP cannot be offered ({page.mcp_error}). Unset it, or mend that first.")
    return app


def _add_routes(app: FastAPI, queue: Queue, *, tells_why: bool) -> None:
    """`tells_why`: whether everybody who asks how the server is may read the reason, which can name folders."""

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
            check=shell.check,
            classify=shell.classify,
            count=shell.estimate,
            models=shell.models(settings.data_dir / "models.json"),
        )
        listen(app, settings)
