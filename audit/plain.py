"""Values of strangers, made harmless: evidence may hold anything where a number should be."""

import math
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from common.statements import epsilon_text

UNBOUNDED: Final = "unbounded"
MAX_TEXT = 2000  # characters of one text in a report
MAX_NAME = 200
_HIDING = frozenset(
    "\u061c\u115f\u1160\u200b\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e"
    "\u2060\u2066\u2067\u2068\u2069\u3164\ufeff\ufff9\ufffa\ufffb"
)
_SMALLEST = 1e-12  # an epsilon below it is told as this: rounded up

Measure = float | str | None  # a number, UNBOUNDED, or not known


def words(value: Any, limit: int = MAX_TEXT) -> str:
    r"""Return a value as one line of visible text, no longer than `limit` characters.

    >>> words("a\x1b[31m\n<b>"), words(None), words("a long text", 7)
    ('a\ufffd[31m <b>', '', 'a long\u2026')
    """
    if value is None:
        return ""
    # Shortened before it is looked at: a text may be gigabytes long.
    text = value[: limit + 1] if isinstance(value, str) else _written(value)[: limit + 1]
    shown = "".join(_visible(character) for character in text)
    return shown if len(shown) <= limit else shown[: limit - 1].rstrip() + "\u2026"


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and value.bit_length() > 4096:
        return "a very large number"  # Python refuses to write out such a number
    return str(value) if isinstance(value, int | float) else f"({type(value).__name__})"


def _visible(character: str) -> str:
    if character in "\t\n\r":
        return " "
    point = ord(character)
    hidden = point < 32 or 127 <= point < 160 or 0xD800 <= point < 0xE000 or point in {65534, 65535}
    return "\ufffd" if hidden or character in _HIDING or 0xE0000 <= point < 0xE0080 else character


def number(value: Any) -> float | None:
    """Return a finite number, or nothing.

    >>> number(2), number(float("nan")), number("2"), number(True), number(10**400)
    (2.0, None, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def measure(value: Any) -> Measure:
    """Return an epsilon: a number, "unbounded" for one that is not finite, nothing for no number.

    >>> measure(1.5), measure(float("inf")), measure(None), measure("high")
    (1.5, 'unbounded', None, None)
    """
    if value == UNBOUNDED:
        return UNBOUNDED
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    found = number(value)
    return UNBOUNDED if found is None else found


def size(value: Measure) -> float:
    """Return an epsilon to compare by: unbounded is above all, an unknown one below all."""
    if value is None:
        return -1.0
    return math.inf if isinstance(value, str) else value


def shown_epsilon(value: Measure) -> str:
    """Write an epsilon, rounded up.

    >>> shown_epsilon(0.97121), shown_epsilon("unbounded"), shown_epsilon(None)
    ('0.9713', 'unbounded', '\u2013')
    """
    if value is None:
        return "\u2013"
    if isinstance(value, str):
        return UNBOUNDED
    return epsilon_text(max(value, _SMALLEST) if value > 0 else 0.0)


def whole(value: Any) -> int | None:
    """Return a whole number below 2^53, or nothing.

    >>> whole(3), whole(3.0), whole(3.5), whole("3")
    (3, 3, None, None)
    """
    found = number(value)
    return int(found) if found is not None and found.is_integer() and abs(found) < 2**53 else None


def truth(value: Any) -> bool | None:
    """Return True or False, or nothing where it is neither."""
    return value if isinstance(value, bool) else None


def mapping(value: Any) -> Mapping[Any, Any]:
    """Return a mapping, an empty one in the place of anything else."""
    return value if isinstance(value, Mapping) else {}


def sequence(value: Any) -> list[Any]:
    """Return a list, an empty one in the place of anything else."""
    return list(value) if isinstance(value, list | tuple) else []


def moment(value: Any) -> str | None:
    """Return seconds since 1970 as a time in UTC, or nothing.

    >>> moment(0.0), moment(1e30)
    ('1970-01-01T00:00:00Z', None)
    """
    seconds = number(value)
    if seconds is None or not 0 <= seconds < 253_402_300_800:  # the year 10000
        return None
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def listed(name: str, items: Iterable[Any], limit: int) -> dict[str, Any]:
    """Return the first items under a name, and how many were left out.

    >>> listed("runs", [1, 2, 3], 2)
    {'runs': [1, 2], 'runs_left_out': 1}
    """
    every = list(items)
    return {name: every[:limit], f"{name}_left_out": max(len(every) - limit, 0)}
