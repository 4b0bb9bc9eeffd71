"""What a busy SuperLink fails at is asked for again; what it refuses is not."""

from collections.abc import Iterable
from typing import Any

import httpx
import pytest
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from common.errors import RunError
from server import patient_grid
from server.patient_grid import PatientGrid

_REQUEST = httpx.Request("POST", "https://127.0.0.1/v1/runtime/push")


class Troubled:
    """A grid that fails in a given way, so many times, and works from then on."""

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.left = error, times
        self.pushed: list[list[Any]] = []

    def push_messages(self, messages: Iterable[Any]) -> list[str]:
        """Fail, or say that all were sent."""
        self.pushed.append(list(messages))
        if self.left:
            self.left -= 1
            raise self.error
        return ["id"]


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patient_grid, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(patient_grid, "_LONGEST_PAUSE_S", 0.001)
    # Flower's function is bounded for the whole process; put back after the test
    monkeypatch.setattr(patient_grid.http_grid, "pull_objects", patient_grid.pull_objects)


def _refusal(status: int) -> httpx.HTTPStatusError:
    return httpx.HTTPStatusError("no", request=_REQUEST, response=httpx.Response(status))


@pytest.mark.parametrize(
    "error",
    [
        ObjectPushError("object", 7, "session"),
        httpx.ConnectError("nobody there"),
        ConnectionResetError("reset"),
        _refusal(503),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_failure_that_may_pass_is_tried_again(error: Exception) -> None:
    """With the same messages each time, and a look at whether the run was stopped between."""
    grid, looks = Troubled(error, 2), []
    assert PatientGrid(grid, lambda: looks.append(1)).push_messages(iter(["a", "b"])) == ["id"]  # type: ignore[arg-type]
    assert grid.pushed == [["a", "b"]] * 3
    assert len(looks) == 2


def test_a_refusal_is_not_tried_again() -> None:
    """What says no says it the second time too."""
    grid = Troubled(_refusal(403), 1)
    with pytest.raises(httpx.HTTPStatusError):
        PatientGrid(grid, lambda: None).push_messages(["a"])  # type: ignore[arg-type]
    assert len(grid.pushed) == 1


def test_it_gives_up_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a word on how to go on."""
    monkeypatch.setattr(patient_grid, "_LONGEST_S", 0.0)
    grid = Troubled(ObjectPushError("object", 7, "session"), 9)
    with pytest.raises(RunError, match="hansa server resume"):
        PatientGrid(grid, lambda: None).push_messages(["a"])  # type: ignore[arg-type]
