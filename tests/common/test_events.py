"""Tests of privacy events: their documents, checks and merging."""

import doctest
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import common.events
from common.errors import AccountingError
from common.events import Event, GaussianSum, PoissonGaussianSum, check, from_document, merged
from common.events import to_document as document_of

sigmas = st.floats(0.1, 1e3)
events = st.one_of(
    st.builds(GaussianSum, sigmas, sigmas, st.integers(0, 99)),
    st.builds(PoissonGaussianSum, sigmas, sigmas, st.floats(0.01, 1), st.integers(0, 99)),
)


class Renamed(GaussianSum):
    """An event that somebody derived from one of ours: its meaning is not ours."""


def test_examples_hold() -> None:
    """The docstrings' examples are true."""
    assert doctest.testmod(common.events).failed == 0


class TestDocuments:
    """to_document and from_document."""

    @given(events)
    def test_round_trip(self, event: Event) -> None:
        """An event comes back from its document."""
        assert from_document(document_of(event)) == event

    def test_meaning_is_pinned(self) -> None:
        """The stored form is a promise: kinds and field names never change."""
        stored = {
            "kind": "poisson-gaussian-sum",
            "noise_multiplier": 2.0,
            "sensitivity": 1.0,
            "sampling_rate": 0.5,
            "count": 3,
        }
        assert document_of(PoissonGaussianSum(2.0, 1.0, 0.5, 3)) == stored

    def test_meaning_is_pinned_without_sampling(self) -> None:
        """The same promise for the other kind; and no kind may ever be removed."""
        stored = {
            "kind": "gaussian-sum",
            "noise_multiplier": 2.0,
            "sensitivity": 1.0,
            "count": 3,
        }
        assert document_of(GaussianSum(2.0, 1.0, 3)) == stored
        assert {"gaussian-sum", "poisson-gaussian-sum"} <= set(common.events._KINDS)

    @pytest.mark.parametrize(
        "document",
        [
            {},
            {"kind": "laplace", "noise_multiplier": 1.0, "sensitivity": 1.0},
            {"kind": ["gaussian-sum"]},
            {"kind": None},
            [],
            "gaussian-sum",
        ],
    )
    def test_unknown_kind(self, document: Any) -> None:
        """What is no known event is refused, whatever it is."""
        with pytest.raises(AccountingError, match="unknown privacy event"):
            from_document(document)

    @pytest.mark.parametrize(
        "fields",
        [
            {"noise_multiplier": 1.0},
            {"noise_multiplier": 1.0, "sensitivity": 1.0, "sampling_rate": 0.5},
            {"noise_multiplier": "1.0", "sensitivity": 1.0},
        ],
    )
    def test_other_fields(self, fields: dict[str, Any]) -> None:
        """A known kind with missing, further or mistyped fields is refused."""
        with pytest.raises(AccountingError, match="'gaussian-sum' has other fields"):
            from_document({"kind": "gaussian-sum", **fields})


class TestCheck:
    """check."""

    @pytest.mark.parametrize("name", ["noise_multiplier", "sensitivity"])
    @pytest.mark.parametrize("value", [0.0, -1.0, math.inf, -math.inf, math.nan])
    def test_numbers(self, name: str, value: float) -> None:
        """A number that is not finite and positive is refused by name."""
        numbers = {"noise_multiplier": 1.0, "sensitivity": 1.0, name: value}
        with pytest.raises(AccountingError, match=name):
            check(GaussianSum(**numbers))

    @pytest.mark.parametrize("count", [-1, 1.5, math.nan, 10**400, True, 3.0])
    def test_counts(self, count: Any) -> None:
        """A count that is not a whole number that floats can hold is refused."""
        with pytest.raises(AccountingError, match="whole count"):
            check(GaussianSum(1.0, 1.0, count))

    @pytest.mark.parametrize("name", ["noise_multiplier", "sensitivity"])
    @pytest.mark.parametrize("value", [True, 10**400])
    def test_no_floats(self, name: str, value: Any) -> None:
        """A truth value, and a whole number that no float holds, are refused by name."""
        numbers = {"noise_multiplier": 1.0, "sensitivity": 1.0, name: value}
        with pytest.raises(AccountingError, match=name):
            check(GaussianSum(**numbers))

    @pytest.mark.parametrize("event", [None, "gaussian-sum", Renamed(1.0, 1.0)], ids=repr)
    def test_unknown_event(self, event: Any) -> None:
        """What is no event, even if it looks like one, is refused by its name."""
        with pytest.raises(AccountingError, match=f"unknown privacy event {type(event).__name__}"):
            check(event)

    @pytest.mark.parametrize("rate", [0.0, -0.1, 1.0001, math.nan, math.inf])
    def test_rates(self, rate: float) -> None:
        """A sampling rate outside (0, 1] is refused."""
        with pytest.raises(AccountingError, match="sampling_rate"):
            check(PoissonGaussianSum(1.0, 1.0, rate))


class TestMerged:
    """merged."""

    @given(st.lists(events, max_size=8), st.randoms())
    def test_order_does_not_matter(self, some: list[Event], random: Any) -> None:
        """Any order of the same events merges to the same."""
        other = list(some)
        random.shuffle(other)
        assert merged(some) == merged(other)

    @given(st.lists(events, max_size=8), st.integers(0, 8))
    def test_grouping_does_not_matter(self, some: list[Event], cut: int) -> None:
        """Merging parts first changes nothing."""
        assert merged([*merged(some[:cut]), *merged(some[cut:])]) == merged(some)

    @given(st.lists(events, max_size=8))
    def test_counts_are_kept(self, some: list[Event]) -> None:
        """No application of a mechanism is lost."""
        assert sum(e.count for e in merged(some)) == sum(e.count for e in some)

    def test_numbers_become_floats(self) -> None:
        """The same event written with whole numbers merges to the same bytes, in any order."""
        both: list[Event] = [GaussianSum(2, 1), GaussianSum(2.0, 1.0)]
        assert repr(merged(both)) == repr(merged(both[::-1]))
        assert repr(merged(both[:1])) == repr(merged(both[1:]))

    def test_kinds_stay_apart(self) -> None:
        """A sampled event at rate 1 is not merged into one without sampling."""
        assert len(merged([GaussianSum(1.0, 1.0), PoissonGaussianSum(1.0, 1.0, 1.0)])) == 2
