"""Tests of how long a node waits."""

import pytest

from clients.pace import Backoff, Pace


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.at


class TestPace:
    """Pauses between questions."""

    def test_often_after_a_message_ever_less_often_then(self) -> None:
        """Pauses grow with the time that nothing came, up to the longest."""
        clock = Clock()
        pace = Pace(2.0, clock=clock)
        pace.message()
        found = []
        for clock.at in (0.1, 1.0, 3.0, 1000.0):
            found.append(pace.next())
        low, high = 0.75, 1.251
        for pause, expected in zip(found, (0.15, 0.4, 1.2, 2.0), strict=True):
            assert expected * low <= pause <= expected * high

    def test_nothing_came_yet(self) -> None:
        """A node that has just logged in is in no hurry."""
        assert Pace(2.0).next() >= 1.5

    def test_a_slow_server_is_asked_less(self) -> None:
        """A pause is a few times what the last question took."""
        pace = Pace(2.0)
        pace.message()
        pace.took(3.0)
        assert pace.next() >= 9.0

    def test_the_longest_is_never_passed(self) -> None:
        """A longest pause below the shortest wins."""
        pace = Pace(0.1)
        pace.message()
        assert pace.next() <= 0.13


class TestBackoff:
    """Pauses after failures."""

    def test_doubles_up_to_a_limit(self) -> None:
        """Each pause is about twice the one before."""
        backoff = Backoff(0.5, 8.0)
        found = [backoff.next() for _ in range(40)]
        for pause, expected in zip(found, [0.5, 1, 2, 4, 8, 8], strict=False):
            assert expected * 0.75 <= pause <= expected * 1.251

    def test_reset(self) -> None:
        """Success makes it short again."""
        backoff = Backoff(1.0)
        for _ in range(5):
            backoff.next()
        backoff.reset()
        assert backoff.next() <= 1.251

    @pytest.mark.parametrize("count", [10, 2000])
    def test_for_ever(self, count: int) -> None:
        """It never ends, nor overflows."""
        backoff = Backoff()
        assert max(backoff.next() for _ in range(count)) <= 30 * 1.251
