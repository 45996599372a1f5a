"""Publishing a finished run from the page, and whose token that takes.

On a Space visitors log in, and their own token is used. Elsewhere it is HF_TOKEN of the server's environment, and only
where the server listens to this machine alone: nobody else shall publish with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

import gradio as gr

from compress import hub
from compress.errors import CompressError
from compress.jobs import Queue
from compress.ui import views
from compress.ui.texts import text
from compress.ui.web.settings import Settings

Parts = dict[str, Any]
Publish = Callable[..., str]
"""(job, repository, public, pull request) -> HTML."""


def card() -> Parts:
    """The controls, in the layout that is being built."""
    parts: Parts = {}
    with gr.Column(elem_classes="card", elem_id="share"):
        gr.HTML(text("share_head"))
        with gr.Row(elem_classes="manage"):
            parts["repository"] = gr.Textbox(label=text("repository_label"), placeholder="owner/name", max_lines=1)
            parts["publish"] = gr.Button(text("publish_button"), size="md", elem_id="publish", min_width=120, scale=0)
        parts["public"] = gr.Checkbox(label=text("public_label"))
        parts["pull_request"] = gr.Checkbox(label=text("pull_request_label"))
        if asks_to_log_in(os.environ):
            gr.LoginButton()
        parts["shared"] = gr.HTML(elem_id="shared")
    return parts


def asks_to_log_in(environ: Mapping[str, str]) -> bool:
    """Whether this is a Space whose README asks for `hf_oauth`. Logging in was not tried outside of one."""
    return bool(environ.get("SPACE_ID") and environ.get("OAUTH_CLIENT_ID"))


def publisher(queue: Queue, settings: Settings) -> Publish:
    """What the button calls; Gradio fills in the visitor's token where the last parameter is of its type."""

    def publish(job_id: str, repository: str, public: bool, pull_request: bool, token: str | None) -> str:
        try:
            queue.artifacts(job_id)  # raises for a run that is not done
            done = hub.publish(
                queue.folder(job_id), repository.strip(), private=not public, pull_request=pull_request, token=token
            )
        except CompressError as error:
            return views.alert(str(error))
        seen = "private" if done.private else "public"
        return (
            f'<p class="good" role="status">{done.files} files are in {escape(done.repository)} ({seen}): '
            f'<a href="{escape(done.url)}" target="_blank" rel="noopener">open it on the Hub</a>.</p>'
        )

    def with_login(job_id: str, repository: str, public: bool, pull_request: bool, token: gr.OAuthToken | None) -> str:
        if token is None:
            return views.alert("Log in first: the button is beside this one.")
        return publish(job_id, repository, public, pull_request, token.token)

    def with_environment(job_id: str, repository: str, public: bool, pull_request: bool) -> str:
        if not settings.local:
            return views.alert(
                "This server publishes nothing, because everybody who reaches it would do so with its token. Download "
                "everything as one zip, and use `python -m compress publish` where you have a token."
            )
        return publish(job_id, repository, public, pull_request, None)

    if asks_to_log_in(os.environ):
        with_login.__annotations__["token"] = gr.OAuthToken | None  # Gradio reads the type itself, not its name
        return with_login
    return with_environment
