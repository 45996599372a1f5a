"""The Hugging Face Hub: a checkpoint from it, and a finished run to it.

The only file that imports huggingface_hub. Nothing here happens unless a request names `hf://...` or a run is published.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import naming, runs, signing
from compress.checkpoints.inspection import MAX_FILE_BYTES
from compress.errors import CheckpointError, PublishingError, RequestError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SCHEME = "hf://"
CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_REFERENCE = re.compile(
    r"hf://(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?(?:/(?P<file>[\w.-]+(?:/[\w.-]+)*))?"
)
_REPOSITORY = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}")
_TIMEOUT_S = 20
_NAMED_FILES = 5
FREE_BYTES = 2 * 2**30
"""Of the disk with the Hub's cache, which a download leaves free: anybody who may start a run may name any repository."""


@dataclass(frozen=True)
class Downloaded:
    """A checkpoint file of the Hub, kept in the Hub's own cache."""

    path: Path
    source: str
    """Repository, commit and file, in words."""
    is_new: bool = False
    """Whether it was not in the cache before."""

    @contextmanager
    def unless_refused(self) -> Iterator[Path]:
        """The file, which leaves the cache again when the block raises CheckpointError and it was not there before."""
        try:
            yield self.path
        except CheckpointError:
            if self.is_new:
                self.path.resolve().unlink(missing_ok=True)
                self.path.unlink(missing_ok=True)
            raise


@dataclass(frozen=True)
class Published:
    """Where a run went."""

    repository: str
    url: str
    """Of the commit, or of the pull request."""
    private: bool
    files: int


def download(reference: str) -> Downloaded:
    """The checkpoint that `hf://owner/name`, `hf://owner/name@revision` or `hf://owner/name/file` stands for.

    A private repository needs HF_TOKEN in the environment; a token that is stored on the machine is not used.

    Raises:
        RequestError: `reference` is none of these.
        CheckpointError: the Hub cannot be reached, or has no such repository, revision or file, or more than one that
            could be meant; or the file is over 2 GiB, or larger than the Hub says, or the disk has no room for it. Nothing of
            such a file stays.
    """
    from huggingface_hub.errors import HFValidationError

    found = _REFERENCE.fullmatch(reference)
    if found is None:
        raise RequestError(
            "checkpoint", reference, "hf://owner/name, with @revision or /file behind it where they are needed"
        )
    repository, file = found["repository"], found["file"]
    with _answers_in_words(CheckpointError, repository, "give the checkpoint as a file"):
        try:
            api = _api(os.environ.get("HF_TOKEN"))
            info = api.model_info(repository, revision=found["revision"], timeout=_TIMEOUT_S)
            names = [sibling.rfilename for sibling in info.siblings or ()]
            chosen = _checkpoint_among(names, file, repository)
            expected = api.hf_hub_download(repository, chosen, revision=info.sha, dry_run=True)
            size = _accepted_size(repository, chosen, expected)
            path = api.hf_hub_download(
                repository, chosen, revision=info.sha, tqdm_class=_bounded(repository, chosen, size)
            )
        except HFValidationError as error:
            raise RequestError("checkpoint", reference, "the name of a repository on the Hub, owner/name") from error
    source = f"{chosen} of {repository} on the Hub at {(info.sha or 'main')[:7]}"
    return Downloaded(Path(path), source, not expected.is_cached)


def _accepted_size(repository: str, file: str, expected: Any) -> int:
    """Bytes of a file of the Hub, asked before it is fetched (`DryRunFileInfo`)."""
    from huggingface_hub import constants

    size = expected.file_size
    if size is None:
        raise CheckpointError(
            f"The Hub does not say how large {file} of {repository} is: give the checkpoint as a file."
        )
    if size > MAX_FILE_BYTES:
        raise CheckpointError(
            f"{file} of {repository} has {size / 2**30:.1f} GiB; at most 2 GiB are accepted: save the weights alone, in "
            "float16."
        )
    folder = Path(constants.HF_HUB_CACHE).absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free
    if not expected.is_cached and free - size < FREE_BYTES:
        raise CheckpointError(
            f"There is no room for {file} of {repository} ({size / 2**20:,.0f} MiB): {FREE_BYTES >> 30} GiB of the disk with "
            f"{folder} stay free. Remove what is not needed there and try again."
        )
    return int(size)


def _bounded(repository: str, file: str, size: int) -> Any:
    """A progress bar for the Hub's client, which ends a download of more bytes than were announced."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bounded(tqdm):
        arrived = 0.0

        def update(self, n: float | None = 1) -> Any:
            self.arrived += n or 0
            if self.arrived > size:
                raise CheckpointError(
                    f"The Hub sends more of {file} of {repository} than the {size:,} bytes that it announced: try again "
                    "later, or give the checkpoint as a file."
                )
            return super().update(n)

    return Bounded


def publish(
    folder: Path, repository: str, *, private: bool = True, pull_request: bool = False, token: str | None = None
) -> Published:
    """Put the files of a finished run into a model repository, in one commit; the run is verified first.

    Args:
        folder: of the run. The files of its manifest are sent, with the model card as README.md, but for its request,
            which names folders of this machine.
        repository: `owner/name`; made when there is none.
        private: of a repository that is made here; one that is there already keeps its visibility.
        pull_request: propose the files to a repository that is there, and change nothing in it.
        token: with write access; default HF_TOKEN of the environment.

    Raises:
        RequestError: `repository` is no such name.
        StorageError, RunError: the folder holds no finished run, or does not verify.
        PublishingError: there is no token, or the Hub cannot be reached or refuses.
    """
    from huggingface_hub import CommitOperationAdd

    if not _REPOSITORY.fullmatch(repository):
        raise RequestError("repository", repository, "owner/name, such as my-team/small-resnet18")
    token = token or os.environ.get("HF_TOKEN")
    if not token:
        raise PublishingError(
            "Publishing needs a token with write access: make one at https://huggingface.co/settings/tokens and put it "
            "into the environment variable HF_TOKEN."
        )
    sent = _verified_files(folder)
    with _answers_in_words(PublishingError, repository, "publish later: the run stays as it is"):
        api = _api(token)
        if not pull_request:
            api.create_repo(repository, private=private, exist_ok=True)
        commit = api.create_commit(
            repository,
            [CommitOperationAdd(name, content) for name, content in sent.items()],
            commit_message="Compressed with Espalier",
            create_pr=pull_request,
        )
        visible = bool(api.model_info(repository, timeout=_TIMEOUT_S).private)
    return Published(repository, commit.pr_url or commit.commit_url, visible, len(sent))


def _api(token: str | None) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(token=token or False, library_name="espalier")


def _checkpoint_among(names: list[str], wanted: str | None, repository: str) -> str:
    """The file that is meant; safetensors before pickles where a repository holds one of each."""
    offered = [name for name in names if name.endswith(CHECKPOINT_SUFFIXES)]
    if odd := next((name for name in offered if naming.flaw(name)), None):
        raise CheckpointError(
            f"{repository} has a file {naming.shown(odd)}, whose name holds {naming.flaw(odd)}: give the checkpoint as a file."
        )
    listed = ", ".join(offered[:_NAMED_FILES]) + (" ..." if len(offered) > _NAMED_FILES else "")
    if wanted is not None:
        if wanted in names:
            return wanted
        raise CheckpointError(f"{repository} has no file {wanted}. Its checkpoints: {listed or 'none'}.")
    for suffixes in (CHECKPOINT_SUFFIXES[:1], CHECKPOINT_SUFFIXES[1:]):
        named = [name for name in offered if name.endswith(suffixes)]
        if len(named) == 1:
            return named[0]
        if named:
            raise CheckpointError(
                f"{repository} has {len(named)} checkpoints ({listed}); name one: {SCHEME}{repository}/{named[0]}."
            )
    raise CheckpointError(
        f"{repository} has no checkpoint: a file that ends with {', '.join(CHECKPOINT_SUFFIXES)} is needed."
    )


def _verified_files(folder: Path) -> dict[str, bytes | Path]:
    """What of a finished run everybody may have, by name: its files, and a manifest of them.

    The request stays here: it names folders of this machine, and so did the reports of earlier versions. The name of a
    run's folder is its id, and whoever knows that may look at the run.
    """
    problems = runs.verify(folder)
    if problems:
        raise PublishingError(f"This run is not published because it does not verify: {problems[0]}")
    listed = {name: entry for name, entry in runs.manifest(folder).items() if name != "request.json"}
    private = [str(folder.resolve()), *([folder.name] if re.fullmatch(signing.RUN_ID, folder.name) else [])]
    for name in {"README.md", "report.json", "report.html"} & set(listed):
        if any(word in (folder / name).read_text(encoding="utf-8") for word in private):
            raise PublishingError(
                f"{name} of this run names the folder where it lies on this machine, as earlier versions wrote it: repeat the "
                "run, and publish the new one."
            )
    files: dict[str, bytes | Path] = {name: folder / name for name in listed}
    return files | {runs.MANIFEST: signing.sealed(runs.MANIFEST, {"format": 1, "files": listed}).encode()}


@contextmanager
def _answers_in_words(kind: type[CheckpointError | PublishingError], repository: str, instead: str) -> Iterator[None]:
    """Turns what the Hub's client raises into one sentence that says what to do."""
    import httpx2
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise kind(
            f"{repository} asks for its terms to be accepted on {constants.ENDPOINT}/{repository} first."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise kind(f"{repository} has no such branch, tag or commit; leave @revision out for the newest.") from error
    except errors.RepositoryNotFoundError as error:
        raise kind(
            f"{constants.ENDPOINT} shows no model repository {repository}: check the name, or give HF_TOKEN a token that "
            "may see it."
        ) from error
    except errors.HfHubHTTPError as error:
        raise kind(_refusal(error, repository)) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise kind(f"The disk is full: {repository} could not be kept. Free some space and try again.") from error
        if type(error) is OSError and error.errno is None:  # the client compares the sizes at the end
            raise kind(
                f"What {constants.ENDPOINT} sent of {repository} is incomplete: try again, or {instead}."
            ) from error
        raise _unreachable(kind, error, instead) from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, httpx2.HTTPError) as error:
        raise _unreachable(kind, error, instead) from error


def _unreachable(
    kind: type[CheckpointError | PublishingError], error: Exception, instead: str
) -> CheckpointError | PublishingError:
    from huggingface_hub import constants

    return kind(
        f"{constants.ENDPOINT} cannot be reached from this machine ({type(error).__name__}): check the network, or "
        f"{instead}."
    )


def _refusal(error: OSError, repository: str) -> str:
    status = error.response.status_code  # type: ignore[attr-defined]
    if status in (401, 403):
        return (
            f"The Hub answered {status}: this token may not write to {repository}. Choose a repository of your own, ask for "
            "a pull request, or make a token with write access."
        )
    message = getattr(error, "server_message", None) or "no reason given"
    return f"The Hub answered {status} for {repository} ({naming.shown(message)}); try again later."
