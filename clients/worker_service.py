"""The worker: a process that alone holds rows, keys, ledger and the state of secure sums.

`python -m clients.worker_service FOLDER [--rehearsal]` opens the merchant in FOLDER and answers
messages on a Unix socket, FOLDER/run/worker.sock, which only its own user can reach. The main
thread opens the merchant and answers, one message at a time; other threads serve the socket, so
that a worker which is busy still says that it is well.
"""

import argparse
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from clients.flower_records import content_from_bytes, content_to_bytes
from clients.handling import answered
from clients.places import Places
from clients.worker_socket import bound
from common.errors import HansaError, PolicyError
from common.logs import set_up
from common.service_lock import locked
from common.worker_wire import (
    BUDGET,
    CHANNEL_OPTIONS,
    HANDLE,
    HEALTH,
    Answer,
    parse_request,
    reply_bytes,
)

if TYPE_CHECKING:
    from clients.joining import Opened

logger = logging.getLogger("hansa.worker")

_THREADS = 8
_WAITING = 4  # messages that wait at a time; threads are left over for questions after health
_GRACE_S = 1.0

Job = tuple[Callable[[], bytes], "Future[bytes]"]


class WorkerService:
    """Answers on a merchant's socket.

    Args:
        open_merchant: Reads the merchant's files; may take long.
    """

    def __init__(self, open_merchant: "Callable[[], Opened]") -> None:
        self._open = open_merchant
        self._opened: Opened | None = None
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._slots = threading.BoundedSemaphore(_WAITING)
        self._state, self._since = "opening", time.monotonic()
        self._spent: bytes | None = None  # until the next message

    def serve(self, server: grpc.Server) -> None:
        """Open the merchant and answer until `stop`; the caller's thread does all the work.

        Raises:
            HansaError: The merchant's files cannot be used.
        """
        server.add_generic_rpc_handlers((self._methods(),))
        server.start()
        try:
            self._opened = self._open()
            self._turn("ready")
            logger.info(
                "ready",
                extra={
                    "merchant": self._opened.worker.merchant,
                    "contract": self._opened.worker.contract.sha256,
                },
            )
            for job in iter(self._jobs.get, None):
                self._do(*job)
        finally:
            self._turn("stopping")
            self._cancel_waiting()
            server.stop(_GRACE_S).wait()

    def stop(self) -> None:
        """Have `serve` return after the message that is being answered; safe in a signal."""
        self._jobs.put(None)

    def _cancel_waiting(self) -> None:
        with suppress(queue.Empty):
            while True:
                left = self._jobs.get_nowait()
                if left is not None:
                    left[1].cancel()

    def _turn(self, state: str) -> None:
        self._state, self._since = state, time.monotonic()

    def _do(self, work: Callable[[], bytes], done: "Future[bytes]") -> None:
        if not done.set_running_or_notify_cancel():
            return
        self._turn("computing")
        try:
            done.set_result(work())
        except Exception as error:  # noqa: BLE001  # it is raised where the result is asked for
            done.set_exception(error)
        finally:
            self._turn("ready")

    def _methods(self) -> grpc.GenericRpcHandler:
        methods = {HANDLE: self._handle, HEALTH: self._health, BUDGET: self._budget}
        service = HANDLE.split("/")[1]
        return grpc.method_handlers_generic_handler(
            service,
            {
                path.rpartition("/")[2]: grpc.unary_unary_rpc_method_handler(method)
                for path, method in methods.items()
            },
        )

    def _queued(self, work: Callable[[], bytes], context: grpc.ServicerContext) -> bytes:
        """Have the main thread do something; return what came of it."""
        if self._state in {"opening", "stopping"}:
            context.abort(grpc.StatusCode.UNAVAILABLE, f"the worker is {self._state}")
        if not self._slots.acquire(blocking=False):
            context.abort(grpc.StatusCode.UNAVAILABLE, "too many messages wait already")
        try:
            done: Future[bytes] = Future()
            self._jobs.put((work, done))
            return done.result()
        except CancelledError:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the worker is stopping")
            raise
        finally:
            self._slots.release()

    def _handle(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        return self._queued(lambda: self._answer(request), context)

    def _answer(self, request: bytes) -> bytes:
        """Answer one message; log that, and nothing that is in it."""
        started, told, ids = time.monotonic(), Answer(b""), dict[str, Any]()
        self._spent = None

        def note(message: object) -> None:
            for name in ("run", "round", "stage", "attempt", "session", "step"):
                value = getattr(message, name, None)
                if value is not None:
                    ids[name] = value

        try:
            kind, encoded = parse_request(request)
            ids["type"] = kind[:64]
            content = content_from_bytes(encoded)
            reply = answered(self._worker, kind, content, note)
            told = Answer(content_to_bytes(reply))
        except (HansaError, ValueError) as error:  # the latter where it is no request at all
            told = Answer(b"", str(error))
        outcome = "answer" if told.error is None else "error"
        ids |= {"outcome": outcome, "ms": round((time.monotonic() - started) * 1000, 1)}
        ids |= {"bytes_in": len(request), "bytes_out": len(told.content)}
        logger.info(told.error or "answered", extra=ids)
        return reply_bytes(told)

    def _worker(self) -> Any:
        assert self._opened is not None  # noqa: S101  # nothing is queued before
        return self._opened.worker

    def _health(self, _request: bytes, _context: grpc.ServicerContext) -> bytes:
        found: dict[str, Any] = {
            "state": self._state,
            "since_s": round(time.monotonic() - self._since, 3),
            "pid": os.getpid(),
        }
        if self._opened is not None:
            found["merchant"] = self._opened.worker.merchant
            found["contract"] = self._opened.worker.contract.sha256
        return json.dumps(found).encode()

    def _budget(self, _request: bytes, context: grpc.ServicerContext) -> bytes:
        return self._spent or self._queued(self._reckon, context)

    def _reckon(self) -> bytes:
        """Return what the ledger adds up to; nothing else about customers."""
        if self._spent is None:
            account = self._worker().ledger.account()
            budget = account.budget
            found = {"epsilon": account.spent(), "cap": budget.epsilon, "delta": budget.delta}
            self._spent = json.dumps(found).encode()
        return self._spent


def opened_for_a_run(path: Path, *, rehearsal: bool) -> "Opened":
    """Open a merchant for real runs.

    Raises:
        PolicyError: Its noise is seeded and this is no rehearsal.
        HansaError: Its files cannot be used.
    """
    from clients.joining import open_worker
    from clients.merchant import read_merchant

    if read_merchant(path).simulation.seed is not None and not rehearsal:
        raise PolicyError(
            f"{path}: simulation.seed makes the noise guessable; remove it to take part in a run "
            "(or rehearse, with customers that nobody has to protect: --rehearsal)"
        )
    opened = open_worker(path)
    opened.worker.get_going()
    return opened


def main() -> int:
    """Serve until a signal comes; return the exit status."""
    parser = argparse.ArgumentParser(prog="clients.worker_service")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rehearsal", action="store_true")
    parser.add_argument("--socket-user", default=None)
    options = parser.parse_args()
    os.umask(0o077)  # a ledger, or a sealed session, is nobody else's
    set_up("worker")
    places = Places.of(options.folder)
    service = WorkerService(lambda: opened_for_a_run(places.merchant, rehearsal=options.rehearsal))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: service.stop())
    server = grpc.server(ThreadPoolExecutor(_THREADS), options=CHANNEL_OPTIONS)
    try:
        with locked(places.run, "worker.lock"), bound(server, places.socket, options.socket_user):
            service.serve(server)
    except HansaError as error:
        logger.critical("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
