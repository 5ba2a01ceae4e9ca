"""Models of the Hugging Face hub by their names: only the files that are needed, through `huggingface_hub`.

That package looks for tokens, mirrors and caches, and respects its settings: HF_TOKEN, HF_ENDPOINT, HF_HOME,
HF_HUB_OFFLINE and others. What was downloaded is not downloaded again, and what was cut off goes on.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fluxonnx.checkpoint.files import VARIANT
from fluxonnx.checkpoint.reading import shown
from fluxonnx.errors import CheckpointError

# A repository, by its owner and name.
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# A file in one, or a repository that holds a single one of its kind: OWNER/NAME/FILE, OWNER/NAME.
FILE = re.compile(rf"({REPOSITORY.pattern})(?:/([^\0]+))?")
INSTALL = "pip install fluxonnx[hub]"
INDEXES = ("model_index.json", "modular_model_index.json")
# What a model needs. The weights of a part are in its folder: repositories also have the transformer as one file.
FOLDERS = ("scheduler", "tokenizer", "text_encoder", "transformer", "vae")
TEXTS = (".json", ".txt", ".jinja")
# Files are written in pieces, and a disk that is full to the last byte is of no use.
SPARE = 64 << 20


def is_repository(path: str | Path) -> bool:
    """Whether a name is that of a repository and not of a folder: nothing here begins with it."""
    name = Path(path).as_posix()
    return REPOSITORY.fullmatch(name) is not None and not Path(name.partition("/")[0]).exists()


def download(
    repository: str,
    revision: str | None = None,
    output: str | Path | None = None,
    say: Callable[[str], None] | None = None,
    bars: bool = False,
) -> Path:
    """Download what is needed of a model, or what is missing of that.

    Args:
        repository: Its owner and name, as in "black-forest-labs/FLUX.2-klein-4B".
        revision: A branch, a tag or a commit; by default the main branch.
        output: A folder for the files; by default the hub's cache, whose files other programs share.
        say: Told once what will be downloaded and under which licence; not if everything is there.
        bars: Whether progress is drawn on standard error.

    Returns:
        The model directory.

    Raises:
        CheckpointError: The package is missing, the repository can't be reached or is no model, or the disk is full.
    """
    if REPOSITORY.fullmatch(repository) is None:
        raise CheckpointError(f"{shown(repository)} is no name of a repository: pass OWNER/NAME")
    _require_client(repository)
    import huggingface_hub
    from huggingface_hub import constants

    local = str(output) if output is not None else None
    with _told(repository, revision), _bars(bars):
        if constants.HF_HUB_OFFLINE:
            names = _known_files(repository, revision, local)
            patterns = None if names is None else [glob.escape(name) for name in needed_files(names)]
            found = huggingface_hub.snapshot_download(
                repository, revision=revision, local_dir=local, allow_patterns=patterns
            )
            return Path(found if output is None else output)
        model = huggingface_hub.HfApi().model_info(repository, revision=revision, files_metadata=True)
        needed = needed_files([file.rfilename for file in model.siblings or ()])
        if not any(index in needed for index in INDEXES):
            raise CheckpointError(
                f"{repository} has no model_index.json, so it is not a whole model: download the file that you want "
                "with `hf download`, and pass it with --transformer, --text-encoder or --vae"
            )
        patterns = [glob.escape(name) for name in needed]
        planned = huggingface_hub.snapshot_download(
            repository, revision=model.sha, local_dir=local, allow_patterns=patterns, dry_run=True
        )
        missing = sum(file.file_size or 0 for file in planned if file.will_download)
        if missing:
            _require_space(Path(output) if output is not None else Path(constants.HF_HUB_CACHE), missing, repository)
            if say is not None:
                say(f"Downloading {missing / 1e9:.2f} GB of {repository}{_licence(model, constants.ENDPOINT)}")
        # by its name and not by its commit, so that the cache knows the name where there is no network
        found = huggingface_hub.snapshot_download(
            repository, revision=revision, local_dir=local, allow_patterns=patterns
        )
        return Path(found if output is None else output)


def download_file(name: str, choose: Callable[[Sequence[str]], str], cached: bool = False) -> tuple[Path, str]:
    """Download one file of a repository, if it is not in the hub's cache.

    Args:
        name: OWNER/NAME/FILE, or OWNER/NAME.
        choose: Chooses among the names of a repository's files, if none is named.
        cached: Whether only the cache is looked into.

    Returns:
        The file, and its name as OWNER/NAME/FILE.

    Raises:
        CheckpointError: As `download`, or there is no such file.
    """
    found = FILE.fullmatch(name)
    if found is None:
        raise CheckpointError(f"{shown(name)} is no name of a file on the hub: pass OWNER/NAME/FILE")
    repository, file = found.groups()
    _require_client(name)
    import huggingface_hub
    from huggingface_hub import constants

    with _told(repository, None, cached), _bars(False):
        if file is None:
            if cached or constants.HF_HUB_OFFLINE:
                names = _known_files(repository, None, None) or []
            else:
                names = huggingface_hub.HfApi().list_repo_files(repository)
            file = choose(sorted(names))
        path = huggingface_hub.hf_hub_download(repository, file, local_files_only=cached)
        return Path(path), f"{repository}/{file}"


def _require_client(name: str) -> None:
    if find_spec("huggingface_hub") is None:
        raise CheckpointError(
            f"{name} is not here, and can't be downloaded without the package huggingface_hub: {INSTALL}, or pass a "
            "path"
        )


def _known_files(repository: str, revision: str | None, local: str | None) -> list[str] | None:
    """Return the names of a repository's files as the cache remembers them; None where it does not."""
    import huggingface_hub

    try:
        tree = huggingface_hub.get_cached_repo_tree(repository, revision=revision, local_dir=local)
    except Exception:  # of a version that remembers none, or nothing was downloaded yet: it will say so itself
        return None
    return [entry.path for entry in tree]


def needed_files(names: Sequence[str]) -> list[str]:
    """Return those of a repository's files that a model needs.

    Of several forms of a part's weights that is the plain one, else every variant.
    """
    needed = [name for name in names if name in INDEXES]
    for folder in FOLDERS:
        inside = [name for name in names if name.rpartition("/")[0] == folder]
        needed += [name for name in inside if name.endswith(TEXTS) and ".index." not in name]
        weights = [name for name in inside if name.endswith(".safetensors") or ".safetensors.index." in name]
        plain = [name for name in weights if not _is_variant(name.rpartition("/")[2])]
        needed += plain or weights
    return needed


def _is_variant(name: str) -> bool:
    # shards of a variant: STEM.fp16-00001-of-00002.safetensors
    return VARIANT.fullmatch(name) is not None or fnmatch.fnmatch(name, "*.*-?????-of-?????.safetensors")


def _licence(found: Any, endpoint: str) -> str:
    card = found.card_data
    name = getattr(card, "license_name", None) or getattr(card, "license", None)
    if not name:
        return f" (its licence: {endpoint}/{found.id})"
    link = getattr(card, "license_link", None) or f"{endpoint}/{found.id}"
    return f", licence {name} ({link})"


def _require_space(folder: Path, size: int, repository: str) -> None:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < size + SPARE:
        raise CheckpointError(
            f"{repository} needs {size / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free in {folder}: free some, or "
            "choose another folder with -o (or another cache with HF_HOME)"
        )


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    if not shown:
        disable_progress_bars()
    try:
        yield
    finally:
        if not before and not shown:
            enable_progress_bars()


@contextmanager
def _told(repository: str, revision: str | None, cached: bool = False) -> Iterator[None]:
    """Turn the client's errors into one line each; `cached` says that only the cache is looked into."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repository}"
    at = f" at revision {revision}" if revision else ""
    try:
        yield
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{repository} is gated: accept its licence at {page}, then log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{repository} is neither a folder here nor a repository of {constants.ENDPOINT} (or it is private: log in "
            "with `hf auth login` or set HF_TOKEN)"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{repository} has no revision {revision}: look for one at {page}/tree/main") from None
    except (errors.LocalEntryNotFoundError, errors.IncompleteSnapshotError):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub can't be reached"
        why = "nothing may be downloaded now" if cached else why
        raise CheckpointError(
            f"{repository}{at} is not whole in the hub's cache, and {why}: download it where there is a network, or "
            "pass a folder"
        ) from None
    except errors.EntryNotFoundError:
        raise CheckpointError(f"{repository} has no such file{at}: look for one at {page}/tree/main") from None
    except errors.HfHubHTTPError as error:
        answer = getattr(error.response, "status_code", None) or _line(error)
        raise CheckpointError(
            f"{repository} can't be downloaded from {constants.ENDPOINT}, which answered {answer}: try again later"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(f"no space left for {repository}: free some and run the same command again") from None
        raise CheckpointError(
            f"{repository} is no folder here, and can't be downloaded: {error.strerror or _line(error)}"
        ) from None
    except CheckpointError:
        raise
    except Exception as error:  # of the client's own HTTP library, which has changed before
        raise CheckpointError(
            f"{repository} is no folder here, and can't be downloaded from {constants.ENDPOINT} ({_line(error)}): "
            "pass a folder, or run the same command again"
        ) from None


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
