"""How the merchants of a simulation compute: all at once, or divided over processes.

`simulations.ray_engine` has the third engine, which carries the messages too. All engines carry
the same messages to the same workers, and with the same seed end in the same bytes: only where
matrix products are computed, and how many at once, is different.
"""

import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Literal

from flwr.app import RecordDict

from clients.flower_records import content_from_bytes, content_to_bytes
from clients.handling import answered_together
from clients.worker import Worker
from common.errors import RunError

Engine = Literal["cohort", "process", "ray"]
ENDED = (
    "a process of the simulation ended by itself; is there enough memory? (fewer with --processes)"
)


@dataclass(frozen=True)
class Computing:
    """An engine, and how many processes it may start (0: one a processor)."""

    engine: Engine = "cohort"
    processes: int = 0


COHORT = Computing()

# (message type, number of each merchant and what it is asked) -> what gives its answer or raises
Answers = Callable[[str, Sequence[tuple[int, RecordDict]]], list[Callable[[], RecordDict]]]


@contextmanager
def running(engine: Engine, workers: Sequence[Worker], processes: int) -> Iterator[Answers]:
    """Have merchants ready to answer.

    Args:
        engine: `cohort`: all in this process, a stage of everybody one computation. `process`:
            the same in several processes, each with some of the merchants. `ray` is not here.
        workers: One a merchant.
        processes: How many, at least 1; 0 for one a processor.

    Raises:
        RunError: When one of several processes ends by itself.
    """
    if engine == "cohort":
        yield lambda kind, asked: answered_together(kind, [(workers[k], c) for k, c in asked])
        return
    pool = _Pool(workers, processes or len(os.sched_getaffinity(0)))
    try:
        yield pool.answers
    finally:
        pool.close()


class _Pool:
    """Processes that were forked with all workers in memory; each answers for some."""

    def __init__(self, workers: Sequence[Worker], processes: int) -> None:
        for worker in workers:
            worker.ledger.close()  # SQLite's connections must not be taken along
        context = multiprocessing.get_context("fork")
        self._children = []
        self._ends: list[Connection] = []
        for _ in range(min(processes, len(workers))):
            ours, theirs = context.Pipe()
            child = context.Process(target=_serve, args=(theirs, workers), daemon=True)
            child.start()
            theirs.close()
            self._children.append(child)
            self._ends.append(ours)

    def answers(
        self, kind: str, asked: Sequence[tuple[int, RecordDict]]
    ) -> list[Callable[[], RecordDict]]:
        """Divide what is asked, let all processes work, and put their answers in order."""
        shares: list[list[int]] = [[] for _ in self._ends]
        for place, (merchant, _) in enumerate(asked):
            shares[merchant % len(self._ends)].append(place)
        found: dict[int, bytes | Exception] = {}
        try:
            for end, share in zip(self._ends, shares, strict=True):
                if share:
                    end.send((kind, [(asked[k][0], content_to_bytes(asked[k][1])) for k in share]))
            for end, share in zip(self._ends, shares, strict=True):
                if share:
                    found |= zip(share, end.recv(), strict=True)
        except (EOFError, OSError) as error:
            raise RunError(ENDED) from error
        return [_given(found[place]) for place in range(len(asked))]

    def close(self) -> None:
        """End all processes."""
        for end in self._ends:
            with suppress(OSError):  # it may have ended by itself
                end.send(None)
            end.close()
        for child in self._children:
            child.join(timeout=5)
            if child.is_alive():
                child.terminate()
                child.join()


def _serve(end: Connection, workers: Sequence[Worker]) -> None:
    """Answer until there is nothing more to answer."""
    while True:
        try:
            message = end.recv()
        except (EOFError, OSError, KeyboardInterrupt):
            break
        if message is None:
            break
        kind, asked = message
        given = answered_together(
            kind, [(workers[k], content_from_bytes(content)) for k, content in asked]
        )
        end.send([_sendable(give) for give in given])
    for worker in workers:
        worker.ledger.close()


def _sendable(give: Callable[[], RecordDict]) -> bytes | Exception:
    try:
        return content_to_bytes(give())
    except Exception as error:  # noqa: BLE001  # raised again at the other end
        try:
            pickle.loads(pickle.dumps(error))  # noqa: S301  # our own
        except Exception:  # noqa: BLE001  # of whatever kind
            return RunError(f"{type(error).__name__}: {error}")
        return error


def _given(answer: bytes | Exception) -> Callable[[], RecordDict]:
    def give() -> RecordDict:
        if isinstance(answer, Exception):
            raise answer
        return content_from_bytes(answer)

    return give
