"""Whole runs over the in-process grid: who is counted, who is left out and why, what it costs."""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from common.accounting import epsilon
from common.budget import Charge
from common.contract import Contract
from common.errors import ArchiveError, BudgetRefusal, RunError
from common.events import GaussianSum, merged
from common.identity import Identity
from common.ledger import Ledger, whole_run
from common.plan import CENSUS, EVALUATION, PROFILE, UPDATE, lattice_of, plan_of
from common.wire import Attested, SumAnswer, SumRequest, pack, unpack
from server.archive import RunRecord, open_archive
from server.asking import MESSAGE_TYPES
from server.coordinator import Coordinator
from server.outcome import Outcome, RoundReport
from simulations.grid import InProcessGrid
from simulations.members import Federation
from tests.witnessed import charges_of, entries_of

Answer = Callable[..., Message]
Federate = Callable[..., Federation]
RunOverGrid = Callable[..., Outcome]

NAMES = [f"merchant-{number:04d}" for number in range(5)]
SESSION = ("advertise", "share", "confirm", "reveal")

only_plain = pytest.mark.parametrize("contract", ["plain"], indirect=True)
only_secure = pytest.mark.parametrize("contract", ["secure"], indirect=True)


def charged(federation: Federation, number: int, outcome: Outcome) -> list[tuple[str, object]]:
    """Return (stage, event) of every charge of a merchant in a run."""
    released = charges_of(federation.members[number].worker.ledger, outcome.run)
    return [(stage, charge.event) for (stage, _, _), charge in released.items()]


def lost(number: int, stage: str, *, word: str = "silent") -> Callable[[Message], str | None]:
    """Return a fault: messages of a stage to one merchant are lost."""
    kind = MESSAGE_TYPES.get(stage, f"query.{stage}")

    def fault(message: Message) -> str | None:
        hit = message.metadata.dst_node_id == number + 2 and message.metadata.message_type == kind
        return word if hit else None

    return fault


def whole_noise(contract: Contract) -> float:
    """Return the deviation of the profile's noise if it held just the noise it must hold."""
    release = plan_of(contract).profile
    assert release is not None
    return release.event.noise_multiplier * release.sensitivity


class TestWholeRun:
    """A run in which everybody answers."""

    def test_everybody_is_in_every_sum(
        self, federate: Federate, contract: Contract, run_over_grid: RunOverGrid
    ) -> None:
        """Cohorts, merchants, evaluations and the profile are all there."""
        outcome = run_over_grid(federate(contract))
        assert outcome.merchants == NAMES
        assert outcome.cohorts == [5, 5]
        assert [evaluation.round for evaluation in outcome.evaluations] == [1, 2]
        assert outcome.profile is not None
        for found in (*outcome.evaluations, outcome.profile):
            assert found.merchants == tuple(NAMES)
        assert not outcome.refusals
        assert not outcome.failures

    def test_events_are_what_every_ledger_holds(
        self, federate: Federate, contract: Contract, run_over_grid: RunOverGrid
    ) -> None:
        """The coordinator reports what merchants paid, in their order."""
        federation = federate(contract)
        outcome = run_over_grid(federation)
        for number in range(5):
            assert charged(federation, number, outcome) == outcome.events

    def test_epsilon_rises_to_what_the_ledgers_say(
        self, federate: Federate, contract: Contract, run_over_grid: RunOverGrid
    ) -> None:
        """Each round tells the composition so far; the whole stays below the contract's epsilon."""
        reports: list[RoundReport] = []
        federation = federate(contract)
        outcome = run_over_grid(federation, on_round=reports.append)
        delta = contract.privacy.delta
        total = epsilon([e for _, e in charged(federation, 0, outcome)], delta)
        assert 0 < reports[0].epsilon < reports[1].epsilon < total <= contract.privacy.epsilon
        assert reports[1].epsilon == epsilon(
            [event for stage, event in outcome.events if stage != PROFILE], delta
        )

    def test_the_plan_without_spares_is_what_is_asked(
        self, federate: Federate, contract: Contract, run_over_grid: RunOverGrid
    ) -> None:
        """Without spare rounds the run spends the contract's epsilon and no more."""
        outcome = run_over_grid(federate(contract.revised(training={"spare_rounds": 0})))
        total = epsilon([event for _, event in outcome.events], contract.privacy.delta)
        assert total == pytest.approx(contract.privacy.epsilon, rel=1e-6)
        assert total <= contract.privacy.epsilon

    @only_secure
    def test_of_a_secure_sum_no_part_is_known(
        self, federate: Federate, contract: Contract, run_over_grid: RunOverGrid
    ) -> None:
        """The coordinator has nothing of a single merchant to keep."""
        outcome = run_over_grid(federate(contract))
        assert outcome.profile is not None
        assert all(not found.parts for found in (*outcome.evaluations, outcome.profile))

    @only_plain
    @pytest.mark.parametrize("mode", ["distributed", "local"])
    def test_a_sum_is_the_sum_of_the_messages(
        self, federate: Federate, contract: Contract, run_over_grid: RunOverGrid, mode: str
    ) -> None:
        """Integers add up exactly: the total is that of the parts."""
        outcome = run_over_grid(federate(contract.revised(training={"mode": mode})))
        for found in (*outcome.evaluations, outcome.profile):
            assert found is not None
            assert sorted(found.parts) == NAMES
            np.testing.assert_array_equal(found.total, np.sum(list(found.parts.values()), axis=0))

    @pytest.mark.parametrize("mode", ["distributed", "local"])
    def test_the_order_of_answers_changes_nothing(
        self, federate: Federate, contract: Contract, run_over_grid: RunOverGrid, mode: str
    ) -> None:
        """The same model to the last bit, whoever answers first."""

        class BackwardGrid(InProcessGrid):
            def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
                return super().pull_messages(list(message_ids)[::-1])

        contract = contract.revised(training={"mode": mode})
        first = run_over_grid(federate(contract, ledgers="first"))
        second = run_over_grid(federate(contract, ledgers="second"), grid_type=BackwardGrid)
        assert first.parameters.tobytes() == second.parameters.tobytes()

    def test_the_noise_of_a_sum_is_that_of_its_answers(
        self, federate: Federate, contract: Contract, run_over_grid: RunOverGrid
    ) -> None:
        """With n answers and shares sized for m, the deviation is sqrt(n / m) shares."""
        outcome = run_over_grid(federate(contract))
        assert outcome.profile is not None
        assert outcome.profile.stddev == pytest.approx(whole_noise(contract) * np.sqrt(5 / 3))

    def test_in_local_mode_everybody_brings_the_whole_noise(
        self, federate: Federate, contract: Contract, run_over_grid: RunOverGrid
    ) -> None:
        """With n answers the deviation is sqrt(n) times that of one."""
        contract = contract.revised(training={"mode": "local"})
        outcome = run_over_grid(federate(contract))
        assert outcome.profile is not None
        assert outcome.profile.stddev == pytest.approx(whole_noise(contract) * np.sqrt(5))

    def test_without_profiles_none_is_asked_for(
        self, federate: Federate, contract: Contract, run_over_grid: RunOverGrid
    ) -> None:
        """The contract decides."""
        outcome = run_over_grid(federate(contract.revised(publication={"profiles": False})))
        assert outcome.profile is None
        assert PROFILE not in {stage for stage, _ in outcome.events}

    def test_every_run_has_a_name_of_its_own(
        self, federate: Federate, contract: Contract, run_over_grid: RunOverGrid
    ) -> None:
        """Also where a seed fixes everything else."""
        federation = federate(contract)
        first = run_over_grid(federation)
        with pytest.raises(RunError, match="its cap is 1"):  # spent, but the run had a name
            run_over_grid(federation)
        kept = {folder.name for folder in (federation.server / "runs").iterdir()}
        assert first.run in kept
        assert len(kept) == 2
        assert all(re.fullmatch(r"[0-9a-f]{16}", name) for name in kept)


class TestRefusals:
    """Merchants that do not want to."""

    def test_a_cap_that_is_too_low_keeps_a_merchant_out(
        self, federate: Federate, contract: Contract, run_over_grid: RunOverGrid
    ) -> None:
        """The run goes on without it, and keeps its reason."""
        federation = federate(contract, caps={1: 0.5})
        outcome = run_over_grid(federation)
        assert outcome.merchants == [NAMES[0], *NAMES[2:]]
        assert outcome.cohorts == [4, 4]
        assert "its cap is 0.5" in outcome.refusals[NAMES[1]]
        assert charged(federation, 1, outcome) == []

    def test_what_a_run_reserved_is_there_to_its_end(
        self, federate: Federate, contract: Contract, run_over_grid: RunOverGrid
    ) -> None:
        """Another run that wants to spend in between is refused, and this one goes on."""
        federation = federate(contract)
        ledger, refusals = federation.members[2].worker.ledger, list[str]()

        def spend(report: RoundReport) -> None:
            event = GaussianSum(30.0, 1.0)
            charges, last = [Charge(CENSUS, event, event)], (CENSUS, 0)
            with pytest.raises(BudgetRefusal) as refusal:
                ledger.reserve(whole_run(f"other-{report.round}", contract.sha256), charges, last)
            refusals.append(str(refusal.value))

        outcome = run_over_grid(federation, on_round=spend)
        assert ["its cap is 1" in refusal for refusal in refusals] == [True, True]
        assert outcome.cohorts == [5, 5]
        assert outcome.profile is not None
        assert NAMES[2] in outcome.profile.merchants
        assert list(ledger.account().runs) == [outcome.run]
        spent = [event for _, event in charged(federation, 2, outcome)]
        assert epsilon(spent, contract.privacy.delta) <= contract.privacy.epsilon

    def test_a_run_that_is_closed_early_ends_a_merchants_part(
        self, federate: Federate, contract: Contract, run_over_grid: RunOverGrid
    ) -> None:
        """Its ledger refuses what comes later; the rest goes on, and its reason is kept."""
        federation = federate(contract)
        ledger = federation.members[2].worker.ledger

        def close(_report: RoundReport) -> None:
            (run,) = ledger.account().runs
            ledger.settle(run)

        outcome = run_over_grid(federation, on_round=close)
        assert outcome.cohorts == [5, 4]
        assert outcome.profile is not None
        assert NAMES[2] not in outcome.profile.merchants
        assert "this run is closed" in outcome.refusals[NAMES[2]]
        (refusal,) = entries_of(ledger, "refuse")
        assert (refusal["run"], refusal["stage"]) == (outcome.run, UPDATE)
        spent = [event for _, event in charged(federation, 2, outcome)]
        assert epsilon(spent, contract.privacy.delta) <= contract.privacy.epsilon

    def test_too_few_willing_merchants_end_the_run_with_names_and_reasons(
        self, federate: Federate, contract: Contract, run_over_grid: RunOverGrid
    ) -> None:
        """The message says who, why, and what the contract needs; nobody is charged."""
        federation = federate(contract, caps={0: 0.5, 1: 0.5, 3: 0.25})
        with pytest.raises(
            RunError, match=r"2 of 5 merchants take part, the contract needs 3"
        ) as e:
            run_over_grid(federation)
        for number in (0, 1, 3):
            assert NAMES[number] in str(e.value)
        assert "its cap is 0.25" in str(e.value)
        assert all(not member.worker.ledger.account().runs for member in federation.members)

    @only_secure
    def test_secure_sums_need_no_such_consent(
        self, federate: Federate, contract: Contract, run_over_grid: RunOverGrid
    ) -> None:
        """Who accepts no unmasked sums takes part in masked ones."""
        federation = federate(contract)
        federation.members[4].worker._accept_unmasked_sums = False
        assert run_over_grid(federation).merchants == NAMES

    @only_plain
    def test_a_policy_against_unmasked_sums_is_a_refusal(
        self, federate: Federate, contract: Contract, run_over_grid: RunOverGrid
    ) -> None:
        """The reason names the setting."""
        federation = federate(contract)
        federation.members[4].worker._accept_unmasked_sums = False
        outcome = run_over_grid(federation)
        assert "accept_unmasked_sums" in outcome.refusals[NAMES[4]]

    def test_another_contract_is_a_refusal(
        self, federate: Federate, contract: Contract, run_over_grid: RunOverGrid
    ) -> None:
        """A merchant that pinned another contract does not take part."""
        federation = federate(contract)
        federation.members[0].worker._contract_sha256 = "0" * 64
        outcome = run_over_grid(federation)
        assert "pinned contract 0000" in outcome.refusals[NAMES[0]]

    def test_a_refusal_in_anothers_name_does_not_stick_to_it(
        self, federate: Federate, contract: Contract, run_over_grid: RunOverGrid
    ) -> None:
        """A merchant that takes part is not reported as refusing because a stranger says so."""

        def tamper(message: Message, number: int, honest: Answer) -> Message:
            if number == 4 and message.metadata.message_type == "query.attest":
                return Message(pack(Attested(NAMES[0], "no thanks", False, 0)), reply_to=message)
            return honest(message)

        outcome = run_over_grid(federate(contract), tamper=tamper)
        assert NAMES[0] in outcome.merchants
        assert NAMES[0] not in outcome.refusals

    def test_a_refusal_that_leaves_too_few_charges_nobody_again(
        self, federate: Federate, contract: Contract, run_over_grid: RunOverGrid
    ) -> None:
        """Where a further attempt cannot succeed, the others do not pay for it."""

        def tamper(message: Message, number: int, honest: Answer) -> Message:
            if number < 3 and message.metadata.message_type == MESSAGE_TYPES[UPDATE]:
                nothing = np.zeros(0, dtype=np.uint32)
                refusal = SumAnswer(NAMES[number], "not today", False, b"", b"", nothing)
                return Message(pack(refusal), reply_to=message)
            return honest(message)

        federation = federate(contract)
        with pytest.raises(RunError, match=r"update of round 1: too few merchants"):
            run_over_grid(federation, tamper=tamper)
        paid = [stage for stage, _, _ in charges_of(federation.members[4].worker.ledger)]
        assert paid == [CENSUS, UPDATE]


class TestMissing:
    """Merchants that are not heard of."""

    @pytest.mark.parametrize("word", ["silent", "connection reset"])
    @pytest.mark.parametrize("stage", [CENSUS, UPDATE, EVALUATION, PROFILE])
    def test_a_missing_answer_is_left_out_with_a_reason(
        self,
        federate: Federate,
        contract: Contract,
        run_over_grid: RunOverGrid,
        stage: str,
        word: str,
    ) -> None:
        """The run goes on; the note names the merchant and what happened."""
        outcome = run_over_grid(federate(contract), fault=lost(3, stage, word=word))
        expected = "no answer within 0.02 s" if word == "silent" else word
        assert expected in outcome.failures[NAMES[3]]
        assert NAMES[3] in outcome.merchants
        sums = {EVALUATION: outcome.evaluations[0], PROFILE: outcome.profile}
        if stage == UPDATE:
            assert outcome.cohorts == [4, 4]
        if found := sums.get(stage):
            assert NAMES[3] not in found.merchants

    @pytest.mark.slow
    @only_secure
    @pytest.mark.parametrize("word", ["silent", "connection reset"])
    @pytest.mark.parametrize("stage", SESSION)
    def test_a_missing_step_of_a_session_is_survived(
        self,
        federate: Federate,
        contract: Contract,
        run_over_grid: RunOverGrid,
        stage: str,
        word: str,
    ) -> None:
        """Who does not set up is left out; who does not help to unmask was counted already."""
        federation = federate(contract)
        outcome = run_over_grid(federation, fault=lost(3, stage, word=word))
        expected = "no answer within 0.02 s" if word == "silent" else word
        assert expected in outcome.failures[NAMES[3]]
        counted = 5 if stage in {"confirm", "reveal"} else 4
        assert outcome.cohorts == [counted, counted]
        assert outcome.profile is not None
        assert (NAMES[3] in outcome.profile.merchants) == (counted == 5)
        paid = charged(federation, 3, outcome)
        assert paid == (outcome.events if counted == 5 else [])

    @pytest.mark.slow
    @only_secure
    @pytest.mark.parametrize("stage", [*SESSION, CENSUS, UPDATE, EVALUATION, PROFILE])
    def test_an_answer_that_is_lost_on_its_way_back_is_survived(
        self, federate: Federate, contract: Contract, run_over_grid: RunOverGrid, stage: str
    ) -> None:
        """The merchant believes that it did its part; the sum of the others is right all the same.

        Plain sums in which the same merchants are missing give the same model.
        """
        kind = MESSAGE_TYPES.get(stage, f"query.{stage}")
        out = stage in {"advertise", "share"}

        def tamper(message: Message, number: int, honest: Answer) -> Message:
            reply = honest(message)
            if number == 3 and message.metadata.message_type == kind:
                raise RuntimeError("lost on the way back")
            return reply

        def absent(message: Message) -> str | None:
            nonlocal out
            to_it = message.metadata.dst_node_id == 5
            out |= to_it and message.metadata.message_type == kind
            asked = message.metadata.message_type in MESSAGE_TYPES.values()
            return "gone" if out and to_it and asked else None

        found = run_over_grid(federate(contract, ledgers="a"), tamper=tamper)
        assert "lost on the way back" in found.failures[NAMES[3]]
        plain = contract.revised(aggregation={"secure": False})
        expected = run_over_grid(federate(plain, ledgers="b"), fault=absent)
        assert found.cohorts == expected.cohorts
        assert found.parameters.tobytes() == expected.parameters.tobytes()

    @pytest.mark.parametrize("word", ["silent", "connection reset"])
    def test_a_node_that_does_not_attest_is_not_asked_again(
        self, federate: Federate, contract: Contract, run_over_grid: RunOverGrid, word: str
    ) -> None:
        """Its node is noted, and nothing is charged to it."""
        federation = federate(contract)
        outcome = run_over_grid(federation, fault=lost(3, "attest", word=word))
        assert list(outcome.failures) == ["node 5"]
        assert NAMES[3] not in outcome.merchants
        assert charged(federation, 3, outcome) == []

    @only_secure
    def test_a_merchant_that_a_session_lost_comes_back_later(
        self, federate: Federate, contract: Contract, run_over_grid: RunOverGrid
    ) -> None:
        """A session goes on without it; the next one, ten sums on, has it again."""
        contract = contract.revised(training={"rounds": 7})
        federation = federate(contract)
        outcome = run_over_grid(federation, fault=lost(3, CENSUS))
        assert outcome.cohorts == [4, 4, 4, 4, 4, 5, 5]
        survivors = federation.members[0].worker.ledger.account().runs[outcome.run].survivors
        assert [survivors[UPDATE, number, 0] for number in range(1, 8)] == outcome.cohorts

    @only_plain
    def test_a_merchant_that_was_silent_once_comes_back(
        self, federate: Federate, contract: Contract, run_over_grid: RunOverGrid
    ) -> None:
        """Silence in one stage is not the end of its part."""
        outcome = run_over_grid(federate(contract), fault=lost(3, CENSUS))
        assert outcome.cohorts == [5, 5]

    def test_the_average_merchant_is_that_of_the_census(
        self, federate: Federate, contract: Contract, run_over_grid: RunOverGrid
    ) -> None:
        """Customers a merchant are the census divided by those who answered it."""
        told = []

        def tamper(message: Message, number: int, honest: Answer) -> Message:
            if message.metadata.message_type == MESSAGE_TYPES[UPDATE]:
                told.append(unpack(SumRequest, message.content).customers_per_merchant)
            return honest(message)

        fault = lost(3, CENSUS)
        outcome = run_over_grid(federate(contract), tamper=tamper, fault=fault)
        assert told[0] == pytest.approx(outcome.customers / 4)


class TestRetries:
    """Sums of too few parts."""

    @staticmethod
    def first_attempts_lost(stage: str) -> Callable[..., Message]:
        """Three of five merchants fail the first attempt of a stage, after they were charged."""

        def tamper(message: Message, number: int, honest: Answer) -> Message:
            reply = honest(message)
            if message.metadata.message_type != MESSAGE_TYPES[stage]:
                return reply
            if number < 3 and unpack(SumRequest, message.content).attempt == 0:
                raise RuntimeError("lost on the way back")
            return reply

        return tamper

    def test_a_failed_attempt_is_repeated_as_a_new_charge(
        self, federate: Federate, contract: Contract, run_over_grid: RunOverGrid
    ) -> None:
        """Both attempts are among the events, and every ledger agrees."""
        contract = contract.revised(training={"rounds": 1})
        federation = federate(contract)
        outcome = run_over_grid(federation, tamper=self.first_attempts_lost(UPDATE))
        assert [stage for stage, _ in outcome.events].count(UPDATE) == 2
        for number in range(5):
            assert charged(federation, number, outcome) == outcome.events
        assert outcome.cohorts == [5]

    def test_a_sum_of_too_few_never_enters_the_model(
        self, federate: Federate, contract: Contract, run_over_grid: RunOverGrid
    ) -> None:
        """Every cohort that is told holds at least min_survivors."""
        contract = contract.revised(training={"rounds": 1})
        outcome = run_over_grid(federate(contract), tamper=self.first_attempts_lost(EVALUATION))
        assert all(len(evaluation.merchants) >= 3 for evaluation in outcome.evaluations)

    def test_after_the_last_attempt_the_run_ends_with_names_and_reasons(
        self, federate: Federate, contract: Contract, run_over_grid: RunOverGrid
    ) -> None:
        """The message names stage, round, needed and found, who and why."""

        def fault(message: Message) -> str | None:
            far = message.metadata.dst_node_id > 3
            return (
                "broken cable" if far and message.metadata.message_type == "train.update" else None
            )

        with pytest.raises(RunError) as error:
            run_over_grid(federate(contract), fault=fault)
        for part in ("update of round 1", "too few merchants", "needs 3", NAMES[4], "broken cable"):
            assert part in str(error.value)

    def test_repeated_failures_never_pass_the_contracts_epsilon(
        self, federate: Federate, contract: Contract, run_over_grid: RunOverGrid
    ) -> None:
        """Merchants with larger caps are not charged more for a run than its contract promises."""
        contract = contract.revised(training={"rounds": 6, "spare_rounds": 2})
        federation = federate(contract, caps=dict.fromkeys(range(5), 50.0))
        with pytest.raises(RunError, match="epsilon"):
            run_over_grid(federation, tamper=self.first_attempts_lost(UPDATE))
        for member in federation.members:
            charges = charges_of(member.worker.ledger).values()
            events = merged(charge.event for charge in charges)
            assert len(charges) > 4
            assert epsilon(events, contract.privacy.delta) <= contract.privacy.epsilon * (1 + 1e-9)

    def test_many_reasons_are_cut_short(
        self, federate: Federate, contract: Contract, run_over_grid: RunOverGrid
    ) -> None:
        """Five are told, the others counted."""
        contract = contract.revised(federation={"min_merchants": 5})
        with pytest.raises(RunError, match=r"0 of 5 merchants take part"):
            run_over_grid(federate(contract), fault=lambda _message: "down")


class TestReportsOfEvents:
    """What a run says it cost covers what merchants paid, whatever goes wrong."""

    def test_a_merchant_that_misses_some_pays_less_than_is_told(
        self, federate: Federate, contract: Contract, run_over_grid: RunOverGrid
    ) -> None:
        """The coordinator's epsilon is that of those who answered everything."""
        federation = federate(contract)
        outcome = run_over_grid(federation, fault=lost(1, UPDATE))
        delta = contract.privacy.delta
        total = epsilon([event for _, event in outcome.events], delta)
        spent = [
            epsilon([event for _, event in charged(federation, number, outcome)], delta)
            for number in range(5)
        ]
        assert spent[0] == spent[2] == total
        assert spent[1] < total


def test_min_survivors_are_enough_to_start(
    federate: Federate, contract: Contract, run_over_grid: RunOverGrid
) -> None:
    """With one merchant of five missing at the start, a run that three can carry begins."""
    federation = federate(contract, caps={1: 0.5})
    assert (contract.federation.min_merchants, contract.min_survivors) == (5, 3)
    assert run_over_grid(federation).merchants == [NAMES[0], *NAMES[2:]]


@pytest.mark.parametrize(
    ("contract", "stage"),
    [("secure", "query.advertise"), ("secure", "query.share"), ("plain", "query.advertise")],
    indirect=["contract"],
)
def test_an_attempt_that_nobody_was_asked_for_is_not_counted(
    federate: Federate, contract: Contract, run_over_grid: RunOverGrid, stage: str
) -> None:
    """A session that could not be set up, or too few reservations, cost a number and no noise."""
    waiting = {2, 3, 4}

    def fault(message: Message) -> str | None:
        node = message.metadata.dst_node_id
        if message.metadata.message_type != stage or node not in waiting:
            return None
        waiting.discard(node)
        return "silent"

    federation = federate(contract)
    outcome = run_over_grid(federation, fault=fault)
    assert "nobody was asked" in outcome.failures["census of round 0"]
    assert [found for found, _ in outcome.events].count(CENSUS) == 1
    assert set(outcome.survivors) == {5}
    for number in range(5):
        assert charged(federation, number, outcome) == outcome.events


@pytest.mark.parametrize(
    "witness", [b"", Identity.generate("another").public], ids=["none", "another"]
)
def test_merchants_must_have_pinned_this_coordinator(
    federate: Federate, contract: Contract, witness: bytes
) -> None:
    """One whose countersignatures they would not accept does not begin."""
    federation = federate(contract)
    members = replace(federation.enrolled, witness=witness)
    grid = InProcessGrid(lambda _m, _c: None, 0, {})  # type: ignore[arg-type]
    archive = open_archive(federation.server)
    with pytest.raises(RunError, match="is not the key of the witness"):
        Coordinator(grid, contract, lambda _report: None, members, archive)
    assert not (federation.server / "runs").exists()


def test_a_stranger_is_in_no_sum(
    federate: Federate, contract: Contract, run_over_grid: RunOverGrid
) -> None:
    """The witness follows the ledgers of the enrolled only, whatever the sums are."""
    federation = federate(contract)
    keys = {name: key for name, key in federation.enrolled.keys.items() if name != NAMES[2]}
    federation = replace(federation, enrolled=replace(federation.enrolled, keys=keys))
    outcome = run_over_grid(federation)
    assert outcome.cohorts == [4, 4]
    assert outcome.failures[NAMES[2]] == f"field 'merchant': '{NAMES[2]}' is not enrolled"
    assert charged(federation, 2, outcome) == []


def test_a_ledger_that_was_put_back_is_found_out(
    federate: Federate, contract: Contract, run_over_grid: RunOverGrid
) -> None:
    """The merchant itself notices before it spends, and the run goes on without it."""
    federation = federate(contract, caps=dict.fromkeys(range(5), 50.0))
    worker = federation.members[2].worker
    path, party = worker.ledger.path, worker._secure
    assert party is not None
    worker.ledger.close()
    before = path.read_bytes()
    run_over_grid(federation)
    worker.ledger.close()
    path.write_bytes(before)
    worker.ledger = Ledger(path, worker.ledger.budget, party.identity, federation.enrolled.witness)
    outcome = run_over_grid(federation)
    assert outcome.cohorts == [4, 4]
    assert "the ledger was put back from a copy" in outcome.failures[NAMES[2]]
    assert not worker.ledger.account().runs


@only_plain
def test_an_answer_is_read_as_it_was_packed(
    federate: Federate, contract: Contract, run_over_grid: RunOverGrid
) -> None:
    """The parts of a sum are the merchants' vectors, in the unit of the sum."""
    contract = contract.revised(aggregation={"ring_bits": 32})
    sent: dict[str, np.ndarray] = {}

    def tamper(message: Message, number: int, honest: Answer) -> Message:
        reply = honest(message)
        if message.metadata.message_type == MESSAGE_TYPES[PROFILE]:
            answer = unpack(SumAnswer, reply.content)
            sent[answer.merchant] = answer.vector
        elif message.metadata.message_type == "query.attest":
            assert unpack(Attested, reply.content).merchant == NAMES[number]
        return reply

    outcome = run_over_grid(federate(contract), tamper=tamper)
    release = plan_of(contract).profile
    assert outcome.profile is not None
    assert release is not None
    assert sorted(sent) == NAMES
    step = lattice_of(release, contract).step
    for merchant, vector in sent.items():
        assert vector.dtype == np.uint32
        signed = np.where(vector < 2**31, vector.astype(float), vector.astype(float) - 2.0**32)
        np.testing.assert_array_equal(outcome.profile.parts[merchant], signed * step)


@pytest.mark.parametrize("stage", ["evaluation", "profile"])
def test_nothing_is_published_that_was_not_recorded(
    federate: Federate,
    run_over_grid: RunOverGrid,
    plain: Contract,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    """A sum that a run can do without is still charged: a full disk ends the run."""
    record = RunRecord.sum

    def full(self: RunRecord, total: Any, **fields: Any) -> None:
        if fields["stage"] == stage:
            raise ArchiveError("no space left")
        record(self, total, **fields)

    monkeypatch.setattr(RunRecord, "sum", full)
    federation = federate(plain)
    with pytest.raises(ArchiveError, match="no space left"):
        run_over_grid(federation)
    lines = next(federation.server.glob("runs/*/run.jsonl")).read_text()
    assert '"kind": "start"' in lines
    assert '"kind": "end"' not in lines
