"""A published model applied to a merchant's own customers, on the merchant's own machine.

Assignments are customer data: they are written beside the merchant's table and never sent.
"""

import csv
import io
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from errno import EISDIR
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from clients.enrolment import pinned
from clients.features import encode_values
from clients.scoring import Scorer, largest_and_margin
from clients.table import CustomerBatch
from common.bundle import MANIFEST, Bundle
from common.errors import BundleError, DataError
from common.identity import read_members

_NAMES = ("assignments.parquet", "assignments.csv")


def check_signer(bundle: Bundle, folder: Path) -> bool:
    """Check who signed a bundle; return False where nothing is pinned to check it by.

    Args:
        bundle: The bundle.
        folder: The merchant's folder.

    Raises:
        BundleError: Not the coordinator that the merchant pinned.
        IdentityError: The pinned list of members cannot be read.
    """
    listed = pinned(folder, "members.toml")
    if not listed.is_file():
        return False
    witnesses = read_members(listed).witnesses
    if not any(witnesses):
        return False
    if bundle.signer not in witnesses:
        raise BundleError(
            f"{bundle.folder / MANIFEST}: is signed by {bundle.signer.hex()[:16]}…, not by the "
            f"coordinator that you pinned in {listed}; do not use it, and ask the coordinator"
        )
    return True


def assign(bundle: Bundle, scorer: Scorer, customers: CustomerBatch) -> pa.Table:
    """Return one row a customer: segment, probability, margin, all probabilities.

    Columns: `customer`, `segment_id`, `segment`, `probability` (of that segment), `margin` (to
    the second most probable), `previous_segment_id` where the table knows last period's, then
    `p_<segment>` for each segment, and `model_sha256`. Probabilities are float32.

    Args:
        bundle: The published model.
        scorer: Made of its network and parameters.
        customers: Validated against its contract.

    Raises:
        BundleError: The model's numbers are too large for float32.

    Guarantee: a customer's row depends on that customer and on the model alone.
    """
    names = bundle.contract.segments.names
    encoded = encode_values(customers.values, bundle.contract).astype(np.float32)
    scores = scorer.score(encoded)
    probability, margin = largest_and_margin(scores.probabilities)
    best = scores.segment_ids.astype(np.int64)
    columns: dict[str, pa.Array] = {
        "customer": pa.array(customers.customer_ids, pa.string()),
        "segment_id": pa.array(best),
        "segment": pa.DictionaryArray.from_arrays(pa.array(best, pa.int32()), list(names)),
        "probability": pa.array(probability),
        "margin": pa.array(margin),
    }
    if customers.previous is not None:
        columns["previous_segment_id"] = pa.array(customers.previous)
    for name, row in zip(names, scores.probabilities, strict=True):
        columns[f"p_{name}"] = pa.array(row)
    codes = pa.array(np.zeros(len(best), dtype=np.int32))
    columns["model_sha256"] = pa.DictionaryArray.from_arrays(codes, [bundle.model_sha256])
    return pa.table(columns)


def write_assignments(bundle: Bundle, batches: Iterable[CustomerBatch], folder: Path) -> int:
    """Write `assignments.parquet` and `assignments.csv`, readable by their owner only.

    Both are written a batch at a time, beside their places, and moved there when both are whole.

    Returns:
        How many customers were assigned.

    Raises:
        DataError: The folder cannot be written, or the batches cannot be read; what was in the
            folder is unchanged, and no half-written file is left.
        BundleError: The model's numbers are too large for float32.
    """
    places = {folder / name: folder / f".{name}.partial" for name in _NAMES}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for place, partial in places.items():
            if place.is_dir():
                raise IsADirectoryError(EISDIR, "a folder is in the way", str(place))
            partial.unlink(missing_ok=True)
            partial.touch(mode=0o600, exist_ok=False)  # nobody else can read it while it grows
        rows = _write(bundle, batches, *places.values())
        for place, partial in places.items():
            os.replace(partial, place)
    except OSError as error:
        raise DataError(f"{folder}: assignments cannot be written ({error})") from None
    finally:
        for partial in places.values():
            with suppress(OSError):
                partial.unlink()
    return rows


def _write(
    bundle: Bundle, batches: Iterable[CustomerBatch], parquet_path: Path, csv_path: Path
) -> int:
    scorer, rows = Scorer(bundle.network, bundle.parameters.astype(np.float32)), 0
    with ExitStack() as stack:
        text = stack.enter_context(csv_path.open("wb"))
        columns: pq.ParquetWriter | None = None
        for batch in batches:
            table = assign(bundle, scorer, batch)
            if columns is None:
                columns = stack.enter_context(_parquet(parquet_path, table.schema))
                text.write(_csv_line(table.column_names))
            columns.write_table(table)
            _append_csv(text, table)
            rows += table.num_rows
    return rows


def _parquet(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    repeating = [
        field.name for field in schema
        if pa.types.is_dictionary(field.type) or pa.types.is_integer(field.type)
    ]  # fmt: skip
    return pq.ParquetWriter(path, schema, use_dictionary=repeating)


def _csv_line(cells: Sequence[str]) -> bytes:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue().encode()


def _append_csv(file: BinaryIO, table: pa.Table) -> None:
    """Write rows with quotation marks around texts only where some text needs them."""
    texts = [
        field.with_type(pa.string()) if pa.types.is_dictionary(field.type) else field
        for field in table.schema
    ]
    plain = table.cast(pa.schema(texts))
    special = pc.match_substring_regex(plain["customer"], '[",\r\n]')
    named = pc.match_substring_regex(pa.array(table["segment"].chunk(0).dictionary), '[",\r\n]')
    quoted = pc.any(special).as_py() or pc.any(named).as_py()
    style = "needed" if quoted else "none"
    pa_csv.write_csv(plain, file, pa_csv.WriteOptions(include_header=False, quoting_style=style))
