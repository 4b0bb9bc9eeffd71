"""The way to a merchant's worker, for its node and its supervisor; light."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from common.worker_wire import (
    BUDGET,
    CHANNEL_OPTIONS,
    HANDLE,
    HEALTH,
    UNAVAILABLE,
    Answer,
    address_of,
    parse_reply,
    request_bytes,
)

_HEALTH_S = 5.0
_BUDGET_S = 20.0
_PAUSE_S = 0.3
_LOSSES = 3  # a message in which the worker ended so often is not given to it again

if TYPE_CHECKING:
    Method = grpc.UnaryUnaryMultiCallable[bytes, bytes]


class WorkerLink:
    """Speaks to the worker behind a socket, whether or not one is there now.

    Args:
        socket: The worker's socket.
        patience_s: How long to wait for a worker that cannot be reached.
    """

    def __init__(self, socket: Path, patience_s: float = 30.0) -> None:
        self._patience_s = patience_s
        self._channel = grpc.insecure_channel(address_of(str(socket)), options=CHANNEL_OPTIONS)
        self._handle: Method = self._channel.unary_unary(HANDLE)
        self._health: Method = self._channel.unary_unary(HEALTH)
        self._budget: Method = self._channel.unary_unary(BUDGET)

    def health(self, timeout_s: float = _HEALTH_S) -> dict[str, Any] | None:
        """Return what the worker says of itself; None where it does not answer."""
        return _asked(self._health, timeout_s)

    def budget(self) -> dict[str, Any] | None:
        """Return what its ledger adds up to; None where it does not answer."""
        return _asked(self._budget, _BUDGET_S)

    def ask(
        self, kind: str, content: bytes, timeout_s: float, waiting: Callable[[], bool]
    ) -> Answer:
        """Return the worker's answer to a message.

        A worker that is being started again is waited for. An error that starts with
        `UNAVAILABLE` says that there was no answer; the message may be sent again.

        Args:
            kind: The message's type.
            content: What it holds.
            timeout_s: For all of it.
            waiting: Called several times a second; whether to go on waiting.
        """
        end, losses = time.monotonic() + timeout_s, 0
        why = "it did not answer in time"
        while losses < _LOSSES and time.monotonic() < end:
            if not self._reachable(end, waiting):
                return Answer(b"", f"{UNAVAILABLE}: it cannot be reached")
            call = self._handle.future(request_bytes(kind, content), timeout=end - time.monotonic())
            while not _is_done(call):
                if not waiting():
                    call.cancel()
                    return Answer(b"", f"{UNAVAILABLE}: this merchant is leaving")
            if call.code() is grpc.StatusCode.OK:
                return parse_reply(call.result())
            if call.code() is not grpc.StatusCode.UNAVAILABLE:
                break
            losses, why = losses + 1, "it ended while it answered"
        return Answer(b"", f"{UNAVAILABLE}: {why}")

    def _reachable(self, end: float, waiting: Callable[[], bool]) -> bool:
        """Wait until the worker is ready to answer, but no longer than is allowed."""
        end = min(end, time.monotonic() + self._patience_s)
        while True:
            found = self.health(min(_HEALTH_S, max(end - time.monotonic(), 0.1)))
            if found is not None and found["state"] in {"ready", "computing"}:
                return True
            if time.monotonic() > end or not waiting():
                return False
            time.sleep(_PAUSE_S)

    def close(self) -> None:
        """Give the connection back."""
        self._channel.close()


def _is_done(call: "grpc.Future[bytes]") -> bool:
    """Wait a little for a call; tell whether it has ended, however it did."""
    try:
        call.exception(timeout=_PAUSE_S)
    except grpc.FutureTimeoutError:
        return False
    except grpc.FutureCancelledError:
        return True
    return True


def _asked(method: "Method", timeout_s: float) -> dict[str, Any] | None:
    try:
        found = json.loads(method(b"", timeout=timeout_s))
    except (grpc.RpcError, ValueError):
        return None  # it is not there, or is no worker: what to do about it is the caller's
    return found if isinstance(found, dict) else None
