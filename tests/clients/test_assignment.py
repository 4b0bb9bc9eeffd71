"""Tests of assignments: right, private, whole."""

import stat
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from clients.assignment import assign, write_assignments
from clients.features import encode
from clients.table import CustomerTable, make_table
from common.bundle import Bundle
from common.contract import Contract
from common.errors import DataError
from common.network import network_of


@pytest.fixture
def table(contract: Contract) -> CustomerTable:
    """Give three customers, one of them with unknown values."""
    frame = pd.DataFrame(
        {
            "customer_id": ["7", "8", "9"],
            "spend": [10.0, 4000.0, 0.0],
            "age": [30.0, 50.0, np.nan],
            "visits": [1.0, 2.0, 3.0],
            "member": [0, 1, 1],
            "plan": ["basic", "plus", None],
            "last_segment": ["low", "high", None],
        }
    )
    return make_table(frame, contract, source="test")


@pytest.fixture
def bundle(contract: Contract, tmp_path: Path) -> Bundle:
    """Give a published model with random parameters."""
    network = network_of(contract)
    theta = np.random.default_rng(0).normal(size=network.size)
    return Bundle(tmp_path / "bundle", contract, network, theta, "f" * 64, b"")


class TestAssign:
    """assign."""

    def test_columns(self, bundle: Bundle, table: CustomerTable) -> None:
        """The columns are the documented ones, in that order."""
        assert list(assign(bundle, table)) == [
            "customer",
            "segment_id",
            "segment",
            "probability",
            "margin",
            "previous_segment_id",
            "p_low",
            "p_high",
            "model_sha256",
        ]

    def test_values(self, bundle: Bundle, table: CustomerTable) -> None:
        """Segment, probability and margin follow from the network's probabilities."""
        result = assign(bundle, table)
        expected = bundle.network.probabilities(bundle.parameters, encode(table, bundle.contract))
        assert result["customer"].tolist() == ["7", "8", "9"]
        np.testing.assert_array_equal(result[["p_low", "p_high"]], expected)
        assert result["segment_id"].tolist() == expected.argmax(1).tolist()
        names = [bundle.contract.segments.names[k] for k in expected.argmax(1)]
        assert result["segment"].tolist() == names
        np.testing.assert_array_equal(result["probability"], expected.max(1))
        np.testing.assert_allclose(result["margin"], np.abs(expected[:, 0] - expected[:, 1]))
        assert set(result["model_sha256"]) == {"f" * 64}

    def test_previous(self, bundle: Bundle, table: CustomerTable) -> None:
        """Last period's segment is there where the table knows it."""
        assert assign(bundle, table)["previous_segment_id"].tolist() == [0, 1, -1]


class TestWrite:
    """write_assignments."""

    def test_both_files(self, bundle: Bundle, table: CustomerTable, tmp_path: Path) -> None:
        """Parquet and CSV hold the same rows, and nothing else is left behind."""
        result = assign(bundle, table)
        write_assignments(result, tmp_path / "out")
        parquet = pd.read_parquet(tmp_path / "out" / "assignments.parquet")
        csv = pd.read_csv(tmp_path / "out" / "assignments.csv", dtype={"customer": str})
        assert parquet["customer"].tolist() == csv["customer"].tolist() == ["7", "8", "9"]
        np.testing.assert_allclose(parquet["p_low"], csv["p_low"])
        assert len(list((tmp_path / "out").iterdir())) == 2

    def test_owner_only(self, bundle: Bundle, table: CustomerTable, tmp_path: Path) -> None:
        """Nobody else can read the files, also where older ones could be read."""
        (tmp_path / "assignments.csv").touch(mode=0o644)
        (tmp_path / ".assignments.csv.partial").touch(mode=0o666)
        write_assignments(assign(bundle, table), tmp_path)
        for path in tmp_path.iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def test_owner_only_from_the_start(
        self, bundle: Bundle, table: CustomerTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Even while a file grows nobody else can read it."""
        seen = []
        real = pd.DataFrame.to_csv

        def watched(frame: pd.DataFrame, path: Path, **options: bool) -> None:
            seen.append(stat.S_IMODE(path.stat().st_mode))
            real(frame, path, **options)  # type: ignore[call-overload]

        monkeypatch.setattr(pd.DataFrame, "to_csv", watched)
        write_assignments(assign(bundle, table), tmp_path)
        assert seen == [0o600]

    def test_folder_in_the_way(self, bundle: Bundle, table: CustomerTable, tmp_path: Path) -> None:
        """What cannot be written is a `DataError`, and no half-written file stays."""
        (tmp_path / "assignments.csv" / "x").mkdir(parents=True)
        with pytest.raises(DataError, match="cannot be written"):
            write_assignments(assign(bundle, table), tmp_path)
        assert not list(tmp_path.glob(".*"))

    def test_file_as_folder(self, bundle: Bundle, table: CustomerTable, tmp_path: Path) -> None:
        """A file is no folder."""
        (tmp_path / "out").touch()
        with pytest.raises(DataError, match="out: assignments cannot be written"):
            write_assignments(assign(bundle, table), tmp_path / "out")
