"""The shape of untrusted JSON: which fields an object has, and of what kind each is."""

import base64
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from audit.codes import Flaw
from common.errors import AccountingError
from common.events import Event, from_document

Kind = Callable[[Any], bool]
Fields = Mapping[str, Kind]

MOST_DELTA = 0.01  # of a policy: with a larger one, any epsilon is small
_LARGEST = sys.float_info.max  # JSON knows whole numbers that no float can hold
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def text(value: object) -> bool:
    """Tell whether it is a text that can be written down again."""
    return isinstance(value, str) and (value.isascii() or not _SURROGATE.search(value))


def digest(value: object) -> bool:
    """Tell whether it is a SHA-256 or a key, in hexadecimal digits."""
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def whole(value: object) -> bool:
    """Tell whether it is a whole number >= 0 of at most 53 bits."""
    return type(value) is int and 0 <= value < 2**53


def number(value: object) -> bool:
    """Tell whether it is a finite number >= 0."""
    return type(value) in {int, float} and 0 <= value <= _LARGEST  # type: ignore[operator]


def event(value: object) -> bool:
    """Tell whether it is a privacy event that this version knows."""
    try:
        read_event(value if isinstance(value, dict) else {})
    except (AccountingError, TypeError):
        return False
    return True


def read_event(document: Mapping[str, Any]) -> Event:
    """Return the privacy event of a document; raises where there is none."""
    return _event(tuple((name, value, type(value)) for name, value in document.items()))


@lru_cache(maxsize=1024)  # thousands of entries hold the same few events
def _event(items: tuple[tuple[str, Any, type], ...]) -> Event:
    return from_document({name: value for name, value, _ in items})


def maybe(kind: Kind) -> Kind:
    """Return the kind that allows null too."""
    return lambda value: value is None or kind(value)


def several(kind: Kind) -> Kind:
    """Return the kind of a list of one kind."""
    return lambda value: isinstance(value, list) and all(map(kind, value))


def shaped(fields: Fields) -> Kind:
    """Return the kind of an object with just these fields."""
    return lambda value: isinstance(value, dict) and not wrong_fields(value, fields)


def named(kind: Kind) -> Kind:
    """Return the kind of an object with any names."""
    return lambda value: isinstance(value, dict) and all(map(kind, value.values()))


def stage_and_round(value: object) -> bool:
    """Tell whether it is `[stage, round]`."""
    return isinstance(value, list) and len(value) == 2 and text(value[0]) and whole(value[1])


POLICY: Fields = {
    "epsilon": number,
    "delta": lambda value: number(value) and 0 < value <= MOST_DELTA,
    "epsilon_towards_server": maybe(number),
    "refresh_days": maybe(number),
    "purposes": named(number),
}


def wrong_fields(document: Mapping[str, Any], fields: Fields) -> list[str]:
    """Return the names of fields that are missing, of another kind, or not known."""
    wrong = [name for name, kind in fields.items() if name not in document]
    wrong += [
        name for name, kind in fields.items() if name in document and not kind(document[name])
    ]
    return wrong + sorted(document.keys() - fields.keys())


def objects(raw: bytes, code: str, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line number and object of each line of a JSON-lines file.

    Raises:
        Flaw: A line is no JSON object.
    """
    for line, item in enumerate(io.BytesIO(raw), start=1):
        yield line, an_object(item, code, f"{name}, line {line}")


def an_object(raw: bytes, code: str, name: str) -> dict[str, Any]:
    """Return the JSON object in a file or line.

    Raises:
        Flaw: It is none.
    """
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise Flaw(code, f"{name}: is no JSON object")
    return document


def integers(value: object) -> np.ndarray | None:
    """Return the int64 numbers in base64; None if it is none."""
    try:
        raw = base64.b64decode(str(value), validate=True)
    except ValueError:
        return None
    return np.frombuffer(raw, "<i8").astype(np.int64) if len(raw) % 8 == 0 else None


def vector(value: object) -> bool:
    """Tell whether it is a base64 text of int64 numbers."""
    return isinstance(value, str) and integers(value) is not None
