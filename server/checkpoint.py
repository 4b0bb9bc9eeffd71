"""What a coordinator keeps of a run so that another process can go on: JSON, between two sums.

Everything in it is what the coordinator may know anyway: noisy sums over many merchants, the
model, and of secure sums what members left for the next step, encrypted for each other.
"""

import base64
import json
from typing import Any

import numpy as np

from common.errors import ArchiveError

FORMAT = 1


def to_text(array: np.ndarray) -> str:
    """Return an array of float64 as base64, little-endian."""
    return base64.b64encode(np.ascontiguousarray(array, dtype="<f8").tobytes()).decode()


def from_text(text: str) -> np.ndarray:
    """Read an array of float64 back."""
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f8").astype(np.float64)


def to_bytes(document: dict[str, Any]) -> bytes:
    """Return a checkpoint's bytes."""
    return json.dumps({"format": FORMAT, **document}, separators=(",", ":")).encode()


def from_bytes(raw: bytes) -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        ArchiveError: It is none, or of another version of Hansa.
    """
    try:
        document = json.loads(raw)
    except ValueError:
        document = None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ArchiveError(
            "the run's checkpoint cannot be read; it was changed, or another version of hansa "
            "wrote it"
        )
    return document
