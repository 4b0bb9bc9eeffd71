"""Tests of assignments: right, private, whole."""

import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.numpy import save

from clients.assignment import assign, write_assignments
from clients.batches import in_batches
from clients.features import encode
from clients.scoring import Scorer
from clients.table import CustomerBatch, CustomerTable, make_table
from common.bundle import Bundle, read_bundle, write_bundle
from common.contract import Contract, contract_toml, parse_contract
from common.errors import BundleError, DataError
from common.network import network_of
from common.onnx_model import onnx_bytes

NAMES = ("assignments.parquet", "assignments.csv")


def table_of(contract: Contract, ids: list[str]) -> CustomerTable:
    """Make customers, every third of them with unknown values."""
    rows = range(len(ids))
    frame = pd.DataFrame(
        {
            "customer_id": ids,
            "spend": [(row * 37.5) % 5000 for row in rows],
            "age": [np.nan if row % 3 == 2 else 20.0 + row % 70 for row in rows],
            "visits": [float(row % 50) for row in rows],
            "member": [row % 2 for row in rows],
            "plan": [("basic", "plus", None)[row % 3] for row in rows],
            "last_segment": [("low", "high", None)[row % 3] for row in rows],
        }
    )
    return make_table(frame, contract, source="test")


@pytest.fixture
def table(contract: Contract) -> CustomerTable:
    """Give three customers, one of them with unknown values."""
    return table_of(contract, ["7", "8", "9"])


@pytest.fixture
def bundle(contract: Contract, tmp_path: Path) -> Bundle:
    """Give a published model with random parameters."""
    network = network_of(contract)
    theta = np.random.default_rng(0).normal(size=network.size).astype(np.float32)
    files = {
        "contract.toml": contract_toml(contract).encode(),
        "model.safetensors": save({"parameters": theta}),
        "model.onnx": onnx_bytes(network, theta.astype(np.float64)),
    }
    write_bundle(tmp_path / "bundle", files, Ed25519PrivateKey.generate())
    return read_bundle(tmp_path / "bundle")


def assigned(bundle: Bundle, table: CustomerTable) -> pd.DataFrame:
    """Assign a table's customers in one batch."""
    (batch,) = in_batches(table)
    return assign(bundle, Scorer(bundle.network, bundle.parameters), batch).to_pandas()


def read(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read what was written, as an analyst would."""
    csv = pd.read_csv(folder / NAMES[1], dtype={"customer": str}, keep_default_na=False)
    return pd.read_parquet(folder / NAMES[0]), csv


class TestAssign:
    """assign."""

    def test_columns(self, bundle: Bundle, table: CustomerTable) -> None:
        """The columns are the documented ones, in that order."""
        assert list(assigned(bundle, table)) == [
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
        result = assigned(bundle, table)
        expected = bundle.network.probabilities(bundle.parameters, encode(table, bundle.contract))
        assert result["customer"].tolist() == ["7", "8", "9"]
        np.testing.assert_allclose(result[["p_low", "p_high"]], expected, atol=1e-6)
        assert result["segment_id"].tolist() == expected.argmax(1).tolist()
        names = [bundle.contract.segments.names[k] for k in expected.argmax(1)]
        assert result["segment"].tolist() == names
        np.testing.assert_allclose(result["probability"], expected.max(1), atol=1e-6)
        margin = np.abs(expected[:, 0] - expected[:, 1])
        np.testing.assert_allclose(result["margin"], margin, atol=1e-6)
        assert set(result["model_sha256"]) == {bundle.model_sha256}

    def test_agrees_with_the_published_onnx_model(self, bundle: Bundle) -> None:
        """Whoever applies the bundle's model.onnx to encoded customers gets the same."""
        table = table_of(bundle.contract, [str(number) for number in range(5000)])
        session = onnxruntime.InferenceSession(bundle.folder / "model.onnx")
        inputs = encode(table, bundle.contract).astype(np.float32)
        expected = session.run(None, {"inputs": inputs})[0]
        result = assigned(bundle, table)
        np.testing.assert_allclose(result[["p_low", "p_high"]], expected, atol=1e-6)
        sure = np.abs(expected[:, 0] - expected[:, 1]) > 1e-6
        assert sure.mean() > 0.99
        assert len(set(expected.argmax(1))) == 2
        np.testing.assert_array_equal(result["segment_id"][sure], expected.argmax(1)[sure])

    def test_previous(self, bundle: Bundle, table: CustomerTable) -> None:
        """Last period's segment is there where the table knows it."""
        assert assigned(bundle, table)["previous_segment_id"].tolist() == [0, 1, -1]


class TestWrite:
    """write_assignments."""

    def test_both_files(self, bundle: Bundle, table: CustomerTable, tmp_path: Path) -> None:
        """Parquet and CSV hold the same rows, and nothing else is left behind."""
        assert write_assignments(bundle, in_batches(table), tmp_path / "out") == 3
        parquet, csv = read(tmp_path / "out")
        assert parquet["customer"].tolist() == csv["customer"].tolist() == ["7", "8", "9"]
        assert list(parquet) == list(csv)
        assert parquet["segment"].tolist() == csv["segment"].tolist()
        np.testing.assert_array_equal(parquet["p_low"], csv["p_low"].astype(np.float32))
        assert {path.name for path in (tmp_path / "out").iterdir()} == set(NAMES)

    def test_a_row_is_the_same_wherever_it_stands(
        self, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """To the last byte of both files, alone, in the middle of others, in other batches."""
        ids = [f"c{number}" for number in range(40_000)]
        table = table_of(bundle.contract, ids)
        write_assignments(bundle, in_batches(table), tmp_path / "all")
        monkeypatch.setattr("clients.batches.BATCH_ROWS", 7777)
        write_assignments(bundle, in_batches(table), tmp_path / "cut")
        lines = (tmp_path / "all" / NAMES[1]).read_bytes()
        assert lines == (tmp_path / "cut" / NAMES[1]).read_bytes()
        whole = pq.read_table(tmp_path / "all" / NAMES[0])
        assert whole.equals(pq.read_table(tmp_path / "cut" / NAMES[0]))
        for row in (0, 123, 16_384, 39_999):
            batch = CustomerBatch(
                table.customer_ids[row : row + 1],
                table.values.iloc[row : row + 1],
                None if table.previous is None else table.previous[row : row + 1],
            )
            write_assignments(bundle, [batch], tmp_path / "one")
            alone = (tmp_path / "one" / NAMES[1]).read_bytes().splitlines()
            assert alone == [lines.splitlines()[0], lines.splitlines()[row + 1]]
            one = pq.read_table(tmp_path / "one" / NAMES[0])
            assert one.equals(whole.slice(row, 1))

    def test_a_row_group_for_each_batch(
        self, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Batches are written as they come, not put together first."""
        monkeypatch.setattr("clients.batches.BATCH_ROWS", 4)
        sizes = []

        def watched() -> Iterator[CustomerBatch]:
            for batch in in_batches(table_of(bundle.contract, [str(row) for row in range(10)])):
                yield batch
                sizes.append((tmp_path / ".assignments.parquet.partial").stat().st_size)

        write_assignments(bundle, watched(), tmp_path)
        assert pq.ParquetFile(tmp_path / NAMES[0]).num_row_groups == 3
        assert sizes == sorted(set(sizes))

    @pytest.mark.parametrize(
        "ids", [['"', "a"], ["a,b", "a"], ["a\nb", "a"], ["'", " x y"], ["NA", "ü"]]
    )
    def test_ids_of_every_kind(self, bundle: Bundle, tmp_path: Path, ids: list[str]) -> None:
        """Quotation marks are set where they are needed."""
        ids = [name.strip() for name in ids]
        write_assignments(bundle, in_batches(table_of(bundle.contract, ids)), tmp_path)
        parquet, csv = read(tmp_path)
        assert parquet["customer"].tolist() == csv["customer"].tolist() == ids

    def test_plain_texts_have_no_quotation_marks(
        self, bundle: Bundle, table: CustomerTable, tmp_path: Path
    ) -> None:
        """The usual file is as plain as it can be."""
        write_assignments(bundle, in_batches(table), tmp_path)
        header, *rows = (tmp_path / NAMES[1]).read_text(encoding="utf-8").splitlines()
        assert header == ",".join(assigned(bundle, table))
        assert [row.split(",")[0] for row in rows] == ["7", "8", "9"]
        assert '"' not in "".join(rows)

    def test_segments_of_every_kind(self, contract: Contract, tmp_path: Path) -> None:
        """Names with commas and quotation marks come back, in cells and in the header."""
        names = ['the "low", mostly', "high"]
        document = contract.model_dump(exclude_unset=True)
        document["segments"] = {"names": names, "previous_column": "last_segment"}
        odd = parse_contract(document, source="test")
        network = network_of(odd)
        theta = np.zeros(network.size)
        bundle = Bundle(tmp_path / "bundle", odd, network, theta, "f" * 64, b"")
        table = table_of(contract, ["1", "2"])
        write_assignments(bundle, in_batches(table), tmp_path)
        parquet, csv = read(tmp_path)
        assert parquet["segment"].tolist() == csv["segment"].tolist() == [names[0]] * 2
        assert f"p_{names[0]}" in csv
        assert list(parquet) == list(csv)

    def test_nobody(self, bundle: Bundle, table: CustomerTable, tmp_path: Path) -> None:
        """Without customers both files have columns and no rows."""
        (batch,) = in_batches(table)
        previous = None if batch.previous is None else batch.previous[:0]
        nobody = CustomerBatch(batch.customer_ids[:0], batch.values.iloc[:0], previous)
        assert write_assignments(bundle, [nobody], tmp_path) == 0
        parquet, csv = read(tmp_path)
        assert list(parquet) == list(csv) == list(assigned(bundle, table))
        assert len(parquet) == len(csv) == 0

    def test_owner_only(self, bundle: Bundle, table: CustomerTable, tmp_path: Path) -> None:
        """Nobody else can read the files, also where older ones could be read."""
        out = tmp_path / "out"
        out.mkdir()
        (out / NAMES[1]).touch(mode=0o644)
        (out / ".assignments.csv.partial").touch(mode=0o666)
        write_assignments(bundle, in_batches(table), out)
        assert [stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()] == [0o600] * 2

    def test_owner_only_from_the_start(
        self, bundle: Bundle, table: CustomerTable, tmp_path: Path
    ) -> None:
        """Even while the files grow nobody else can read them."""
        seen = []

        def watched() -> Iterator[CustomerBatch]:
            for batch in in_batches(table):
                yield batch
                seen.extend(path.stat().st_mode for path in tmp_path.glob(".assignments.*"))

        write_assignments(bundle, watched(), tmp_path)
        assert [stat.S_IMODE(mode) for mode in seen] == [0o600] * 2

    @pytest.mark.parametrize("error", [DataError("row 5"), KeyboardInterrupt(), OSError("full")])
    def test_a_failure_on_the_way_leaves_everything_as_it_was(
        self, bundle: Bundle, table: CustomerTable, tmp_path: Path, error: BaseException
    ) -> None:
        """Older assignments stay whole, and no half-written file is left."""
        out = tmp_path / "out"
        write_assignments(bundle, in_batches(table), out)
        before = {path.name: path.read_bytes() for path in out.iterdir()}

        def broken() -> Iterator[CustomerBatch]:
            yield from in_batches(table_of(bundle.contract, ["a", "b"]))
            raise error

        with pytest.raises(DataError if isinstance(error, Exception) else type(error)):
            write_assignments(bundle, broken(), out)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    def test_a_disk_that_is_full(
        self, bundle: Bundle, table: CustomerTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What cannot be written is a `DataError`, and nothing is left."""

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
        with pytest.raises(DataError, match=r"cannot be written.*No space left"):
            write_assignments(bundle, in_batches(table), tmp_path / "out")
        assert not list((tmp_path / "out").iterdir())

    def test_a_model_that_is_too_large(
        self, contract: Contract, table: CustomerTable, tmp_path: Path
    ) -> None:
        """It is refused, and nothing is left."""
        network = network_of(contract)
        theta = np.full(network.size, 3e38)
        bundle = Bundle(tmp_path / "bundle", contract, network, theta, "f" * 64, b"")
        with pytest.raises(BundleError, match="too large"):
            write_assignments(bundle, in_batches(table), tmp_path / "out")
        assert not list((tmp_path / "out").iterdir())

    def test_folder_in_the_way(self, bundle: Bundle, table: CustomerTable, tmp_path: Path) -> None:
        """It is told before anything is read or replaced."""
        out = tmp_path / "out"
        write_assignments(bundle, in_batches(table), out)
        (out / NAMES[1]).unlink()
        (out / NAMES[1] / "x").mkdir(parents=True)
        before = (out / NAMES[0]).read_bytes()

        def unread() -> Iterator[CustomerBatch]:
            yield from pytest.fail("the customers were read")

        with pytest.raises(DataError, match="cannot be written"):
            write_assignments(bundle, unread(), out)
        assert (out / NAMES[0]).read_bytes() == before
        assert not list(out.glob(".*"))

    def test_file_as_folder(self, bundle: Bundle, table: CustomerTable, tmp_path: Path) -> None:
        """A file is no folder."""
        (tmp_path / "out").touch()
        with pytest.raises(DataError, match="out: assignments cannot be written"):
            write_assignments(bundle, in_batches(table), tmp_path / "out")

    def test_memory_does_not_grow(self, bundle: Bundle, tmp_path: Path) -> None:
        """After ten times the batches Arrow held no more at once than after two."""
        (batch,) = in_batches(table_of(bundle.contract, [str(row) for row in range(10_000)]))
        most = []
        for count in (2, 20):
            held = []

            def watched(times: int = count, held: list[int] = held) -> Iterator[CustomerBatch]:
                for _ in range(times):
                    yield batch
                    held.append(pa.total_allocated_bytes())

            before = pa.total_allocated_bytes()
            assert write_assignments(bundle, watched(), tmp_path) == count * 10_000
            most.append(max(held) - before)
        assert most[1] < 2 * most[0]
