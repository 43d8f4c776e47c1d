"""Download of published checkpoints from the Hugging Face hub.

Only safetensors, configurations and tokenizers are fetched: never a pickle, and never code.
"""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megacore.checkpoint.manifest import TOKENIZER_FILES
from megacore.checkpoint.safetensors_file import SafetensorsFile
from megacore.errors import CheckpointError, ConfigError, CorruptCheckpointError, DiskFullError, FetchError
from megacore.plugins import Family
from megacore.weights.formats.hf import CONFIG_FILE, GENERATION_FILE, INDEX_FILE, SINGLE_FILE, indexed_file_names

# These files are fetched first: they are small and name the weight files.
_DESCRIBING_FILES = (CONFIG_FILE, GENERATION_FILE, INDEX_FILE, *TOKENIZER_FILES)
_INSTEAD = "or pass a directory that holds the checkpoint (--from, --reference)"


def locate(source: str, *, cache_dir: Path | None = None, revision: str | None = None) -> Path:
    """Return the directory of a checkpoint: ``source`` if it is a directory, else the fetched repository of that name.

    Raises what :func:`fetch` does, and :class:`ConfigError` if ``revision`` or ``cache_dir`` is given for a directory.
    """
    directory = Path(source)
    if directory.is_dir() or not is_repository(source):
        if given := [name for name, value in (("--cache-dir", cache_dir), ("--revision", revision)) if value]:
            raise ConfigError(f"{source} is not on the hub: leave out {' and '.join(given)}")
        return directory
    return fetch(source, cache_dir=cache_dir, revision=revision)


def is_repository(name: str) -> bool:
    """Return whether ``name`` has the form of a repository on the hub, ``owner/name``."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII) is not None


def repository_of_size(family: Family, size: str) -> str:
    """Return the repository of a published size. Raises :class:`ConfigError` if the family names none for it."""
    repositories = family.family.hub
    if size not in repositories:
        family.preset(size)  # raises, listing the known sizes, if there is no such size
        raise ConfigError(f"{family.label} does not say where on the hub size {size} is: pass --from")
    return repositories[size]


def fetch(repository: str, *, cache_dir: Path | str | None = None, revision: str | None = None) -> Path:
    """Fetch a checkpoint in the Hugging Face format from the hub, unless it is in the cache already.

    Args:
        repository: The repository, ``owner/name``.
        cache_dir: The cache; by default that of ``huggingface_hub``, which transformers shares.
        revision: A branch, a tag or a commit; by default ``main``.

    Returns:
        A directory in the cache, for reading only. :func:`provenance` returns its commit.

    Raises:
        CheckpointError: if there is no such repository or revision, or no checkpoint in safetensors in it.
        FetchError: if it cannot be fetched; the message says what to do.
        CorruptCheckpointError: if a file in the cache is damaged.
        DiskFullError: if the cache has too little space for it.
    """
    download = _downloader(repository, cache_dir)
    directory = download(_DESCRIBING_FILES, revision)
    where = f"{repository} on the hub (revision {revision or 'main'})"
    if not (directory / CONFIG_FILE).is_file():
        raise CheckpointError(f"{where} has no {CONFIG_FILE}: it is not a checkpoint in the Hugging Face format")
    indexed = indexed_file_names(directory)
    names = [SINGLE_FILE] if indexed is None else indexed
    download(names, directory.name)  # the commit of the index, even if the hub has a newer one by now
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
            SafetensorsFile(directory / name)  # compares the file's length with its header
        except CorruptCheckpointError as error:
            damaged = (directory / name).resolve()
            raise CorruptCheckpointError(f"{error}. Delete {damaged} to have it fetched again") from error
    return directory


def provenance(directory: Path) -> dict[str, str]:
    """Return the repository and commit of a directory in the hub's cache; empty for any other directory."""
    found = re.search(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})$", directory.absolute().as_posix())
    return {"repository": f"{found[1]}/{found[2]}", "revision": found[3]} if found else {}


def _downloader(repository: str, cache_dir: Path | str | None) -> Callable[[Sequence[str], str | None], Path]:
    """Return a function of file names and a revision that downloads those of the files that exist into the cache."""
    from huggingface_hub import constants, errors, snapshot_download

    cache = Path(cache_dir or constants.HF_HUB_CACHE)
    page = f"{constants.ENDPOINT}/{repository}"

    def download(names: Sequence[str], revision: str | None) -> Path:
        # The message of the library is not repeated: it may contain URLs that are signed for this user.
        try:
            with _progress_on_terminals_only():
                return Path(snapshot_download(repository, revision=revision, cache_dir=cache, allow_patterns=[*names]))
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
        except Exception as error:  # of the operating system, the library or its HTTP client
            raise _failure(error, repository, cache, is_offline=constants.HF_HUB_OFFLINE) from error

    return download


@contextmanager
def _progress_on_terminals_only() -> Iterator[None]:
    """Disable the library's progress bars unless stderr is a terminal; some are drawn into files too."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _failure(error: Exception, repository: str, cache: Path, *, is_offline: bool) -> FetchError | DiskFullError:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(f"there is no room for {repository} in {cache}: choose another place with --cache-dir")
    if isinstance(error, PermissionError):
        return FetchError(f"{cache} cannot be written to: choose another place with --cache-dir")
    if is_offline:
        return FetchError(
            f"{repository} is not completely in the cache, {cache}, and HF_HUB_OFFLINE forbids downloads: "
            f"unset that, {_INSTEAD}"
        )
    status = _http_status(error) or _http_status(error.__cause__)
    if status in (401, 403):
        return FetchError(f"the hub refuses {repository} to your login: log in with `hf auth login`, {_INSTEAD}")
    reason = f"the hub answered with status {status}" if status else f"{type(error.__cause__ or error).__name__}"
    return FetchError(
        f"{repository} could not be fetched ({reason}). Check the network and run the command again: the files "
        f"fetched so far are kept in {cache}. {_INSTEAD.capitalize()}"
    )


def _http_status(error: BaseException | None) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
