"""Folders that are written whole or not at all, and locked while somebody works on them."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from absorber.errors import MemoryFileError, SessionBusyError


def _backup(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.previous")


@contextlib.contextmanager
def whole_folder(folder: Path, *, marker: str) -> Iterator[Path]:
    """Yield an empty folder to fill; it takes the place of `folder` when the block ends without an error.

    Args:
        folder: The place. What stands there is kept until the new one is complete.
        marker: Name of a file that shows that an existing folder is one of ours and may be replaced.

    Raises:
        MemoryFileError: If something else stands at that place, or it cannot be written.
    """
    folder = folder.absolute()
    recover(folder)
    check_replaceable(folder, marker=marker)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise MemoryFileError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error
    try:
        yield scratch
        for path in scratch.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        scratch.chmod(0o755)
        if folder.is_dir():
            os.replace(folder, _backup(folder))
        os.replace(scratch, folder)
    except OSError as error:
        raise MemoryFileError(f"cannot write to {folder}: {error.strerror}; nothing there was changed") from error
    finally:
        recover(folder)
        shutil.rmtree(scratch, ignore_errors=True)


def check_replaceable(folder: Path, *, marker: str) -> None:
    """Refuse a place that holds something other than what we would write there.

    Raises:
        MemoryFileError: If it does.
    """
    if folder.is_dir():
        if any(folder.iterdir()) and not (folder / marker).is_file():
            raise MemoryFileError(f"{folder} exists and has no {marker}, so it is not ours to replace; choose another")
    elif folder.exists():
        raise MemoryFileError(f"{folder} is a file; choose a folder")


def recover(folder: Path) -> None:
    """Put back the previous version if a crash came between taking it away and putting the new one there."""
    folder = folder.absolute()
    if not folder.exists() and _backup(folder).is_dir():
        os.replace(_backup(folder), folder)
    shutil.rmtree(_backup(folder), ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        MemoryFileError: If it is missing, damaged, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MemoryFileError(f"{path.parent} has no {path.name}") from error
    except (OSError, ValueError) as error:
        raise MemoryFileError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise MemoryFileError(f"{path} is damaged: it should hold a JSON object")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object for people to read as well."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; it is beside the folder, which may be replaced meanwhile.

    Raises:
        SessionBusyError: If another process holds it.
        MemoryFileError: If there is no writing beside the folder.
    """
    folder = folder.absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Made here, so that an OSError of the block inside is not taken for one of the lock.
        folder.with_name(f".{folder.name}.lock").touch()
    except OSError as error:
        raise MemoryFileError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error
    try:
        with FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0):
            yield
    except Timeout as error:
        raise SessionBusyError(f"another process works on {folder}; wait until it has finished") from error
