"""Tests of the run store with real processes that are killed, or sleep through a take-over."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy.engine import Connection

from common.errors import ArchiveError
from server.runs import RunLease, RunStore
from tests.postgres import Postgres, database_url, postgres, running_postgres
from tests.server.run_writer import body_of, number_of

__all__ = ["database_url", "postgres"]  # fixtures

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.slow


@contextmanager
def writer(url: str, how: str) -> Iterator["subprocess.Popen[str]"]:
    """Give a process that saves checkpoints."""
    command = [sys.executable, "-m", "tests.server.run_writer", url, "run-1", how]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def saved(process: "subprocess.Popen[str]") -> int:
    """Return the number of the next checkpoint that the process says it saved."""
    assert process.stdout is not None
    word, number = process.stdout.readline().split()
    assert word == "saved"
    return int(number)


def rest_of(process: "subprocess.Popen[str]") -> str:
    """Return what else a process says until it ends.

    Not by `communicate`, which passes over what `readline` has fetched and not returned yet.
    """
    assert process.stdout is not None
    rest = process.stdout.read()
    process.wait(timeout=60)
    return rest


def take_over(url: str) -> RunLease:
    """Take the run over, at a time when a silent process counts as dead."""
    return RunStore(url, lambda: time.time() + 7200).resume("run-1", "79")


def put_to_sleep(process: "subprocess.Popen[str]", url: str) -> RunLease:
    """Stop a process and take its run over.

    If it sleeps inside a transaction, SQLite's file stays locked: then it sleeps a bit later.
    PostgreSQL ends such a transaction.
    """
    for _ in range(100):
        saved(process)
        process.send_signal(signal.SIGSTOP)
        try:
            return take_over(f"{url}?timeout=0.2" if url.startswith("sqlite") else url)
        except ArchiveError as error:
            if "is locked" not in str(error):
                raise
        process.send_signal(signal.SIGCONT)
    raise AssertionError("it never slept between two transactions")


def test_killed_while_it_saves(database_url: str) -> None:
    """However often a process is killed, the last checkpoint is whole and was saved."""
    generator = np.random.default_rng(5)
    told = 0
    for attempt in range(10):
        with writer(database_url, "resume" if attempt else "begin") as process:
            for _ in range(generator.integers(1, 20)):
                told = saved(process)
            time.sleep(generator.uniform(0, 0.03))
            process.send_signal(signal.SIGKILL)
            rest = rest_of(process)
        told = max([told, *(int(line.split()[1]) for line in rest.splitlines())])
        lease = take_over(database_url)
        number = number_of(lease.checkpoint)
        assert lease.checkpoint == body_of(number)
        assert number in {told, told + 1}  # the last one may have been saved and not told
        row = RunStore(database_url).row("run-1")
        assert (row.round, row.epsilon) == (number, number / 8)
        lease.fail("was killed")


def test_sleeper_wakes_up_after_a_take_over(database_url: str) -> None:
    """A process that slept while another took its run over writes no more and says why."""
    with writer(database_url, "begin") as process:
        lease = put_to_sleep(process, database_url)
        mine = number_of(lease.checkpoint) + 1000
        lease.save(body_of(mine), round=mine, epsilon=1.0, cohort=5)
        process.send_signal(signal.SIGCONT)
        rest = rest_of(process)
    assert "run run-1: was taken over by another process (epoch 2, this one has 1)" in rest
    assert RunStore(database_url).row("run-1").round == mine
    lease.stop("has seen enough")
    assert take_over(database_url).checkpoint == body_of(mine)


def test_sleeper_inside_a_transaction(postgres: Postgres) -> None:
    """A process that sleeps with the run's row locked does not keep others from taking it over."""
    url = postgres.new_database()
    lease = RunStore(url).begin("run-1", "c0ffee", 3, "77")
    asleep, awake = threading.Event(), threading.Event()
    told: list[str] = []

    def sleep(connection: Connection) -> None:
        lease._change(connection, round=1)
        asleep.set()
        awake.wait()
        lease._change(connection, round=1)

    def work() -> None:
        try:
            lease._database.write_patiently(sleep)
        except ArchiveError as error:
            told.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        asleep.wait()
        assert take_over(url).epoch == 2
    finally:
        awake.set()
        thread.join()
    assert "was taken over by another process" in told[0]
    assert RunStore(url).row("run-1").round == 0


def test_database_server_crashes() -> None:
    """A run outlives crashes of the database server, and loses nothing that was saved."""
    with running_postgres() as cluster:
        url = cluster.new_database()
        with writer(url, "begin") as process:
            for _ in range(3):
                for _ in range(5):
                    saved(process)
                cluster.stop("immediate")
                cluster.start()
            told = [saved(process) for _ in range(5)][-1]
            process.kill()
            rest = rest_of(process)
        told = max([told, *(int(line.split()[1]) for line in rest.splitlines())])
        checkpoint = take_over(url).checkpoint
        number = number_of(checkpoint)
        assert checkpoint == body_of(number)
        assert number in {told, told + 1}
