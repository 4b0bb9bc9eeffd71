"""Tests of what entries add up to, folded from documents as a ledger holds them."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.accounting import covers, epsilon
from common.budget import WHOLE_RUN, Account, Budget, Charge, RunAccount
from common.errors import AccountingError
from common.events import Event, GaussianSum, PoissonGaussianSum
from tests.ledgers import BUDGET, CONTRACT, DELTA, OTHER_CONTRACT, charge, charge_of, occasion

LARGE = charge(5.0)  # epsilon 0.72: one fits the cap, two do not


def reservation(run: str, *charges: Charge, at: float = 0.0) -> dict[str, Any]:
    """Return the entry that reserves a run."""
    return {
        "kind": "reserve",
        "at": at,
        "run": run,
        "contract": CONTRACT,
        "releases": [one.document for one in charges],
        "last": ["profile", 9],
    }


def released(run: str, number: int, cost: Charge, stage: str = "update") -> dict[str, Any]:
    """Return the entry of a release."""
    what = {"stage": stage, "round": number, "attempt": 0, "contract": CONTRACT}
    return {"kind": "release", "at": 0.0, "run": run, **cost.document, **what, "step": ""}


def note(kind: str, run: str, at: float = 0.0) -> dict[str, Any]:
    """Return an entry that holds nothing but a run."""
    return {"kind": kind, "at": at, "run": run}


def folded(*entries: dict[str, Any], budget: Budget = BUDGET) -> Account:
    """Return what entries add up to."""
    account = Account(budget)
    for seq, entry in enumerate(entries, start=2):
        account.fold(seq, entry)
    return account


class TestBudget:
    """Budget."""

    def test_document(self) -> None:
        """The caps are written down under the names of the merchant's file."""
        budget = Budget(1.0, 1e-5, 3.0, 30.0, (("update", 0.5),))
        assert budget.document == {
            "epsilon": 1.0,
            "delta": 1e-5,
            "epsilon_towards_server": 3.0,
            "refresh_days": 30.0,
            "purposes": {"update": 0.5},
        }


class TestCharge:
    """Charge."""

    @given(
        st.builds(
            Charge,
            st.text(max_size=20),
            st.builds(GaussianSum, st.floats(0.1, 1e6), st.floats(0.1, 9.0), st.integers(0, 99)),
            st.builds(PoissonGaussianSum, st.floats(0.1, 99.0), st.just(1.0), st.floats(0.001, 1)),
        )
    )
    def test_round_trip(self, cost: Charge) -> None:
        """What is written down is what is read, to the last bit."""
        assert Charge.from_document(cost.document) == cost

    @pytest.mark.parametrize("name", ["event", "towards_server"])
    @pytest.mark.parametrize("value", [None, {}, {"kind": "laplace"}, 5, {"kind": "gaussian-sum"}])
    def test_unknown_event(self, name: str, value: object) -> None:
        """An event that is not known is refused, never skipped."""
        with pytest.raises(AccountingError):
            Charge.from_document({**charge().document, name: value})


class TestCounting:
    """What counts as spent."""

    def test_reserved_is_charged(self) -> None:
        """A run counts as all that it reserved, whatever was released."""
        account = folded(reservation("a", LARGE), released("a", 1, charge(50.0)))
        assert account.runs["a"].charged == (LARGE,)
        assert account.spent() == pytest.approx(epsilon([LARGE.event], DELTA))

    def test_settled_is_what_was_released(self) -> None:
        """A run that is settled counts as its releases, each of them."""
        account = folded(
            reservation("a", LARGE),
            released("a", 1, charge(50.0)),
            released("a", 2, charge(40.0)),
            note("settle", "a"),
        )
        assert account.runs["a"].charged == (charge(50.0), charge(40.0))

    def test_settled_without_a_release(self) -> None:
        """A run that released nothing costs nothing."""
        account = folded(reservation("a", LARGE), note("settle", "a"))
        assert account.spent() == 0.0
        assert account.refusal_of([LARGE]) == ""

    def test_expired_counts_for_life(self) -> None:
        """A run that is over the refresh period counts in the lifetime alone."""
        account = folded(reservation("a", LARGE), note("expire", "a"), reservation("b", LARGE))
        assert account.spent() == pytest.approx(epsilon([LARGE.event], DELTA))
        assert account.spent(lifetime=True) == pytest.approx(epsilon([LARGE.event] * 2, DELTA))
        assert account.spent([LARGE], lifetime=True) > account.spent([LARGE])

    def test_nothing(self) -> None:
        """An empty ledger spent nothing."""
        assert folded().spent() == folded().spent(lifetime=True) == 0.0

    def test_latest_charge_of_a_run(self) -> None:
        """A run is as old as its last release, by the latest clock; notes make it no younger."""
        account = folded(
            reservation("a", LARGE, at=100.0),
            released("a", 1, charge(50.0)) | {"at": 50.0},
            note("settle", "a", at=900.0),
        )
        run = account.runs["a"]
        assert (run.at, run.seq, run.latest) == (100.0, 2, 3)

    def test_steps(self) -> None:
        """Sessions and steps that were taken are known; a plain sum takes none."""
        account = folded(
            reservation("a", LARGE),
            note("join", "a") | {"roster": "r"},
            released("a", 1, charge(50.0)) | {"step": "r/1"},
            released("a", 2, charge(50.0)),
        )
        assert account.steps == {"r/0", "r/1"}

    def test_survivors(self) -> None:
        """How many were in a sum is known for each attempt."""
        what = {"stage": "update", "round": 1, "attempt": 2, "survivors": 7}
        account = folded(reservation("a", LARGE), {**note("sum", "a"), **what})
        assert account.runs["a"].survivors == {("update", 1, 2): 7}

    def test_finished(self) -> None:
        """A run is over once its last sum was asked for, not when another stage ends there."""
        account = folded(reservation("a", LARGE), released("a", 9, charge(50.0)))
        assert not account.runs["a"].finished
        account.fold(9, released("a", 9, charge(50.0), "profile"))
        assert account.runs["a"].finished

    @pytest.mark.parametrize(
        "entry",
        [
            {},
            {"kind": "reserve", "run": "a"},
            reservation("a", LARGE) | {"releases": [{}]},
            reservation("a", LARGE) | {"last": ["x"]},
            reservation("a", LARGE) | {"last": ["x", "y"]},
            reservation("a", LARGE) | {"at": None},
            {"kind": "refuse"},
        ],
    )
    def test_no_entry(self, entry: dict[str, Any]) -> None:
        """What is no entry is an error of a kind that the ledger expects."""
        with pytest.raises((AccountingError, KeyError, TypeError, ValueError, IndexError)):
            folded(entry)


class TestRefusalOf:
    """Account.refusal_of."""

    def test_cap(self) -> None:
        """A run that would pass the cap together with the others is refused, with numbers."""
        account = folded(reservation("a", LARGE))
        assert account.refusal_of([charge(50.0)]) == ""
        assert "bring this merchant to epsilon 1.0" in account.refusal_of([LARGE])
        assert "its cap is 1 at delta 1e-05" in account.refusal_of([LARGE])

    def test_old_runs(self) -> None:
        """Runs that the caller calls old do not count."""
        account = folded(reservation("a", LARGE), reservation("b", charge(9.0)))
        assert account.refusal_of([LARGE], {"b"})
        assert account.refusal_of([LARGE], {"a", "b"}) == ""

    def test_exactly_the_cap(self) -> None:
        """A plan that fills the cap to the last bit fits, and nothing beside it."""
        plan = charge(12.0, 5)
        account = folded(budget=Budget(epsilon([plan.event], DELTA), DELTA))
        assert account.refusal_of([plan]) == ""
        account.fold(2, reservation("a", plan))
        assert account.refusal_of([charge(1e4)])

    def test_towards_server(self) -> None:
        """Single messages have a cap of their own, where the merchant sets one."""
        quiet, loud = GaussianSum(50.0, 1.0), GaussianSum(1.7, 1.0)
        plan = [charge_of(quiet, loud)]
        assert folded().refusal_of(plan * 9) == ""
        capped = folded(budget=Budget(1.0, DELTA, 3.0))
        assert capped.refusal_of(plan) == ""
        assert "this merchant towards the server to" in capped.refusal_of(plan * 2)

    def test_purposes(self) -> None:
        """One purpose may have a cap of its own, under the whole; others are free of it."""
        account = folded(
            reservation("a", charge(15.0, stage="update")),
            budget=Budget(1.0, DELTA, None, None, (("update", 0.3),)),
        )
        assert "for 'update' alone, to" in account.refusal_of([charge(15.0, stage="update")])
        assert account.refusal_of([charge(15.0, stage="census")]) == ""

    def test_purpose_that_took_more_than_its_part(self) -> None:
        """What another stage had left and this one released counts for this one."""
        entries = [
            reservation("a", charge(20.0, stage="update"), charge(20.0, stage="census")),
            released("a", 1, charge(20.0, stage="update")),
            released("a", 2, charge(20.0, stage="update")),
        ]
        run = folded(*entries).runs["a"]
        assert run.charged_for("update") == (charge(20.0), charge(20.0))
        assert run.charged_for("census") == (charge(20.0, stage="census"),)
        cap = Budget(1.0, DELTA, None, None, (("update", 0.28),))
        assert "for 'update' alone" in folded(*entries, budget=cap).refusal_of([charge(20.0)])
        assert folded(*entries[:2], budget=cap).refusal_of([charge(20.0)]) == ""

    def test_what_cannot_be_accounted_for(self) -> None:
        """An event without meaning fits no cap."""
        odd = Charge("update", GaussianSum(float("nan"), 1.0), GaussianSum(1.0, 1.0))
        assert "cannot be accounted for" in folded().refusal_of([odd])

    @given(st.lists(st.tuples(st.floats(3.0, 60.0), st.booleans()), max_size=8))
    def test_never_more_than_the_cap(self, wanted: list[tuple[float, bool]]) -> None:
        """Runs that were not refused, settled or not, stay under the cap together."""
        account, seq = folded(), 2
        for number, (sigma, settle) in enumerate(wanted):
            run, plan = f"run {number}", charge(sigma, 2)
            if account.refusal_of([plan]):
                continue
            account.fold(seq, reservation(run, plan))
            if settle:
                account.fold(seq + 1, released(run, 1, charge(sigma)))
                account.fold(seq + 2, note("settle", run))
            seq += 3
        events = [c.event for run in account.runs.values() for c in run.charged]
        assert epsilon(events, DELTA) <= 1.0 + 1e-9


class TestRefusalOfRelease:
    """Account.refusal_of_release."""

    def test_covered(self) -> None:
        """What the run reserved may be released, once over."""
        account = folded(reservation("run", charge(20.0, 2)))
        assert account.refusal_of_release(occasion(1), charge()) == ""
        account.fold(3, released("run", 1, charge(20.0, 2)))
        assert "would pass what this run reserved" in account.refusal_of_release(
            occasion(2), charge(1e4)
        )

    def test_towards_server_is_covered_too(self) -> None:
        """A release that shows more to the server than was reserved is refused."""
        account = folded(reservation("run", charge(20.0)))
        loud = charge_of(GaussianSum(20.0, 1.0), GaussianSum(19.0, 1.0))
        assert "would pass" in account.refusal_of_release(occasion(1), loud)

    @pytest.mark.parametrize(
        "other", [occasion(run="other"), occasion(contract=OTHER_CONTRACT), occasion(run="")]
    )
    def test_needs_a_reservation(self, other: Any) -> None:
        """Another run, or another contract for the same run, has no reservation."""
        account = folded(reservation("run", LARGE))
        assert "needs a reservation" in account.refusal_of_release(other, charge())

    @pytest.mark.parametrize("kind", ["settle", "expire"])
    def test_closed(self, kind: str) -> None:
        """A run that is settled or expired releases nothing more."""
        account = folded(reservation("run", LARGE), note(kind, "run"))
        assert "comes too late" in account.refusal_of_release(occasion(), charge())

    def test_purpose(self) -> None:
        """With a cap on a purpose, that purpose keeps to its own part of the plan."""
        plan = reservation("run", charge(20.0, stage="update"), charge(20.0, stage="census"))
        first = released("run", 1, charge(20.0))
        assert folded(plan, first).refusal_of_release(occasion(2), charge(20.0)) == ""
        capped = folded(plan, first, budget=Budget(1.0, DELTA, None, None, (("update", 0.5),)))
        assert "for this purpose" in capped.refusal_of_release(occasion(2), charge(20.0))
        census = charge(20.0, stage="census")
        assert capped.refusal_of_release(occasion(0, stage="census"), census) == ""

    @given(st.lists(st.tuples(st.booleans(), st.floats(1.0, 50.0), st.integers(1, 3)), max_size=9))
    def test_released_stays_covered(self, wanted: list[tuple[bool, float, int]]) -> None:
        """Whatever is asked for: what was let through is covered by what was reserved."""
        plan = [charge(10.0, 3), charge_of(PoissonGaussianSum(2.0, 1.0, 0.1, 2))]
        account = folded(reservation("run", *plan))
        for number, (sampled, sigma, count) in enumerate(wanted):
            event: Event = GaussianSum(sigma, 1.0, count)
            if sampled:
                event = PoissonGaussianSum(2.0, 1.0, 0.1 if sigma > 9 else 0.2, count)
            if not account.refusal_of_release(occasion(number), charge_of(event)):
                account.fold(number + 3, released("run", number, charge_of(event)))
        taken = [one.event for one in account.runs["run"].released.values()]
        assert covers([one.event for one in plan], taken)


class TestWorthNoting:
    """Account.worth_noting."""

    def test_once_an_occasion(self) -> None:
        """A refusal is written down once an occasion; another occasion is another refusal."""
        account = folded(self._refusal("run", 1))
        assert not account.worth_noting(occasion(1))
        assert account.worth_noting(occasion(2))
        assert account.worth_noting(occasion(1, attempt=1))
        assert account.worth_noting(occasion(1, stage=WHOLE_RUN))

    def test_bounded_for_a_run(self) -> None:
        """A coordinator that asks a million times for one run does not fill the disk."""
        account = folded(reservation("run", LARGE), *(self._refusal("run", n) for n in range(1000)))
        assert not account.worth_noting(occasion(5000))
        assert account.worth_noting(occasion(5000, run="another"))

    def test_bounded_for_invented_runs(self) -> None:
        """Neither does one that invents a million runs; a run that is reserved has its own room."""
        account = folded(*(self._refusal(f"run {n}", 1) for n in range(1000)))
        assert not account.worth_noting(occasion(1, run="one more"))
        account.fold(2000, reservation("run", LARGE))
        assert account.worth_noting(occasion(1))

    @staticmethod
    def _refusal(run: str, number: int) -> dict[str, Any]:
        what = {"stage": "update", "round": number, "attempt": 0, "contract": CONTRACT}
        return {"kind": "refuse", "at": 0.0, "run": run, **what, "reason": "no"}


SOME_EVENTS = st.sampled_from(
    [
        GaussianSum(20.0, 1.0),
        GaussianSum(20, 1, 3),
        GaussianSum(30.0, 2.0),
        PoissonGaussianSum(1.0, 1.0, 0.1, 8),
        PoissonGaussianSum(1.0, 1.0, 0.2, 8),
    ]
)


@given(
    st.lists(st.tuples(st.integers(1, 6), st.builds(charge_of, SOME_EVENTS, SOME_EVENTS))),
    st.builds(charge_of, SOME_EVENTS, SOME_EVENTS),
)
def test_a_release_is_weighed_with_every_one_before_it(
    taken: list[tuple[int, Charge]], new: Charge
) -> None:
    """As if all that a run released were added up anew; an occasion counts with its last entry."""
    planned = [
        charge_of(GaussianSum(20.0, 1.0, 6)),
        charge_of(PoissonGaussianSum(1.0, 1.0, 0.1, 24)),
    ]
    account = folded(
        reservation("run", *planned), *(released("run", number, cost) for number, cost in taken)
    )
    last = dict(taken)
    all_of_them = [*last.values(), new]
    may = [one.event for one in planned]
    fits = covers(may, [one.event for one in all_of_them]) and covers(
        may, [one.towards_server for one in all_of_them]
    )
    assert (account.refusal_of_release(occasion(99), new) == "") == fits


def test_run_account_of_an_unknown_kind() -> None:
    """An entry that holds nothing of a run's account changes nothing but its age."""
    account = RunAccount(CONTRACT, (LARGE,), ("profile", 9), 2, 0.0)
    assert account.take("other", {}) == set()
    assert account.charged == (LARGE,)
