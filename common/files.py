"""Files that are whole or not there: written beside their place, then moved."""

import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path


def write_atomically(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a file in the place of an older one.

    Raises:
        OSError: It cannot be written; what was there is unchanged.
    """
    partial = _beside(path, content, mode)
    try:
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    _keep_folder(path.parent)


def write_new(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a file that is not there yet.

    Raises:
        FileExistsError: It is there already, and is unchanged.
        OSError: It cannot be written.
    """
    partial = _beside(path, content, mode)
    try:
        os.link(partial, path)  # unlike a rename it never replaces anything
    finally:
        partial.unlink(missing_ok=True)
    _keep_folder(path.parent)


def write_together(contents: Mapping[Path, bytes], mode: int = 0o644) -> None:
    """Write several files, all or none, in the order given.

    The last one is moved last: a reader that finds it finds the others, too.

    Raises:
        OSError: One cannot be written; all are as they were.
    """
    before = {path: path.read_bytes() if path.is_file() else None for path in contents}
    partials: dict[Path, Path] = {}
    moved: list[Path] = []
    try:
        for path, content in contents.items():
            partials[path] = _beside(path, content, mode)
        for path, partial in partials.items():
            partial.replace(path)
            moved.append(path)
    except OSError:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
        for path in reversed(moved):
            _put_back(path, before[path], mode)
        raise
    for folder in {path.parent for path in contents}:
        _keep_folder(folder)


def _put_back(path: Path, content: bytes | None, mode: int) -> None:
    if content is None:
        path.unlink(missing_ok=True)
    else:
        write_atomically(path, content, mode)


def _beside(path: Path, content: bytes, mode: int) -> Path:
    """Write the content into a new file in the same folder, all the way to the disk."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):
            Path(name).unlink()
        raise
    return Path(name)


def _keep_folder(folder: Path) -> None:
    """Take the folder's new entries to the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
