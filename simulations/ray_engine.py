"""The engine `ray`: Flower's own simulation engine, on this machine or on a cluster of Ray's.

The coordinator runs in a thread of this process; Flower carries its messages to actors of Ray.
Any actor may answer any message of any merchant. So what a merchant keeps from one message to
the next lies in files, its ledger and its half of a session, and each actor makes the workers
anew that it needs. Rows and keys reach the actors through Ray's object store.
"""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp

from clients.app import create_app
from clients.worker import Worker
from common.errors import ContractError, RunError
from server.services import FLOWER_ENVIRONMENT
from simulations.engines import ENDED
from simulations.grid import FIRST_NODE, error_reply
from simulations.interrupts import deaf_to_interrupts

if TYPE_CHECKING:
    from ray import ObjectRef

_ENVIRONMENT = {**FLOWER_ENVIRONMENT, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}  # a warning less
_RESOURCES = {"num_cpus": 1, "num_gpus": 0.0}  # of an actor
_KNOCK_S = 5.0  # for a cluster to answer
_LOOK_S = 0.05  # between two looks for Flower's nodes
_ENDING_S = 60.0  # for the coordinator to notice that the engine ended
_MOST_WORKERS = 256  # that an actor keeps

Make = Callable[[], Worker]


def refuse_without_ray(processes: int) -> None:
    """Refuse what cannot run, before anything is written.

    Args:
        processes: How many the user wants; 0 for one a processor.

    Raises:
        ContractError: Ray is not installed, or a cluster decides on its processes by itself.
        RunError: The cluster at RAY_ADDRESS does not answer.
    """
    if find_spec("ray") is None:
        raise ContractError("--engine ray needs Ray; install it with: pip install 'hansa[ray]'")
    address = _cluster()
    if processes and address:
        raise ContractError(
            f"--processes: the cluster at RAY_ADDRESS={address} has one a processor; "
            "leave it out, or unset RAY_ADDRESS"
        )
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        _check_answers(host, int(port))  # Ray itself tries for minutes


def _check_answers(host: str, port: int) -> None:
    try:
        socket.create_connection((host.strip("[]"), port), _KNOCK_S).close()
    except (OSError, OverflowError) as error:
        raise RunError(f"RAY_ADDRESS: nobody answers at {host}:{port} ({error})") from None


def _cluster() -> str:
    """Return the address of a running cluster; empty for a Ray of our own."""
    address = os.environ.get("RAY_ADDRESS", "")
    return "" if address == "local" else address


def run_in_ray(
    server_app: ServerApp, merchants: Sequence[Make], run_config: dict[str, Any], processes: int
) -> None:
    """Run a ServerApp against merchants in Ray's actors to its end; end Ray, too.

    Ctrl-C ends it when the messages under way are answered; until then it is not heard again.

    Args:
        server_app: The coordinator.
        merchants: What makes the worker of each; picklable.
        run_config: Run configuration of the ServerApp.
        processes: Actors of a Ray of our own, at least 1; 0 for one a processor.

    Raises:
        ContractError: As `refuse_without_ray`.
        RunError: Ray cannot be reached or started, or an actor ended by itself.
        Exception: What the ServerApp raised.
    """
    refuse_without_ray(processes)
    coordinator = _Coordinator(server_app, len(merchants), run_config)
    with _ray(min(processes or len(os.sched_getaffinity(0)), len(merchants))), _silent_flower():
        import ray
        from flwr.simulation import run_simulation

        clients = _Clients(ray.put(list(merchants)))
        # In a thread of its own: interrupted in this one, Flower ends Ray while its threads wait
        # for replies, and they wait on, and the process with them.
        pool = ThreadPoolExecutor(1, "flower")
        try:
            pool.submit(
                run_simulation,
                coordinator.app,
                clients,
                len(merchants),
                backend_config={"client_resources": _RESOURCES},  # type: ignore[dict-item]
            ).result()
        except Exception as error:
            raise RunError(f"Flower's engine failed: {_reason(error)}") from error
        finally:
            with deaf_to_interrupts():  # a second one would end Ray too early after all
                coordinator.end()
                pool.shutdown()
    coordinator.raise_failure()


class _Coordinator:
    """The ServerApp in a thread of Flower's, which would run on when the engine has ended."""

    def __init__(self, server_app: ServerApp, nodes: int, run_config: dict[str, Any]) -> None:
        self.app = ServerApp()
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._failures: list[Exception] = []

        @self.app.main()
        def main(grid: Grid, context: Context) -> None:
            self._threads.append(threading.current_thread())
            own = Context(context.run_id, context.node_id, {}, RecordDict(), dict(run_config))
            try:
                server_app(grid=_NumberedGrid(grid, nodes, self._over), context=own)  # type: ignore[arg-type]
            except Exception as error:  # noqa: BLE001  # raised again in the main thread
                self._failures.append(error)

    def end(self) -> None:
        """Let the ServerApp fail at its next message, and wait until it has."""
        self._over.set()
        for thread in self._threads:
            thread.join(_ENDING_S)

    def raise_failure(self) -> None:
        """Raise what the ServerApp raised, if anything."""
        if self._failures:
            raise self._failures[0]


class _NumberedGrid:
    """Flower's grid with nodes numbered as everywhere else, node k for the k-th merchant.

    Flower numbers its nodes by chance. Which merchant a message is for stands in its group.
    """

    def __init__(self, grid: Grid, nodes: int, over: threading.Event) -> None:
        self._grid = grid
        self._over = over
        self._nodes = self._registered(nodes)

    def _registered(self, nodes: int) -> list[int]:
        """Wait for Flower to have registered all nodes: it starts the ServerApp before."""
        while len(found := sorted(self._grid.get_node_ids())) < nodes:
            self._check()
            time.sleep(_LOOK_S)
        return found

    def _check(self) -> None:
        if self._over.is_set():
            raise RunError("Flower's engine ended before the run")

    def get_node_ids(self) -> Iterable[int]:
        """Return the numbers of all nodes."""
        return range(FIRST_NODE, FIRST_NODE + len(self._nodes))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages, each to its merchant."""
        self._check()
        return self._grid.push_messages([self._addressed(message) for message in messages])

    def _addressed(self, message: Message) -> Message:
        number = message.metadata.dst_node_id - FIRST_NODE
        message.metadata.group_id = str(number)
        message.metadata.dst_node_id = self._nodes[number]
        return message

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there.

        Raises:
            RunError: The engine ended, or could not have a merchant answer.
        """
        self._check()
        replies = list(self._grid.pull_messages(message_ids))
        for reply in replies:
            if reply.has_error() and reply.error.code == ErrorCode.UNKNOWN:
                reason = reply.error.reason or ""
                died = "ActorDiedError" in reason or "OutOfMemoryError" in reason
                raise RunError(ENDED if died else f"Ray failed: {_last_line(reason)}")
        return replies


class _Clients(ClientApp):
    """The ClientApp of every merchant, told by a message's group; what an actor gets of us."""

    def __init__(self, merchants: "ObjectRef[list[Make]]") -> None:
        super().__init__()
        self._merchants = merchants

    def __call__(self, message: Message, context: Context) -> Message:
        """Return the merchant's reply, or the error reply that other engines give."""
        logging.getLogger("flwr").setLevel(logging.ERROR)
        found: list[Worker] = []

        def find(_context: Context) -> Worker:
            found.append(_worker(self._merchants, int(message.metadata.group_id)))
            return found[-1]

        try:
            return create_app(find)(message, context)
        except Exception as error:  # noqa: BLE001  # what a SuperNode does with any exception
            return error_reply(message, error)
        finally:
            for worker in found:
                # SQLite's log is for processes of one machine at a time, and another one may
                # answer the next message
                worker.ledger.close()


@lru_cache(maxsize=_MOST_WORKERS)
def _worker(merchants: "ObjectRef[list[Make]]", number: int) -> Worker:
    return _makers(merchants)[number]()


@lru_cache(maxsize=1)
def _makers(merchants: "ObjectRef[list[Make]]") -> list[Make]:
    import ray

    return ray.get(merchants)


@contextmanager
def _ray(processes: int) -> Iterator[None]:
    """Start a Ray of our own, or join the cluster at RAY_ADDRESS; leave nothing behind.

    Raises:
        RunError: It cannot be started or joined.
    """
    os.environ.update(_ENVIRONMENT)
    import ray

    address, cpus = (_cluster(), None) if _cluster() else ("local", processes)
    handler = signal.getsignal(signal.SIGTERM)  # Ray's own aborts with a dump
    try:
        try:
            ray.init(
                address,
                num_cpus=cpus,
                include_dashboard=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": {"PYTHONPATH": _code()}},
            )
        except Exception as error:
            raise RunError(f"Ray cannot be used: {_reason(error)}") from error
        finally:
            signal.signal(signal.SIGTERM, handler)
        yield
    finally:
        ray.shutdown()


def _code() -> str:
    """Return where this process finds its code: actors must run the same, wherever they start."""
    return os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)


@contextmanager
def _silent_flower() -> Iterator[None]:
    """Keep Flower's own remarks off the terminal, and Flower from calling home."""
    from flwr.supercore import telemetry

    telemetry.FLWR_TELEMETRY_ENABLED = "0"  # the environment was read when Flower was imported
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """Return what went wrong at the bottom: Flower's engine wraps exceptions twice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return _last_line(f"{type(error).__name__}: {error}")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no reason given"
