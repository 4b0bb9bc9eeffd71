"""Merchants made of arrays: the same as of tables, and nothing that reads tables is needed."""

import gc
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.simulation import write_workload
from clients.joining import customers_of
from clients.worker import Customers
from common.errors import ContractError, DataError
from common.network import parameters_sha256
from simulations.datasets import Dataset, load
from simulations.federation import assemble, tables_of
from simulations.members import Federation, made_federation
from simulations.rounds import run_rounds
from simulations.run import simulate

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """Generate three merchants who train for two rounds."""
    found = load("synthetic", preset="smoke", merchants=3, warm=True)
    contract = found.contract.revised(training={"rounds": 2, "spare_rounds": 1})
    return replace(found, contract=contract)


@pytest.fixture
def customers(dataset: Dataset) -> dict[str, Customers]:
    """Return the merchants' customers as arrays."""
    tables = tables_of(dataset, dataset.contract)
    return {name: customers_of(table, dataset.contract) for name, table in tables.items()}


def test_arrays_and_tables_end_in_the_same_model(
    dataset: Dataset, customers: dict[str, Customers], tmp_path: Path
) -> None:
    """With the same seed, in the same bytes."""
    contract = dataset.contract

    def model(federation: Federation, name: str) -> str:
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        return parameters_sha256(run_rounds(federation, out, lambda _report: None).parameters)

    arrays = made_federation("arrays", customers, contract, tmp_path / "a", 5, dataset.start)
    assert arrays.tables == {}
    assert [member.worker.customers for member in arrays.members] == [
        len(own.labels) for own in customers.values()
    ]
    tables = assemble(dataset, contract, tmp_path / "b", 5)
    assert model(arrays, "a") == model(tables, "b")


def test_the_start_is_the_contracts(
    dataset: Dataset, customers: dict[str, Customers], tmp_path: Path
) -> None:
    """A contract that names parameters does not begin without them; nothing is made."""
    with pytest.raises(ContractError, match="arrays"):
        made_federation("arrays", customers, dataset.contract, tmp_path, 5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("inputs", lambda a: a[:, 1:], "inputs"),
        ("inputs", lambda a: a[1:], "one label"),
        ("inputs", lambda a: np.where(a == a[0, 0], 1.001, a), "between -1 and 1"),
        ("inputs", lambda a: np.where(a == a[0, 0], np.nan, a), "between -1 and 1"),
        ("held_out", lambda a: a[1:], "one side of the split"),
        ("labels", lambda a: np.full_like(a, 4), "labels from 0 to 3"),
        ("labels", lambda a: np.full_like(a, -2), "-1 if not known"),
        ("labels", lambda a: a.astype(float), "labels as integer"),
        ("held_out", lambda a: a.astype(int), "held_out as bool"),
        ("held_out", lambda a: np.full(a.shape, "no"), "held_out as bool"),
        ("inputs", lambda a: a.astype(complex), "inputs as float"),
        ("inputs", lambda a: a.astype(object), "inputs as float"),
        ("labels", lambda a: a[:, None], "the shapes"),
    ],
)
def test_arrays_that_are_no_customers_are_refused(
    dataset: Dataset, customers: dict[str, Customers], tmp_path: Path, field, change, message
) -> None:  # fmt: skip
    """By merchant, before anything is made."""
    name, own = next(iter(customers.items()))
    wrong = {**customers, name: replace(own, **{field: change(getattr(own, field))})}
    with pytest.raises(DataError, match=f"arrays/{name}: .*{message}"):
        made_federation("arrays", wrong, dataset.contract, tmp_path, 5, dataset.start)
    assert list(tmp_path.iterdir()) == []


def test_ids_are_no_paths(
    dataset: Dataset, customers: dict[str, Customers], tmp_path: Path
) -> None:
    """A merchant's folder lies where all merchants' folders lie."""
    wrong = {"../elsewhere": next(iter(customers.values()))}
    with pytest.raises(DataError, match=r"arrays: expected ids .*got '\.\./elsewhere'"):
        made_federation("arrays", wrong, dataset.contract, tmp_path, 5, dataset.start)
    assert list(tmp_path.iterdir()) == []


def test_unsigned_labels_are_labels(
    dataset: Dataset, customers: dict[str, Customers], tmp_path: Path
) -> None:
    """Of any size that numpy has, where all are known."""
    known = {
        name: Customers(own.inputs, np.maximum(own.labels, 0).astype(np.uint8), own.held_out)
        for name, own in customers.items()
    }
    federation = made_federation("a", known, dataset.contract, tmp_path, 5, dataset.start)
    for member, own in zip(federation.members, known.values(), strict=True):
        assert member.worker.training_customers == (~own.held_out).sum()


def test_too_many_customers(
    dataset: Dataset, customers: dict[str, Customers], tmp_path: Path
) -> None:
    """More than the contract has room for: before anything is made."""
    contract = dataset.contract.revised(aggregation={"max_customers": 10})
    with pytest.raises(
        DataError,
        match=r"arrays/merchant-0000: \d+ customers are more than the contract has room for",
    ):
        made_federation("arrays", customers, contract, tmp_path, 5, dataset.start)
    assert list(tmp_path.iterdir()) == []


def test_a_simulation_of_arrays(
    dataset: Dataset, customers: dict[str, Customers], tmp_path: Path
) -> None:
    """Bundle, evidence and result as of any; nobody is assigned where there are no tables."""
    out = tmp_path / "out"
    federation = made_federation("a", customers, dataset.contract, out, 5, dataset.start)
    result = simulate(federation, out, lambda _record, _rounds: None)
    assert [one.customers for one in result.merchants] == [
        len(own.labels) for own in customers.values()
    ]
    assert 0 < result.epsilon <= dataset.contract.privacy.epsilon
    assert (result.bundle / "model.safetensors").is_file()
    assert len(list((out / "evidence" / "merchants").iterdir())) == len(customers)
    assert not list(out.rglob("assignments*"))


def test_nobody_to_train_on(
    dataset: Dataset, customers: dict[str, Customers], tmp_path: Path
) -> None:
    """Of arrays no column is spoken of."""
    none = {n: replace(own, labels=np.full_like(own.labels, -1)) for n, own in customers.items()}
    federation = made_federation("a", none, dataset.contract, tmp_path, 5, dataset.start)
    with pytest.raises(DataError, match="a: no merchant has a customer with a known") as told:
        simulate(federation, tmp_path, lambda _record, _rounds: None)
    assert "column" not in str(told.value)


@pytest.mark.parametrize(
    ("own", "during"), [(700, 20_000), (0, 0), (50_000, 50_000)], ids=["usual", "off", "more"]
)
@pytest.mark.parametrize("breaks", [False, True])
def test_garbage_collection_is_as_it_was(
    dataset: Dataset, customers: dict[str, Customers], tmp_path: Path, breaks, own, during
) -> None:  # fmt: skip
    """Seldom while rounds are carried out; afterwards as the caller had it, whatever happened."""
    before, found = gc.get_threshold(), set()
    federation = made_federation("a", customers, dataset.contract, tmp_path, 5, dataset.start)

    def on_round(_report: object) -> None:
        found.add(gc.get_threshold())
        if breaks:
            raise KeyboardInterrupt

    gc.set_threshold(own, *before[1:])
    try:
        with pytest.raises(KeyboardInterrupt) if breaks else nullcontext():
            run_rounds(federation, tmp_path, on_round)
        assert gc.get_threshold() == (own, *before[1:])
    finally:
        gc.set_threshold(*before)
    assert found == {(during, *before[1:])}


def test_nothing_that_reads_tables_is_imported(tmp_path: Path) -> None:
    """Neither pandas nor pyarrow, 70 MiB of memory, where a run is carried out on arrays."""
    write_workload(tmp_path, merchants=3, rows=70, rounds=2, cohort=3)
    script = (
        "import sys\n"
        "from benchmarks.simulation_ours import main\n"
        f"sys.argv[1:] = ['engine', {str(tmp_path)!r}]\n"
        "main()\n"
        "print(sorted({'pandas', 'pyarrow', 'torch', 'opacus'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
