"""Who may change a run: cancel, resume, rename, keep and delete it.

Everyone who has the link of a run may view it, download its files and repeat it. Changing it requires the key that `submit`
returned to the browser or program, or the login that submitted the run. A server that only this machine reaches and that has
no login trusts its visitors; `python -m compress jobs` may do everything.
"""

from __future__ import annotations

import hmac

from compress import signing
from compress.errors import RunError
from compress.jobs import Queue
from compress.ui.web.settings import Settings

REFUSAL = (
    "Only the person who started this run may change it: use the same browser, the same login, or the key that submit returned. "
    "Repeat the run to get your own copy."
)


def run_key(job_id: str) -> str:
    """The key that authorizes changes to a run. Raises `StorageError` when the signing key cannot be read."""
    return signing.token("may change the run", job_id)


class Permissions:
    """The permissions of the visitors of one server."""

    def __init__(self, queue: Queue, settings: Settings) -> None:
        self._queue, self._settings = queue, settings

    def may_change(self, job_id: str, key: str, login: str) -> bool:
        """Whether the visitor may change the run.

        Args:
            key: the visitor's key of the run, or empty.
            login: the visitor's login name, or empty.

        Raises:
            RunError: there is no such run.
            StorageError: the signing key cannot be read.
        """
        owner = self._queue.owner(job_id)
        if self._settings.trusts_visitors or (login and login == owner):
            return True
        return hmac.compare_digest(key.encode(errors="surrogatepass"), run_key(job_id).encode())

    def refuse(self, job_id: str, key: str, login: str) -> None:
        """Raises `RunError` if the visitor may not change the run, or there is no such run."""
        if not self.may_change(job_id, key, login):
            raise RunError(REFUSAL)
