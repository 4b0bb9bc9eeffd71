"""Which code is running: its version, and a hash of its text."""

import hashlib
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_ROOMS = ("clients", "common", "server")  # what computes, charges and sums


@lru_cache(maxsize=1)
def hansa_version() -> str:
    """Return the installed version; "unknown" in a bundle that Flower shipped."""
    try:
        return version("hansa")
    except PackageNotFoundError:
        return "unknown"


@lru_cache(maxsize=1)
def code_sha256() -> str:
    """Return SHA-256 over names and text of every module that takes part in a run."""
    root = Path(__file__).parent.parent
    found = hashlib.sha256()
    for room in _ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            name = path.relative_to(root).as_posix().encode()
            for part in (name, path.read_bytes()):
                found.update(len(part).to_bytes(8, "big") + part)
    return found.hexdigest()
