"""What a simulation and a comparison found, as frozen values.

The report, the closing table and the JSON are written from these values and nothing else.
"""

from dataclasses import dataclass, field
from pathlib import Path

from common.contract import Contract


@dataclass(frozen=True)
class RoundRecord:
    """One training round."""

    round: int  # 1-based
    cohort: int  # merchants whose answers were summed
    epsilon: float  # spent so far under the contract's delta, the most of any merchant
    accuracy: float | None  # noisy, on held-out customers; None where the round had no evaluation
    accuracy_error: float | None  # one standard deviation of the noise in `accuracy`


@dataclass(frozen=True)
class MerchantRecord:
    """One merchant after the run. `customers` is known to the simulator and never travels."""

    id: str
    customers: int
    epsilon: float  # of all its releases, towards whoever sees sums
    epsilon_server: float  # of all its releases, towards whoever sees its single messages
    # from its own noisy evaluation message, covered by epsilon_server; None where sums are masked
    accuracy: float | None
    accuracy_error: float | None
    refused: str | None  # why it did not (or not to the end) take part


@dataclass(frozen=True)
class SegmentRecord:
    """A published segment: noisy share and profile."""

    id: int
    name: str
    share: float | None  # None: suppressed, too few to tell from noise
    share_error: float | None
    action: str
    profile: dict[str, dict[str, float | str | None]]  # feature -> {typical, low, high, unit}


@dataclass(frozen=True)
class Achieved:
    """The noise that the sums of a run really held."""

    epsilon: float  # by that noise; never above what is claimed
    survivors_min: int  # merchants in the smallest sum
    survivors_max: int


@dataclass(frozen=True)
class Collusion:
    """What is left of a run's promise where merchants tell others their noise."""

    colluders: int  # in every sum
    epsilon: float  # of the honest ones' customers; infinite: nothing is left


@dataclass(frozen=True)
class SimulationResult:
    """A finished run."""

    run: str
    data: str
    contract: Contract
    seed: int | None  # not None: repeatable, so the noise is guessable; not for release
    rounds: tuple[RoundRecord, ...]
    merchants: tuple[MerchantRecord, ...]
    confusion: tuple[tuple[float, ...], ...]  # noisy counts, rows = true, columns = predicted
    metrics: dict[str, float]  # noisy: accuracy, accuracy_error, macro_f1
    segments: tuple[SegmentRecord, ...]
    epsilon: float
    epsilon_server: float
    epsilon_recomputed: float  # the independent second opinion on `epsilon`
    epsilon_opacus: float  # Opacus' PRV upper bound for the same events; adds up to 0.01 at 1
    achieved: Achieved
    colluders: tuple[Collusion, ...]  # from none to just below a third
    delta: float
    spent: dict[str, float]  # purpose -> epsilon of that purpose alone
    secure: bool
    bundle: Path
    seconds: float
    peak_mib: float
    notes: tuple[str, ...] = field(default=())  # plain sentences a reader must see


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds."""

    mean: float
    sd: float


@dataclass(frozen=True)
class ComparisonRow:
    """One method at one epsilon."""

    method: str  # majority | last-period | start | alone | distributed | local | pooled
    epsilon: float | None  # None: no privacy
    accuracy: Spread
    macro_f1: Spread
    auc: Spread
    by_size: tuple[Spread, ...]  # accuracy in each of `Comparison.sizes`


@dataclass(frozen=True)
class Comparison:
    """All methods on the same splits."""

    data: str
    partition: str
    label: str
    seeds: int
    merchants: int
    customers: int  # training customers, pooled, mean over seeds
    delta: float
    sizes: tuple[str, ...]  # names of the merchant-size groups, small to large
    rows: tuple[ComparisonRow, ...]
    secure: bool  # whether the sums of the federated runs were masked
    notes: tuple[str, ...] = ()
