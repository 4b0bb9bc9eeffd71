"""Find files of installed data packages without importing them; cache what is made of them.

The packages bring their own import-time baggage (and more data than is needed), so only
their files are read. Each file is checked against a pinned SHA-256: results in the docs
hold for exactly these bytes.
"""

import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import pandas as pd

from common.errors import DataError

FORMAT = 1  # raised when the same sources would give another table
INSTALL = "pip install 'hansa[data]'"


@dataclass(frozen=True)
class Source:
    """Files inside an importable package, with their pinned SHA-256."""

    package: str
    folder: str  # inside the package
    files: Mapping[str, str]  # file name -> SHA-256

    def locate(self) -> dict[str, Path]:
        """Find the files and check every byte of them.

        Raises:
            DataError: The package is not installed, or a file is missing or changed.
        """
        spec = importlib.util.find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            raise DataError(
                f"this data set needs the Python package '{self.package}', which is not installed; "
                f"install it with: {INSTALL}"
            )
        folder = Path(spec.submodule_search_locations[0]) / self.folder
        paths = {name: folder / name for name in self.files}
        for name, path in paths.items():
            self._check(name, path)
        return paths

    def _check(self, name: str, path: Path) -> None:
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}); reinstall with: {INSTALL}"
            ) from None
        if found != self.files[name]:
            raise DataError(
                f"{path}: expected SHA-256 {self.files[name]}, got {found}; this is another "
                f"version of the data, so numbers would not compare; reinstall with: {INSTALL}"
            )


def cache_folder() -> Path:
    """Return `$HANSA_CACHE`, else `$XDG_CACHE_HOME/hansa`, else `~/.cache/hansa`."""
    if chosen := os.environ.get("HANSA_CACHE"):
        return Path(chosen)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "hansa"


def cached(name: str, identity: Sequence[str], build: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """Return the table of this identity: from the cache if it is whole, else built and kept.

    Args:
        name: Start of the cache file's name.
        identity: All that the table depends on: hashes of sources and contracts.
        build: Makes the table; called where the cache has none or a damaged one.
    """
    key = hashlib.sha256(json.dumps([FORMAT, *identity]).encode()).hexdigest()[:16]
    path = cache_folder() / f"{name}-{key}.parquet"
    content = _intact(path)
    if content is None:
        content = _as_parquet(build())
        # A cache that cannot be written costs time at the next load, nothing else.
        with suppress(OSError):
            _keep(path, content)
    return pd.read_parquet(BytesIO(content))


def _intact(path: Path) -> bytes | None:
    """Return the file's bytes if they match the checksum beside it."""
    try:
        content = path.read_bytes()
        expected = _checksum(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return content if hashlib.sha256(content).hexdigest() == expected else None


def _keep(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, content)
    _replace(_checksum(path), hashlib.sha256(content).hexdigest().encode("ascii"))


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old or the new one, never a part."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _checksum(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _as_parquet(table: pd.DataFrame) -> bytes:
    buffer = BytesIO()
    table.to_parquet(buffer, index=False)
    return buffer.getvalue()
