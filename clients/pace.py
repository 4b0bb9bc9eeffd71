"""How long to wait: between two questions whether there is work, and before the next try."""

import secrets
import time
from collections.abc import Callable

_BURDEN = 4.0  # times the duration of a question: the shortest pause after it


def jittered(seconds: float) -> float:
    """Return a time, a little longer or shorter, so that not all come at once."""
    return seconds * (0.75 + secrets.randbelow(501) / 1000)


class Pace:
    """Ask often after a message, ever less often while nothing comes.

    A pause is a share of the time since the last message: the next stage of a run, which comes
    within a second, is found at once; a merchant that waits for days asks seldom. It is never
    shorter than a few times what the last question took: a server with much to do is asked less.

    Args:
        shortest_s: The shortest pause.
        longest_s: The longest.
        share: Of the time that passed since the last message.
    """

    def __init__(
        self,
        longest_s: float,
        shortest_s: float = 0.15,
        share: float = 0.4,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bounds = (min(shortest_s, longest_s), longest_s)
        self._share = share
        self._clock = clock
        self._last: float | None = None
        self._least = 0.0

    def took(self, seconds: float) -> None:
        """Take how long the server needed for an answer."""
        self._least = seconds * _BURDEN

    def message(self) -> None:
        """A message came."""
        self._last = self._clock()

    def next(self) -> float:
        """Return how long to wait now."""
        shortest, longest = self._bounds
        if self._last is None:
            return jittered(max(longest, self._least))
        wanted = min(max((self._clock() - self._last) * self._share, shortest), longest)
        return jittered(max(wanted, self._least))


class Backoff:
    """Wait twice as long after each failure, up to a limit."""

    def __init__(self, first_s: float = 0.5, longest_s: float = 30.0) -> None:
        self._first, self._longest = first_s, longest_s
        self._failures = 0

    def reset(self) -> None:
        """It worked."""
        self._failures = 0

    def next(self) -> float:
        """Return how long to wait after one more failure."""
        seconds = min(self._first * 2.0 ** min(self._failures, 16), self._longest)
        self._failures += 1
        return jittered(seconds)
