"""Who may change a run: cancel, resume, rename, keep and delete it.

Whoever has the link of a run may look at it, download its files and repeat it. To change it takes more: the key that the
browser or program was given when it submitted the run, or the login with which it was submitted. A server that only this
machine reaches and that asks for no login trusts its visitors; `python -m compress jobs` may everything.
"""

from __future__ import annotations

import hmac

from compress import signing
from compress.errors import RunError
from compress.jobs import Queue
from compress.ui.web.settings import Settings

REFUSAL = (
    "Only who began this run may change it: from the same browser, with the same login, or with the key that submit returned. "
    "Repeat it to get one of your own."
)


def run_key(job_id: str) -> str:
    """What a run is changed with. Raises `StorageError` when the installation's key cannot be read."""
    return signing.token("may change the run", job_id)


class Rights:
    """Of the visitors of one server."""

    def __init__(self, queue: Queue, settings: Settings) -> None:
        self._queue, self._settings = queue, settings

    def may_change(self, job_id: str, key: str, login: str) -> bool:
        """
        Args:
            key: that the visitor has, or nothing.
            login: the visitor's login name, or nothing.

        Raises:
            RunError: there is no such run.
            StorageError: the installation's key cannot be read.
        """
        owner = self._queue.owner(job_id)
        if self._settings.trusts_visitors or (login and login == owner):
            return True
        return hmac.compare_digest(key.encode(errors="surrogatepass"), run_key(job_id).encode())

    def refuse(self, job_id: str, key: str, login: str) -> None:
        """Raises `RunError` for a visitor who may not change the run, or when there is none."""
        if not self.may_change(job_id, key, login):
            raise RunError(REFUSAL)
