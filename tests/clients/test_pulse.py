"""Tests of what a node says of itself."""

import os
import time
from pathlib import Path

import pytest

from clients.pulse import Pulse, is_alive, read_pulse
from common.errors import ServiceError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give where the file is."""
    return tmp_path / "node.alive"


def test_states(path: Path) -> None:
    """A state is told once, and read back."""
    pulse = Pulse(path, frozenset())
    assert pulse.tell("disconnected", "no network") is True
    assert pulse.tell("disconnected", "no network") is False
    found = read_pulse(path)
    assert (found["state"], found["reason"], found["pid"]) == (
        "disconnected", "no network", os.getpid(),
    )  # fmt: skip
    assert path.stat().st_mode & 0o777 == 0o600
    pulse.close()


def test_a_short_record_covers_a_long_one(path: Path) -> None:
    """The file is overwritten in place, and is JSON at every time."""
    pulse = Pulse(path, frozenset())
    pulse.tell("disconnected", "x" * 3000)
    pulse.tell("connected")
    assert read_pulse(path)["reason"] == ""
    pulse.tell("disconnected", "y" * 9000)
    assert read_pulse(path)["state"] == "disconnected"
    pulse.close()


def test_counts(path: Path) -> None:
    """Messages are counted by type and outcome; invented types together."""
    pulse = Pulse(path, frozenset({"query.attest"}))
    pulse.count("query.attest", "answer", 0.5)
    pulse.count("query.attest", "answer", 0.25)
    pulse.count("query.invented", "error", 1.0)
    pulse.count("query.another", "error", 1.0)
    found = read_pulse(path)
    assert found["messages"] == {"query.attest": {"answer": 2}, "other": {"error": 2}}
    assert found["seconds"] == {"query.attest": 0.75, "other": 2.0}
    pulse.close()


def test_what_the_server_called_it_is_kept(path: Path) -> None:
    """A node that is started again knows its number, so that it can tell revoked from taken."""
    first = Pulse(path, frozenset())
    first.known_as(7, b"public")
    first.close()
    second = Pulse(path, frozenset())
    assert second.record["node_id"] == 7
    second.close()


def test_alive(path: Path) -> None:
    """The file's time tells; none is no sign of life."""
    assert not is_alive(path)
    pulse = Pulse(path, frozenset())
    assert is_alive(path)
    old = time.time() - 60
    os.utime(path, (old, old))
    assert not is_alive(path)
    pulse.touch()
    assert is_alive(path)
    pulse.close()


def test_nowhere_to_write(tmp_path: Path) -> None:
    """A folder that is not there is said."""
    with pytest.raises(ServiceError, match="cannot be written"):
        Pulse(tmp_path / "none" / "node.alive", frozenset())


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_damaged(path: Path, content: str) -> None:
    """A file that says nothing is as none."""
    path.write_text(content)
    assert read_pulse(path) == {}
