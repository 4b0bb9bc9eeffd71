"""A published model applied to a merchant's own customers, on the merchant's own machine.

Assignments are customer data: they are written beside the merchant's table and never sent.
"""

import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd

from clients.enrolment import pinned
from clients.features import encode
from clients.table import CustomerTable
from common.bundle import MANIFEST, Bundle
from common.errors import BundleError, DataError
from common.identity import read_members


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


def assign(bundle: Bundle, table: CustomerTable) -> pd.DataFrame:
    """Return one row a customer: segment, probability, margin, all probabilities.

    Columns: `customer`, `segment_id`, `segment`, `probability` (of that segment), `margin` (to
    the second most probable), `previous_segment_id` where the table knows last period's, then
    `p_<segment>` for each segment, and `model_sha256`.
    """
    names = bundle.contract.segments.names
    probabilities = bundle.network.probabilities(bundle.parameters, encode(table, bundle.contract))
    best = probabilities.argmax(axis=1)
    ordered = np.sort(probabilities, axis=1)
    columns: dict[str, object] = {
        "customer": table.customer_ids,
        "segment_id": best,
        "segment": pd.Categorical.from_codes(best, categories=pd.Index(list(names))),
        "probability": ordered[:, -1],
        "margin": ordered[:, -1] - ordered[:, -2],
    }
    if table.previous is not None:
        columns["previous_segment_id"] = table.previous
    for number, name in enumerate(names):
        columns[f"p_{name}"] = probabilities[:, number]
    columns["model_sha256"] = pd.Categorical.from_codes(
        np.zeros(len(best), dtype=np.int64), categories=pd.Index([bundle.model_sha256])
    )
    return pd.DataFrame(columns)


def write_assignments(assignments: pd.DataFrame, folder: Path) -> None:
    """Write `assignments.parquet` and `assignments.csv`, readable by their owner only.

    Raises:
        DataError: The folder cannot be written; no half-written file is left.
    """
    names = ("assignments.parquet", "assignments.csv")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            partial = folder / f".{name}.partial"
            partial.unlink(missing_ok=True)
            partial.touch(mode=0o600, exist_ok=False)  # nobody else can read it while it grows
            if name.endswith(".csv"):
                assignments.to_csv(partial, index=False)
            else:
                assignments.to_parquet(partial, index=False)
            os.replace(partial, folder / name)
    except OSError as error:
        for name in names:
            with suppress(OSError):
                (folder / f".{name}.partial").unlink()
        raise DataError(f"{folder}: assignments cannot be written ({error})") from None
