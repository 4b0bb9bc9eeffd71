"""A Flower `Grid` that outlives a SuperLink: what fails on the way there is tried again.

Flower's own retry gives up where the error speaks of TLS, which is how a SuperLink looks that is
killed in the middle of a handshake. It gives up as well where a busy SuperLink did not store a
part of a message: its database was locked for too long, or it had stored the part and the answer
was lost. And it waits for three minutes, for everybody, where one node was lost between announcing
a reply and handing in its parts.
"""

import logging
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

import httpx
from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError, pull_objects
from flwr.superlink.grid import http_grid

from common.errors import RunError

logger = logging.getLogger("hansa.coordinator")

_LONGEST_S, _FIRST_PAUSE_S, _LONGEST_PAUSE_S = 180.0, 0.2, 5.0
_PARTS_S = 8.0  # to wait for the parts of a reply; then it counts as lost, and is asked for again
T = TypeVar("T")


class PatientGrid:
    """The part of `Grid` that a coordinator uses, tried again while the SuperLink is away.

    Args:
        grid: Flower's.
        on_wait: Called before each further try; what it raises ends the waiting.
    """

    def __init__(self, grid: Grid, on_wait: Callable[[], object]) -> None:
        self._grid = grid
        self._on_wait = on_wait
        # the only way to say so in Flower 1.41: its grid takes no time limit
        bounded = partial(pull_objects, max_time=_PARTS_S, initial_backoff=0.1, backoff_cap=1.0)
        vars(http_grid)["pull_objects"] = bounded

    def get_node_ids(self) -> list[int]:
        """Return the nodes that are connected."""
        return self._again(lambda: list(self._grid.get_node_ids()))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages; one may arrive twice, which merchants answer with the same bytes."""
        sent = list(messages)
        return self._again(lambda: list(self._grid.push_messages(sent)))

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that are there."""
        asked = list(message_ids)
        return self._again(lambda: list(self._grid.pull_messages(asked)))

    def _again(self, call: Callable[[], T]) -> T:
        end, pause = time.monotonic() + _LONGEST_S, _FIRST_PAUSE_S
        while True:
            try:
                return call()
            except (httpx.HTTPError, OSError, ObjectPushError) as error:
                if not _passes(error):
                    raise
                if time.monotonic() > end:
                    raise RunError(
                        f"the SuperLink did not do its part for {_LONGEST_S:g} s ({error}); go on "
                        "with hansa server resume when it is back"
                    ) from None
                logger.warning("the SuperLink did not do its part (%s)", type(error).__name__)
            self._on_wait()
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)


def _passes(error: Exception) -> bool:
    """Tell whether an error may pass: not one that says no."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= 500
    return True
