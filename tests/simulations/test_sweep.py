"""A grid of simulations: which cells there are, what is computed, kept and tried again."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.contract import Contract
from common.errors import ContractError, DataError, ServiceError
from common.service_lock import locked
from simulations.datasets import load
from simulations.federation import assemble
from simulations.run import simulate
from simulations.sweep import Axes, grid, sweep
from simulations.sweep_cell import (
    Cell,
    Origin,
    Record,
    attempt,
    failed,
    read_records,
    record_path,
    write_record,
)

ORIGIN = Origin("synthetic", None, None, "smoke", 3, 0)
CHANCE = {"seconds", "peak_mib"}  # what differs between two runs of the same seed


@pytest.fixture(scope="module")
def contract() -> Contract:
    """Give a contract of two rounds for three merchants."""
    return ORIGIN.load(plain=False).contract.revised(
        training={"rounds": 2}, privacy={"epsilon": 20.0}
    )


def cells(contract: Contract, *epsilons: float, seed: int | None = 5, runs: int = 1) -> Any:
    """Return the cells of a small grid."""
    return grid([(ORIGIN, contract)], Axes(epsilons, repetitions=runs), seed)


def results(records: dict[str, Record]) -> dict[str, dict[str, Any]]:
    """Return what is the same whenever a seeded cell is run."""
    return {key: record.model_dump(exclude=CHANCE) for key, record in records.items()}


def run(found: Any, out: Path, workers: int = 2, *, keep: bool = False) -> dict[str, Record]:
    """Sweep without telling anybody."""
    return sweep(found, out, workers=workers, keep=keep, on_record=lambda _cell, _record: None)


class TestGrid:
    """Axes -> cells."""

    def test_every_combination_is_a_cell(self, contract: Contract) -> None:
        """Each once, with its own contract."""
        local = contract.revised(training={"mode": "local"})
        axes = Axes((1.0, 2.0), (0.5, 1.0), (0.1, 1.0), 2)
        found = grid([(ORIGIN, local)], axes, None)
        points = {
            (
                cell.contract.privacy.epsilon,
                cell.contract.privacy.clip_norm,
                cell.contract.training.sampling_rate,
                cell.contract.training.split_seed,
            )
            for cell in found
        }
        assert len(points) == len(found) == len({cell.key for cell in found}) == 16

    def test_an_empty_axis_is_the_contract_s_own_value(self, contract: Contract) -> None:
        """So nothing is varied that nobody asked for."""
        (cell,) = grid([(ORIGIN, contract)], Axes(), None)
        assert cell.contract == contract

    def test_the_first_runs_cover_the_whole_grid(self, contract: Contract) -> None:
        """Repetitions come last, each with a split and a seed of its own."""
        found = cells(contract, 1.0, 2.0, runs=2)
        split = contract.training.split_seed
        assert [cell.contract.training.split_seed - split for cell in found] == [0, 0, 1, 1]
        assert [cell.seed for cell in found] == [5, 5, 6, 6]

    def test_a_value_given_twice_is_one_cell(self, contract: Contract) -> None:
        """Nothing is computed twice."""
        assert len(cells(contract, 1.0, 1.0)) == 1

    @pytest.mark.parametrize(
        ("axes", "told"),
        [
            (Axes(epsilons=(1.0, -2.0)), r"epsilon -2: privacy\.epsilon"),
            (Axes(clip_norms=(0.0,)), r"clip_norm 0: privacy\.clip_norm"),
            (Axes(sampling_rates=(1.0, 0.1)), r"sampling_rate 0\.1: .*mode 'local'"),
        ],
    )
    def test_a_value_that_does_not_fit_is_named(
        self, contract: Contract, axes: Axes, told: str
    ) -> None:
        """With its axis, before anything runs."""
        with pytest.raises(ContractError, match=told):
            grid([(ORIGIN, contract)], axes, None)

    def test_a_number_of_merchants_that_does_not_fit_is_named(self) -> None:
        """As the other axes are."""
        with pytest.raises(DataError, match=r"^merchants 0: "):
            replace(ORIGIN, merchants=0).load(plain=False)

    def test_a_rate_is_refused_in_its_range_too(self, contract: Contract) -> None:
        """Mode 'local' takes rates up to 1."""
        local = contract.revised(training={"mode": "local"})
        with pytest.raises(ContractError, match=r"sampling_rate 1\.5"):
            grid([(ORIGIN, local)], Axes(sampling_rates=(1.5,)), None)


class TestKey:
    """What decides a cell, and nothing else, names it."""

    @pytest.mark.parametrize(
        "other",
        [
            {"seed": 6},
            {"seed": None},
            {"origin": replace(ORIGIN, seed=1)},
            {"origin": replace(ORIGIN, preset="small")},
            {"origin": replace(ORIGIN, partition="skewed")},
        ],
        ids=str,
    )
    def test_whatever_decides_the_result_changes_it(
        self, contract: Contract, other: dict[str, Any]
    ) -> None:
        """Seed and customers."""
        cell = Cell(ORIGIN, contract, 5)
        assert replace(cell, **other).key != cell.key

    @given(st.floats(0.01, 100).filter(lambda value: value != 20.0))
    def test_another_contract_is_another_cell(self, epsilon: float) -> None:
        """Of the same study, but not of the same configuration."""
        cell = Cell(ORIGIN, load("synthetic", preset="smoke", merchants=3).contract, 5)
        other = replace(cell, contract=cell.contract.revised(privacy={"epsilon": epsilon}))
        assert (other.key == cell.key) == (other.contract == cell.contract)
        assert (other.configuration == cell.configuration) == (other.contract == cell.contract)
        assert other.study == cell.study

    def test_a_default_that_is_spelled_out_is_the_same_cell(self, contract: Contract) -> None:
        """The first partition is the one that None stands for."""
        cell = Cell(ORIGIN, contract, 5)
        assert replace(cell, origin=replace(ORIGIN, partition="mild")).key == cell.key

    def test_repetitions_share_their_configuration(self, contract: Contract) -> None:
        """Splits and seeds differ, and that alone."""
        first, second = cells(contract, 1.0, runs=2)
        assert first.key != second.key
        assert first.configuration == second.configuration

    def test_other_rounds_are_another_study(self, contract: Contract) -> None:
        """They are no axis, so they do not belong in one picture."""
        cell = Cell(ORIGIN, contract, 5)
        longer = replace(cell, contract=contract.revised(training={"rounds": 3}))
        assert longer.study != cell.study


class TestRecord:
    """The files."""

    def test_a_record_is_read_as_it_was_written(self, contract: Contract, tmp_path: Path) -> None:
        """Every field, to the last bit."""
        record = Cell(ORIGIN, contract, None).record(accuracy=0.1 + 0.2, notes=["ä"], events=[{}])
        write_record(record, tmp_path)
        assert read_records(tmp_path) == {record.key: record}

    @pytest.mark.parametrize("text", ["", "{", "{}", '{"format": 2}'])
    def test_a_file_that_is_no_record_is_named(self, tmp_path: Path, text: str) -> None:
        """And how to go on."""
        (tmp_path / "cells").mkdir()
        (tmp_path / "cells" / "a.json").write_text(text)
        with pytest.raises(DataError, match=r"a\.json: .*delete it"):
            read_records(tmp_path)

    def test_a_record_under_another_name_is_refused(
        self, contract: Contract, tmp_path: Path
    ) -> None:
        """A copied file would count a run twice."""
        record = Cell(ORIGIN, contract, None).record()
        write_record(record, tmp_path)
        record_path(tmp_path, record.key).rename(record_path(tmp_path, "other"))
        with pytest.raises(DataError, match="another cell"):
            read_records(tmp_path)


class TestAttempt:
    """One run."""

    def test_it_is_what_simulate_gives(self, contract: Contract, tmp_path: Path) -> None:
        """The same code, so the same figures."""
        (tmp_path / "direct").mkdir()
        (tmp_path / "cell").mkdir()
        federation = assemble(ORIGIN.load(plain=False), contract, tmp_path / "direct", 5)
        result = simulate(federation, tmp_path / "direct", lambda _record, _rounds: None)
        record = attempt(Cell(ORIGIN, contract, 5), tmp_path / "cell")
        assert record.status == "done"
        assert record.accuracy is not None
        assert (record.accuracy, record.accuracy_error, record.macro_f1) == (
            result.metrics["accuracy"],
            result.metrics["accuracy_error"],
            result.metrics["macro_f1"],
        )
        assert (record.epsilon_spent, record.epsilon_server, record.epsilon_achieved) == (
            result.epsilon,
            result.epsilon_server,
            result.achieved.epsilon,
        )
        assert (record.epsilon, record.delta, record.rounds, record.refused) == (
            contract.privacy.epsilon,
            contract.privacy.delta,
            2,
            0,
        )

    def test_an_error_for_people_is_the_reason(self, contract: Contract, tmp_path: Path) -> None:
        """In one line; the ring has room for one customer only."""
        crowded = contract.revised(aggregation={"max_customers": 1})
        record = attempt(Cell(ORIGIN, crowded, 5), tmp_path)
        assert record.status == "failed"
        assert "max_customers" in (record.reason or "")
        assert "\n" not in (record.reason or "")
        assert record.accuracy is None


class TestSweep:
    """Many runs, in processes of their own."""

    @pytest.mark.slow
    def test_two_workers_give_what_one_gives(self, contract: Contract, tmp_path: Path) -> None:
        """Bit for bit, with a seed."""
        found = cells(contract, 5.0, 20.0, runs=2)
        one, two = (run(found, tmp_path / str(n), n) for n in (1, 2))
        assert len(one) == 4
        assert results(one) == results(two)
        assert all(record.accuracy is not None for record in one.values() if record.epsilon == 20)

    @pytest.mark.slow
    def test_other_seeds_give_other_figures(self, contract: Contract, tmp_path: Path) -> None:
        """So that the comparison above can fail."""
        found = [run(cells(contract, 20.0, seed=s), tmp_path / str(s)) for s in (5, 6)]
        accuracies = [{record.accuracy for record in records.values()} for records in found]
        assert accuracies[0] != accuracies[1]

    @pytest.mark.slow
    def test_finished_cells_are_not_computed_again(
        self, contract: Contract, tmp_path: Path
    ) -> None:
        """A larger grid adds its cells and keeps the others, byte for byte."""
        first = run(cells(contract, 20.0), tmp_path)
        before = {key: record_path(tmp_path, key).read_bytes() for key in first}
        told: list[str] = []
        both = sweep(
            cells(contract, 20.0, 40.0),
            tmp_path,
            workers=1,
            keep=False,
            on_record=lambda cell, _record: told.append(cell.key),
        )
        assert len(both) == 2
        assert set(told) == set(both) - set(first)
        assert all(record_path(tmp_path, key).read_bytes() == was for key, was in before.items())
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "cells"]

    @pytest.mark.slow
    def test_a_failed_cell_is_tried_again(self, contract: Contract, tmp_path: Path) -> None:
        """And counts as two attempts."""
        (cell,) = cells(contract, 20.0)
        write_record(failed(cell, "the disk was full"), tmp_path)
        record = run([cell], tmp_path)[cell.key]
        assert (record.status, record.reason, record.attempts) == ("done", None, 2)

    @pytest.mark.slow
    def test_a_cell_that_fails_leaves_the_others(self, contract: Contract, tmp_path: Path) -> None:
        """Its reason is kept."""
        crowded = contract.revised(aggregation={"max_customers": 1})
        found = [*cells(contract, 20.0), *cells(crowded, 20.0)]
        records = run(found, tmp_path)
        assert [records[cell.key].status for cell in found] == ["done", "failed"]
        assert "max_customers" in (records[found[1].key].reason or "")
        assert results(read_records(tmp_path)) == results(records)

    @pytest.mark.slow
    def test_a_process_that_dies_is_a_failed_cell(self, contract: Contract, tmp_path: Path) -> None:
        """Its last words are in the reason and in a log, and the others go on."""
        broken = replace(ORIGIN, merchants="3")  # type: ignore[arg-type]  # a fault of ours
        found = [Cell(broken, contract, 5), *cells(contract, 40.0)]
        records = run(found, tmp_path)
        record = records[found[0].key]
        assert record.status == "failed"
        assert "exit code 1: TypeError" in (record.reason or "")
        log = tmp_path / "logs" / f"{record.key}.log"
        assert str(log) in (record.reason or "")
        assert "Traceback" in log.read_text()
        assert records[found[1].key].status == "done"

    @pytest.mark.slow
    def test_a_run_s_folder_is_kept_when_asked(self, contract: Contract, tmp_path: Path) -> None:
        """With every merchant's ledger, and the contract that the key stands for."""
        (key,) = run(cells(contract, 20.0), tmp_path, keep=True)
        folder = tmp_path / "runs" / key
        assert len(list(folder.glob("merchants/*/ledger.sqlite"))) == 3
        assert (folder / "bundle" / "privacy.json").is_file()
        assert json.loads((folder / "bundle/privacy.json").read_text())["epsilon_cap"] == 20.0

    def test_a_folder_of_something_else_is_left_alone(
        self, contract: Contract, tmp_path: Path
    ) -> None:
        """Nothing is written among a stranger's files."""
        (tmp_path / "thesis.txt").write_text("mine")
        with pytest.raises(DataError, match="something else"):
            run(cells(contract, 1.0), tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]

    def test_there_is_one_sweep_in_a_folder(self, contract: Contract, tmp_path: Path) -> None:
        """A second one is told who is there."""
        with locked(tmp_path, ".lock"), pytest.raises(ServiceError, match="runs here already"):
            run(cells(contract, 1.0), tmp_path)

    def test_no_workers_is_wrong(self, contract: Contract, tmp_path: Path) -> None:
        """Nobody waits for ever."""
        with pytest.raises(DataError, match="workers >= 1, got 0"):
            run(cells(contract, 1.0), tmp_path, 0)
