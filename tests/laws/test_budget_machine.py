"""No sequence of runs, restarts, copies of a handle, and clock changes passes a merchant's caps.

Two handles on one file play two processes. What was really released is kept by the test itself,
and what it costs is worked out here from the closed form and Renyi bounds, not by the ledger.
"""

import contextlib
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from common.accounting import epsilon, gaussian_epsilon, rdp_upper_bound
from common.budget import Budget, Charge, Occasion
from common.chain import Head
from common.errors import BudgetRefusal, LedgerError, ReplayRefusal, WitnessRefusal
from common.events import Event, GaussianSum, PoissonGaussianSum
from common.ledger import Ledger, whole_run
from tests.ledgers import CONTRACT, DAY, DELTA, MODEL, OTHER_CONTRACT, Shop, charge_of, occasion

_MEMORY = Path("/dev/shm")  # noqa: S108  # thousands of files that no power cut threatens
CAP, UPDATE_CAP, SERVER_CAP, LOOSE_CAP, PERIOD = 1.0, 0.7, 2.0, 1.7, 30.0
SIGMA = 5.5  # of a run of epsilon 0.83: one fits each cap, two fit none
LAST = ("evaluation", 9)
RUNS = st.sampled_from("abcdefgh")
HANDLES = st.integers(0, 1)
SELDOM = st.sampled_from([False] * 4 + [True])
CONTRACTS = st.sampled_from([CONTRACT] * 5 + [OTHER_CONTRACT])
TOLD = st.sampled_from([0] * 6 + [1, 2, 9])  # countersignatures ago
SIGMAS = st.sampled_from([SIGMA] * 5 + [9.0] * 3 + [12.0] * 3 + [45.0])
JUMPS = st.sampled_from([-1000.0, -31.0, -1.0, 10.0, 31.0, 1000.0])


@dataclass(frozen=True)
class Left:
    """A release that really left the merchant."""

    at: float  # true time, days
    run: str
    stage: str
    charge: Charge


def fits(events: list[Event], cap: float) -> bool:
    """Tell whether events stay within a cap; nearly, where some are sampled."""
    plain = [event for event in events if isinstance(event, GaussianSum)]
    if len(plain) == len(events):
        mu = sum(event.count / event.noise_multiplier**2 for event in plain) ** 0.5
        return gaussian_epsilon(mu, DELTA) <= cap * (1 + 1e-7)
    return rdp_upper_bound(events, DELTA) <= cap or epsilon(events, DELTA) <= cap * 1.001


def planned(sigma: float, times: int) -> tuple[Charge, ...]:
    """Return the plan of a run: a census, updates, evaluations and perhaps sampled sums."""
    parts: list[tuple[str, Event]] = [
        ("census", GaussianSum(4 * sigma, 1.0)),
        ("update", GaussianSum(sigma * times**0.5, 1.0, times)),
        ("evaluation", GaussianSum(2 * sigma, 1.0, 2)),
    ]
    if sigma == 45.0:
        parts.append(("update", PoissonGaussianSum(3.0, 1.0, 0.02, 2)))
    return tuple(
        charge_of(event, replace(event, noise_multiplier=event.noise_multiplier / 2), stage)
        for stage, event in parts
    )


def once(cost: Charge) -> Charge:
    """Return one release of a planned kind."""
    events = replace(cost.event, count=1), replace(cost.towards_server, count=1)
    return Charge(cost.stage, *events)


class BudgetMachine(RuleBasedStateMachine):
    """One merchant, two processes, one witness."""

    budget = Budget(CAP, DELTA)
    honest: tuple[str, ...] = ()  # clocks that tell the truth

    @initialize()
    def begin(self) -> None:
        """Make a new merchant."""
        self._folder = tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None)
        self.shop = Shop(Path(self._folder.name), self.budget)
        self.handles: list[Ledger] = [self.shop.ledger, self.shop.opened()]
        self.today = 0.0
        self.left: list[Left] = []
        self.occasions: set[tuple[str, str, int, int]] = set()
        self.steps: set[str] = set()
        self.plans: dict[str, tuple[Charge, ...]] = {}
        self.kept: list[bytes] = []  # countersignatures that a coordinator may send again

    def teardown(self) -> None:
        """Close and delete all files."""
        if hasattr(self, "handles"):
            for handle in self.handles:
                handle.close()
            self._folder.cleanup()

    def told(self, number: int) -> bytes:
        """Return one of the last countersignatures; nothing only before there is one."""
        return self.kept[-1 - number % len(self.kept)] if self.kept else b""

    def seen(self, head: Head, *, lost: bool) -> None:
        """Let the witness see a head, unless the message was lost."""
        if not lost:
            assert self.shop.refusal(head) == ""
            self.kept.append(self.shop.latest)

    @rule(run=RUNS, who=HANDLES, sigma=SIGMAS, times=st.integers(1, 4), contract=CONTRACTS,
          lost=SELDOM, told=TOLD)  # fmt: skip
    def ask_for_a_run(  # noqa: PLR0917
        self, run: str, who: int, sigma: float, times: int, contract: str, lost: bool, told: int
    ) -> None:
        """Ask for a run, perhaps again."""
        self.reserve(run, who, sigma, times, contract, lost=lost, told=told)

    def reserve(
        self, run: str, who: int, sigma: float, times: int, contract: str, *, lost: bool, told: int
    ) -> None:
        """Ask for a run; a run that is there keeps its plan."""
        plan, whole = planned(sigma, times), whole_run(run, contract)
        with contextlib.suppress(BudgetRefusal):
            head = self.handles[who].reserve(whole, plan, LAST, self.told(told))
            self.plans.setdefault(run, plan)
            self.seen(head, lost=lost)

    @rule(run=RUNS, who=HANDLES, sigma=SIGMAS, first=st.integers(0, 3),
          most=st.sampled_from([9, 9, 9, 4, 1]), stages=st.integers(0, 1), loud=SELDOM)  # fmt: skip
    def carry_out(  # noqa: PLR0917
        self,
        run: str,
        who: int,
        sigma: float,
        first: int,
        most: int,
        stages: int = 1,
        loud: bool = False,
    ) -> None:
        """Ask for all that a run planned and more: of all stages, or one stage's part for all."""
        self.reserve(run, 1 - who, sigma, 2, CONTRACT, lost=False, told=0)
        plan = self.plans.get(run, ())
        for number in range(most if plan else 0):
            cost = once(plan[(first + number * stages) % len(plan)])
            if loud:
                cost = replace(cost, towards_server=GaussianSum(sigma / 2, 1.0))
            what = occasion(number, run, len(self.occasions) + 10, cost.stage)
            self.ask(who, what, cost)

    @rule(run=RUNS, who=HANDLES, number=st.integers(0, 1), attempt=st.integers(0, 1),
          which=st.integers(0, 3), contract=CONTRACTS, louder=SELDOM, crash=SELDOM,
          step=st.integers(0, 10), told=TOLD)  # fmt: skip
    def release(  # noqa: PLR0917
        self,
        run: str,
        who: int,
        number: int,
        attempt: int,
        which: int,
        contract: str,
        louder: bool,
        crash: bool,
        step: int,
        told: int,
    ) -> None:
        """Ask for one release, perhaps a louder one, or again; perhaps it dies before it sends."""
        plan = self.plans.get(run) or planned(12.0, 1)
        cost = once(plan[which % len(plan)])
        if louder:
            loud = GaussianSum(cost.event.noise_multiplier, 1.0, 9)
            cost = replace(cost, event=loud) if number else replace(cost, towards_server=loud)
        what = occasion(number, run, attempt, cost.stage, contract)
        step_name = f"roster/{step}" if step % 2 else ""
        self.ask(who, what, cost, step_name, told, crash=crash)

    @rule(run=RUNS, who=HANDLES)
    def finish(self, run: str, who: int) -> None:
        """Ask for a run's last sum, whatever came before."""
        last = [cost for cost in self.plans.get(run, ()) if cost.stage == LAST[0]]
        for cost in last:
            self.ask(who, occasion(LAST[1], run, len(self.occasions), LAST[0]), once(cost))

    def ask(
        self,
        who: int,
        what: Occasion,
        cost: Charge,
        step: str = "",
        told: int = 0,
        *,
        crash: bool = False,
    ) -> None:
        """Ask for a release and keep what left."""
        try:
            head = self.handles[who].release(what, cost, MODEL, step, self.told(told))
        except (BudgetRefusal, ReplayRefusal, WitnessRefusal):
            return
        key = (what.run, what.stage, what.round, what.attempt)
        assert key not in self.occasions, "released twice"
        assert not step or step not in self.steps, "one step, two releases"
        self.occasions.add(key)
        self.steps.add(step)
        if crash:
            self.restart(who)
            return
        self.left.append(Left(self.today, what.run, what.stage, cost))
        self.seen(head, lost=False)
        if step:
            self.check_once(1 - who, what, cost, step)

    def check_once(self, who: int, what: Occasion, cost: Charge, step: str) -> None:
        """Ask again, for the occasion and for the step: the other process knows of both."""
        for again in (what, replace(what, attempt=what.attempt + 1000)):
            with pytest.raises((ReplayRefusal, BudgetRefusal)):
                self.handles[who].release(again, cost, MODEL, step, self.told(0))

    @rule(run=RUNS, who=HANDLES)
    def settle(self, run: str, who: int) -> None:
        """Let a person settle a run, whatever state it is in."""
        with contextlib.suppress(LedgerError):
            self.handles[who].settle(run)

    @rule(who=HANDLES, run=RUNS, roster=st.integers(0, 3), sigma=SIGMAS)
    def attest_and_join(self, who: int, run: str, roster: int, sigma: float) -> None:
        """Ask what a run would cost, and join a session, perhaps again."""
        with contextlib.suppress(LedgerError):
            self.handles[who].join(run, roster, f"roster {roster}", 3)
        with contextlib.suppress(BudgetRefusal):
            self.handles[who].check_affordable(whole_run(run, CONTRACT), planned(sigma, 1))

    @rule(who=HANDLES)
    def restart(self, who: int) -> None:
        """Let one process die and start again."""
        self.handles[who].close()
        self.handles[who] = self.shop.opened()

    @rule(who=HANDLES)
    def renew(self, who: int) -> None:
        """Tell the merchant the witness's time."""
        known = self.shop.witness.renewed(self.shop.key)
        self.handles[who].accept(known)
        if known:
            self.kept.append(known)

    @rule(days=st.sampled_from([0.5, 5.0, 29.5, 31.0]), told=st.booleans())
    def wait(self, days: float, told: bool) -> None:
        """Let time pass, for everybody."""
        if told and self.kept:
            self.handles[0].accept(self.shop.latest)  # when the witness saw it
        self.today += days
        self.shop.clock.now += days * DAY
        self.shop.witness_clock.now += days * DAY
        if told:
            self.renew(0)

    @rule(one=RUNS, other=RUNS, who=HANDLES, before=st.sampled_from([0, 1, 9]), jump=JUMPS,
          days=st.tuples(st.sampled_from([0.5, 29.5]), st.sampled_from([0.5, 2.0, 31.0]))
    )  # fmt: skip
    def hurry(
        self, one: str, other: str, who: int, before: int, jump: float, days: tuple[float, float]
    ) -> None:
        """Carry out two runs with time, true or false, between them; then turn to the first."""
        self.carry_out(one, who, SIGMA, 0, before)
        self.wait(days[0], told=True)
        self.carry_out(one, who, SIGMA, 0, 1)  # a census, which leaves room for nothing else
        for clock in {"own", "witness"} - set(self.honest):
            (self.shop.clock if clock == "own" else self.shop.witness_clock).now += jump * DAY
        self.wait(days[1], told=True)
        self.carry_out(other, who, SIGMA, 0, 9)
        self.carry_out(one, who, SIGMA, 1, 9)

    @precondition(lambda self: "own" not in self.honest)
    @rule(days=JUMPS)
    def set_own_clock(self, days: float) -> None:
        """Set the merchant's clock."""
        self.shop.clock.now += days * DAY

    @precondition(lambda self: "witness" not in self.honest)
    @rule(days=JUMPS)
    def set_witness_clock(self, days: float) -> None:
        """Set the witness's clock."""
        self.shop.witness_clock.now += days * DAY
        self.renew(0)

    def windows(self) -> list[list[Left]]:
        """Return what left within each window that the caps speak of."""
        return [self.left]

    @invariant()
    def caps_hold(self) -> None:
        """What really left costs no more than any cap."""
        for window in self.windows() if hasattr(self, "left") else []:
            assert fits([one.charge.event for one in window], self.budget.epsilon)
            if self.budget.towards_server is not None:
                towards_server = [one.charge.towards_server for one in window]
                assert fits(towards_server, self.budget.towards_server)
            for stage, cap in self.budget.purposes:
                assert fits([one.charge.event for one in window if one.stage == stage], cap)

    @invariant()
    def all_that_left_is_an_entry(self) -> None:
        """Each release that left is in the ledger, whichever process one asks."""
        if hasattr(self, "left"):
            runs = self.handles[0].account().runs
            left = Counter(one.run for one in self.left)
            assert all(len(runs[run].released) >= count for run, count in left.items())


class ServerMachine(BudgetMachine):
    """The cap towards the server binds first."""

    budget = Budget(LOOSE_CAP, DELTA, SERVER_CAP)


class PurposeMachine(BudgetMachine):
    """The cap on updates binds first."""

    budget = Budget(LOOSE_CAP, DELTA, None, None, (("update", UPDATE_CAP),))


class RefreshMachine(BudgetMachine):
    """Runs count for thirty days; the witness's clock says anything, the merchant's is right."""

    budget = Budget(CAP, DELTA, None, PERIOD)
    honest = ("own",)

    def windows(self) -> list[list[Left]]:
        """Return what left within thirty days, up to each release."""
        ends = sorted({one.at for one in self.left})
        return [[one for one in self.left if end - PERIOD < one.at <= end] for end in ends]


class OwnClockMachine(RefreshMachine):
    """The same with the merchant's clock wrong and the witness's right."""

    honest = ("witness",)


MACHINES = {
    "cap": BudgetMachine,
    "server": ServerMachine,
    "purpose": PurposeMachine,
    "witness lies": RefreshMachine,
    "shop lies": OwnClockMachine,
}


def run_machine(name: str, examples: int, steps: int) -> None:
    """Run a machine's histories."""
    chosen = settings(max_examples=examples, stateful_step_count=steps, deadline=None)
    run_state_machine_as_test(MACHINES[name], settings=chosen)  # type: ignore[no-untyped-call]


@pytest.mark.slow
@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("before", [0, 1, 9])
@pytest.mark.parametrize("stages", [0, 1])
@pytest.mark.parametrize("jump", [-31.0, 31.0])
def test_in_a_hurry(name: str, before: int, stages: int, jump: float) -> None:
    """The histories that chance finds seldom: two runs side by side, with every pause."""
    for days in ((0.5, 0.5), (0.5, 31.0), (29.5, 2.0)):
        machine = MACHINES[name]()
        machine.begin()
        try:
            machine.hurry("a", "b", 0, before, jump, days)
            machine.caps_hold()
            machine.carry_out("a", 1, SIGMA, 1, 9, stages, loud=stages == 0)
            machine.carry_out("c", 1, SIGMA, 1, 9, stages)
            machine.settle("a", 0)
            machine.carry_out("d", 1, SIGMA, 1, 9)
            machine.carry_out("a", 1, SIGMA, 2, 9)
            machine.caps_hold()
            machine.all_that_left_is_an_entry()
        finally:
            machine.teardown()


@pytest.mark.parametrize("name", MACHINES)
def test_quick(name: str) -> None:
    """A few short histories of each kind."""
    run_machine(name, examples=8, steps=25)


@pytest.mark.slow
@pytest.mark.parametrize("name", MACHINES)
def test_thorough(name: str) -> None:
    """Many long histories of each kind."""
    run_machine(name, examples=150, steps=40)
