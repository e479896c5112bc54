"""Find places on disk, and write what is there whole or not at all."""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from fedpft_flower.config import FedPFTError


def cache_dir() -> Path:
    """Return where extracted rows, tokens, sub-FMs and probes are kept here.

    `FEDPFT_CACHE` names it; the default is `~/.cache/fedpft-flower`.
    """
    if chosen := os.environ.get("FEDPFT_CACHE"):
        return Path(chosen).expanduser().absolute()
    return from_home(".cache/fedpft-flower")


def from_home(name: str) -> Path:
    """Return a path that a user typed; one that is relative begins at their home.

    The working directory is that of a SuperLink that was started who knows where.

    Raises:
        FedPFTError: nobody says where their home is.
    """
    place = Path(os.path.expanduser(name))  # noqa: PTH111
    try:
        return place if place.is_absolute() else Path.home() / place
    except RuntimeError as error:
        raise FedPFTError(
            f"{name!r} is below a home directory, and this user has none; set HOME, or "
            "give an absolute path"
        ) from error


def private_cache(name: str) -> Path:
    """Return a folder of the cache that only this user can read, and make it.

    Raises:
        FedPFTError: it cannot be made, or not be written.
    """
    folder = cache_dir() / name
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("read-only, or another user's")
    except OSError as error:
        raise FedPFTError(
            f"cannot write in {folder} ({error}); set FEDPFT_CACHE to a directory that "
            "can be written"
        ) from error
    return folder


def last_used(path: Path) -> float:
    """Return when something was written or used last; 0 where it is gone."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another process removed or renamed it
        return 0.0


def existing_path(name: str) -> Path | None:
    """Return the path that a user typed, or None where there is nothing to be seen."""
    try:
        return reachable_path(name)
    except PermissionError:
        return None


def shell_path(name: str) -> str:
    """Return a name as it is, or a path that is there as an absolute one.

    Relative paths mean the directory of the shell that they are typed in, not that of
    some process that reads them later.
    """
    place = existing_path(name)
    return str(place.absolute()) if place is not None else name


# What to say of a path that `reachable_path` may not look at.
OUT_OF_REACH = "lies where the user that runs this may not look; let that user in"


def reachable_path(name: str) -> Path | None:
    """Return the path that a user typed, or None where there is nothing.

    Raises:
        PermissionError: this process's user may not look there.
    """
    try:
        place = Path(name).expanduser()
        place.stat()
    except PermissionError:
        raise
    except (OSError, RuntimeError, ValueError):  # too long; no such home; no path
        return None
    return place


def put(place: Path, write: Callable[[Path], Any]) -> None:
    """Write a file or directory under a temporary name, flush it, and rename it.

    Raises:
        OSError: the disk refuses; what was there stays.
    """
    draft = place.with_name(f".{place.stem}.partial{place.suffix}")
    _remove(draft)  # what a killed process left
    try:
        write(draft)
        for path in [draft, *draft.rglob("*")] if draft.is_dir() else [draft]:
            flush(path)
        if place.is_dir():  # a rename replaces files only
            _remove(place)
        draft.replace(place)
        flush(place.parent)
    finally:
        _remove(draft)


def lock(path: Path) -> IO[bytes]:
    """Lock a file for as long as it stays open; a killed process lets go of it.

    Raises:
        BlockingIOError: another process has locked it.
        OSError: it cannot be opened.
    """
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def keep(place: Path, write: Callable[[Path], Any]) -> None:
    """Write a file of the cache; other processes may write the same.

    Raises:
        FedPFTError: the disk refuses.
    """
    draft = None
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(dir=place.parent, suffix=".partial")
        os.close(number)
        draft = Path(name)
        write(draft)
        draft.replace(place)
    except (OSError, SafetensorError) as error:
        raise FedPFTError(
            f"cannot write {place} ({error}); make room there, or set FEDPFT_CACHE to "
            "a directory that can be written"
        ) from error
    finally:
        if draft is not None:
            draft.unlink(missing_ok=True)


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
