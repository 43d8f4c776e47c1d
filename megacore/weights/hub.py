"""Fetching published checkpoints from the Hugging Face hub.

Only safetensors, configurations and tokenizers are fetched: never a pickle, and never code.
"""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megacore.checkpoint.safetensors_file import SafetensorsFile
from megacore.errors import CheckpointError, ConfigError, CorruptCheckpointError, DiskFullError, FetchError
from megacore.plugins import Family
from megacore.weights.formats.hf import CONFIG_FILE, GENERATION_FILE, INDEX_FILE, SINGLE_FILE, indexed_file_names
from megacore.weights.formats.published import TOKENIZER_FILES

DESCRIBING_FILES = (CONFIG_FILE, GENERATION_FILE, INDEX_FILE, *TOKENIZER_FILES)
"""What is fetched first: small, and it says which files the weights are in."""

_INSTEAD = "or pass a directory that holds the checkpoint (--from, --reference)"


def locate(source: str, *, cache_dir: Path | None = None, revision: str | None = None) -> Path:
    """The directory of a checkpoint: ``source`` itself where that is one, or else what the hub has under that name.

    Raises:
        MegacoreError: as :func:`fetch` does, and when ``revision`` or ``cache_dir`` is given for a directory.
    """
    directory = Path(source)
    if directory.is_dir() or not is_repository(source):
        if given := [name for name, value in (("--cache-dir", cache_dir), ("--revision", revision)) if value]:
            raise ConfigError(f"{source} is not on the hub: leave out {' and '.join(given)}")
        return directory
    return fetch(source, cache_dir=cache_dir, revision=revision)


def is_repository(name: str) -> bool:
    """Whether ``name`` can be that of a repository on the hub: ``owner/name``."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII) is not None


def repository_of_size(family: Family, size: str) -> str:
    """Where on the hub the published ``size`` of ``family`` is.

    Raises:
        ConfigError: when the family has no such size, or does not say where it is.
    """
    repositories = family.family.hub
    if size not in repositories:
        family.preset(size)  # which raises, with the sizes that there are, if there is no such size
        raise ConfigError(f"{family.label} does not say where on the hub size {size} is: pass --from")
    return repositories[size]


def fetch(repository: str, *, cache_dir: Path | str | None = None, revision: str | None = None) -> Path:
    """Fetch a checkpoint in the Hugging Face format from the hub, unless it is in the cache already.

    Args:
        repository: ``owner/name``.
        cache_dir: by default that of ``huggingface_hub``, which its own programs and transformers share.
        revision: a branch, a tag or a commit; by default ``main``.

    Returns:
        A directory in the cache, for reading only. :func:`provenance` tells the commit that it holds.

    Raises:
        CheckpointError: when there is no such repository or revision, or no checkpoint in safetensors in it.
        FetchError: when it could not be fetched, and what to do.
        CorruptCheckpointError: when a file in the cache is damaged.
        DiskFullError: when the cache has no room for it.
    """
    download = _downloader(repository, cache_dir)
    directory = download(DESCRIBING_FILES, revision)
    where = f"{repository} on the hub (revision {revision or 'main'})"
    if not (directory / CONFIG_FILE).is_file():
        raise CheckpointError(f"{where} has no {CONFIG_FILE}: it is not a checkpoint in the Hugging Face format")
    indexed = indexed_file_names(directory)
    names = [SINGLE_FILE] if indexed is None else indexed
    download(names, directory.name)  # by the commit that the index is of, whatever happens on the hub meanwhile
    if missing := [name for name in names if not (directory / name).is_file()]:
        if indexed is not None:
            raise CheckpointError(f"{where} lacks {', '.join(missing[:3])}, which its {INDEX_FILE} names")
        raise CheckpointError(
            f"{where} has no weights in safetensors, and files of other kinds are not fetched, since loading them can "
            f"run code. Choose a --revision that has safetensors (the hub converts on request, as a pull request: "
            f"refs/pr/N), {_INSTEAD}"
        )
    for name in names:
        try:
            SafetensorsFile(directory / name)  # compares the file's length with what its header announces
        except CorruptCheckpointError as error:
            damaged = (directory / name).resolve()
            raise CorruptCheckpointError(f"{error}. Delete {damaged} to have it fetched again") from error
    return directory


def provenance(directory: Path) -> dict[str, str]:
    """The repository and commit that a directory of the hub's cache holds; nothing for any other directory."""
    found = re.search(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})$", directory.absolute().as_posix())
    return {"repository": f"{found[1]}/{found[2]}", "revision": found[3]} if found else {}


def _downloader(repository: str, cache_dir: Path | str | None) -> Callable[[Sequence[str], str | None], Path]:
    """A function of file names and a revision that has the cache hold those of the files that there are."""
    from huggingface_hub import constants, errors, snapshot_download

    cache = Path(cache_dir or constants.HF_HUB_CACHE)
    page = f"{constants.ENDPOINT}/{repository}"

    def download(names: Sequence[str], revision: str | None) -> Path:
        # What the library says is not repeated: it may quote addresses that are signed for this user.
        try:
            with _progress_on_terminals_only():
                return Path(
                    snapshot_download(repository, revision=revision, cache_dir=cache, allow_patterns=list(names))
                )
        except errors.GatedRepoError as error:
            raise FetchError(
                f"{repository} is gated: accept its licence at {page} and log in with `hf auth login`, {_INSTEAD}"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise CheckpointError(f"{repository} has no revision {revision!r}: {page}/commits lists them") from error
        except errors.RepositoryNotFoundError as error:
            raise CheckpointError(
                f"there is no {repository} on the hub, and no such directory here. If you meant a directory, check "
                f"where it is; if the repository is private, log in with `hf auth login`"
            ) from error
        except Exception as error:  # of the operating system, the library, or whichever HTTP client it is built on
            raise _failure(error, repository, cache, is_offline=constants.HF_HUB_OFFLINE) from error

    return download


@contextmanager
def _progress_on_terminals_only() -> Iterator[None]:
    """Some of the library's progress bars are drawn into files too."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _failure(error: Exception, repository: str, cache: Path, *, is_offline: bool) -> FetchError | DiskFullError:
    """What to tell of a download that came to nothing."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(f"there is no room for {repository} in {cache}: choose another place with --cache-dir")
    if isinstance(error, PermissionError):
        return FetchError(f"{cache} cannot be written to: choose another place with --cache-dir")
    if is_offline:
        return FetchError(
            f"{repository} is not in the cache, {cache}, or not all of it, and HF_HUB_OFFLINE forbids to fetch it: "
            f"unset that, {_INSTEAD}"
        )
    status = _http_status(error) or _http_status(error.__cause__)
    if status in (401, 403):
        return FetchError(f"the hub refuses {repository} to your login: log in with `hf auth login`, {_INSTEAD}")
    reason = f"the hub answered with status {status}" if status else f"{type(error.__cause__ or error).__name__}"
    return FetchError(
        f"{repository} could not be fetched ({reason}). Check the network and run the command again: what has arrived "
        f"is kept in {cache}. {_INSTEAD.capitalize()}"
    )


def _http_status(error: BaseException | None) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
