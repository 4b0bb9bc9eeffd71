"""Tests of noise and book-keeping: is every release as noisy as the ledger says?"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

from audit import probes
from audit.bench import PER_TEST, Bench, Check, Kind, certain_check, question, random_check
from audit.epsilon import recompute
from audit.statistics import correlation_p_value, cosines, scale_p_value, shape_p_value
from common.contract import Contract
from common.events import Event, to_document
from common.plan import CENSUS, EVALUATION, UPDATE

_NUMBERS = 100_000  # noise numbers of an update that are looked at: shows 2 % of the scale
_MERCHANTS = 4
_REPEATS = (12, 40)  # releases of a merchant, fewest and most


def noise_tests(bench: Bench, *, whole_run: bool = True) -> list[Check]:
    """Look at the noise of several merchants over many releases of every kind.

    Args:
        bench: The subject.
        whole_run: Whether the charges of one run are to stay within the contract's epsilon.
    """
    checks, charged = list[Check](), list[Event]()
    for kind in bench.kinds:
        found, events = release_tests(bench, kind)
        checks += found
        charged += events[:1] * len(kind.rounds)
    if bench.contract.training.sampling_rate == 1.0:
        checks.append(_busy_check(bench))
    if whole_run:
        checks.append(_total_check(bench.contract, charged))
    return checks


def release_tests(bench: Bench, kind: Kind) -> tuple[list[Check], list[Event]]:
    """Look at the noise of one kind of release; return what the ledgers were charged, too."""
    noise, events, asked = _noise(bench, kind)
    return [*_noise_checks(kind, noise), _charges_check(kind, events, asked)], events


def _noise(bench: Bench, kind: Kind) -> tuple[Float[np.ndarray, "M K P"], list[Event], int]:
    """Return noise in multiples of the lattice step, charges, and how often was asked.

    Under silent parameters the exact sum is known; what is left of an answer is noise.
    """
    fewest, most = _REPEATS
    repeats = math.ceil(_NUMBERS / (_MERCHANTS * kind.release.length))
    repeats = min(max(repeats, fewest), most)
    theta = probes.silent(bench.network)
    inputs = bench.random.uniform(-1.0, 1.0, size=(8, bench.contract.inputs))
    table = probes.table_of(inputs, held_out=kind.release.stage == EVALUATION)
    exact = _exact(kind, bench, inputs) / kind.unit
    noise = np.empty((_MERCHANTS, repeats, kind.release.length))
    events: list[Event] = []
    questions = [question(kind, k, theta) for k in range(repeats)]
    for m in range(_MERCHANTS):
        vectors, charged = bench.answers(f"merchant {m}", table, questions)
        noise[m] = [kind.lattice.from_ring(vector) - np.rint(exact) for vector in vectors]
        events += charged
    return noise, events, _MERCHANTS * repeats


def _exact(kind: Kind, bench: Bench, inputs: Float[np.ndarray, "R F"]) -> Float[np.ndarray, " P"]:
    """Return the exact sum under silent parameters: everybody is of segment 0, and is told so."""
    exact = np.zeros(kind.release.length)
    if kind.release.stage in {CENSUS, EVALUATION}:
        exact[0] = len(inputs)
    elif kind.release.stage != UPDATE:
        width = inputs.shape[1]
        exact[0] = len(inputs) * math.sqrt(0.5)
        exact[1 : 1 + width] = inputs.sum(axis=0) * math.sqrt(0.5 / width)
    return exact


def _noise_checks(kind: Kind, noise: Float[np.ndarray, "M K P"]) -> Iterator[Check]:
    merchants, repeats, length = noise.shape
    stddev = math.hypot(kind.stddev / abs(kind.unit), _rounding_steps(kind))
    yield _scale_check(f"{kind.label}: noise scale", noise, stddev, "One merchant's noise")
    if kind.release.stage == UPDATE:
        p = shape_p_value(noise.ravel().astype(np.int64), stddev)
        yield random_check(
            f"{kind.label}: noise shape", float(noise.mean() / stddev), 0.0, p,
            f"{noise.size:,} noise numbers against the discrete Gaussian: p = {p:.2g}.",
        )  # fmt: skip
        if length % 2 == 0 or length > 2:
            yield _within_check(kind, noise)
    total = noise.sum(axis=0)
    yield _scale_check(
        f"{kind.label}: noise of a sum", total, stddev * math.sqrt(merchants),
        f"{merchants} merchants' shares together (of {kind.shares} that make up the noise)",
    )  # fmt: skip
    yield from _independence_checks(kind, noise.reshape(merchants * repeats, length), repeats)


def _rounding_steps(kind: Kind) -> float:
    """Return the spread, in steps, of rounding a local update after its noise was added."""
    return math.sqrt(1 / 12) if kind.unit < 0 else 0.0


def _scale_check(name: str, noise: Float[np.ndarray, "*shape"], stddev: float, what: str) -> Check:
    p = scale_p_value(float((noise**2).sum()), noise.size, stddev)
    ratio = float(np.sqrt((noise**2).mean()) / stddev)
    seen = float(stats.norm.isf(PER_TEST / 2) + 2) / math.sqrt(2 * noise.size)
    return random_check(
        name, ratio, 1.0, p,
        f"{what} is {ratio:.4f} of what is accounted for ({noise.size:,} numbers; a deviation "
        f"of {100 * seen:.2g} % would have been seen).",
    )  # fmt: skip


def _within_check(kind: Kind, noise: Float[np.ndarray, "M K P"]) -> Check:
    """Halves of vectors, and neighbouring numbers, must have nothing to do with each other."""
    half = noise.shape[2] // 2
    pairs = (
        (noise[:, :, :half], noise[:, :, half : 2 * half]),
        (noise[:, :, 0 : 2 * half : 2], noise[:, :, 1 : 2 * half : 2]),
    )
    found = [cosines(np.stack([one.ravel(), two.ravel()]))[0, 1] for one, two in pairs]
    worst = float(max(found, key=abs))
    p = correlation_p_value(worst, noise[:, :, :half].size, len(pairs))
    return random_check(
        f"{kind.label}: noise of numbers apart", worst, 0.0, p,
        f"Numbers of one vector are correlated by {worst:+.4f} at most.",
    )  # fmt: skip


def _independence_checks(
    kind: Kind, vectors: Float[np.ndarray, "K P"], repeats: int
) -> Iterator[Check]:
    """Compare every release with every other, of the same merchant and of another."""
    if vectors.shape[1] == 1:  # single numbers: a row of releases at a time
        one = vectors.reshape(-1, repeats)
        yield _pairs_check(f"{kind.label}: merchants apart", one, _upper(len(one)), "Merchants")
        yield _repeats_check(kind, one)
        return
    owners = np.arange(len(vectors)) // repeats
    same = owners[:, None] == owners[None, :]
    upper = _upper(len(vectors))
    yield _pairs_check(f"{kind.label}: fresh noise", vectors, upper & same, "Releases")
    yield _pairs_check(f"{kind.label}: merchants apart", vectors, upper & ~same, "Merchants")


def _upper(count: int) -> Bool[np.ndarray, "K K"]:
    return np.triu(np.ones((count, count), dtype=bool), 1)


def _pairs_check(
    name: str, vectors: Float[np.ndarray, "K P"], pairs: Bool[np.ndarray, "K K"], who: str
) -> Check:
    found = cosines(vectors)[pairs]
    worst = float(found[np.abs(found).argmax()])
    p = correlation_p_value(worst, vectors.shape[1], found.size)
    return random_check(
        name, worst, 0.0, p,
        f"{who}' noise is correlated by {worst:+.3f} at most, of {found.size:,} pairs.",
    )  # fmt: skip


def _repeats_check(kind: Kind, rows: Float[np.ndarray, "M K"]) -> Check:
    """Single numbers of a merchant must differ from its other ones as much as noise does."""
    stddev = kind.stddev / abs(kind.unit)
    inner = rows - rows.mean(axis=1, keepdims=True)
    p = scale_p_value(float((inner**2).sum()), inner.size - len(rows), stddev)
    ratio = float(np.sqrt((inner**2).sum() / (inner.size - len(rows))) / stddev)
    return random_check(
        f"{kind.label}: fresh noise", ratio, 1.0, p,
        f"A merchant's releases differ from each other by {ratio:.3f} of the noise.",
    )  # fmt: skip


def _busy_check(bench: Bench) -> Check:
    """The noise of an update does not depend on what the customers are like."""
    kind = bench.update
    inputs = bench.random.uniform(-1.0, 1.0, size=(8, bench.contract.inputs))
    theta = probes.loud(bench.network)
    repeats = 2 * math.ceil(_NUMBERS / 4 / kind.release.length) + 2
    questions = [question(kind, k, theta) for k in range(repeats)]
    found, _ = bench.answers("busy", probes.table_of(inputs, label=1), questions)
    numbers = np.stack([kind.lattice.from_ring(vector) for vector in found]).astype(np.float64)
    differences = (numbers[::2] - numbers[1::2]) / math.sqrt(2)
    stddev = math.hypot(kind.stddev / abs(kind.unit), _rounding_steps(kind))
    return _scale_check(
        "update: noise scale, busy table", differences, stddev, "Noise over customers that learn"
    )


def several_steps_tests(bench: Bench) -> list[Check]:
    """As many steps in a row as the contract says add up to as much noise as is charged for."""
    kind = bench.update
    noise, events, asked = _noise(bench, kind)
    steps = bench.contract.training.local_steps
    stddev = kind.stddev / abs(kind.unit)
    return [
        _scale_check(
            f"{steps} steps: noise scale", noise,
            math.hypot(stddev * math.sqrt(steps), _rounding_steps(kind)),
            f"The noise of {steps} steps",
        ),
        _charges_check(kind, events, asked),
        certain_check(
            f"{steps} steps: charged", float(abs(kind.release.event.count - steps)), 0.0,
            f"{kind.release.event.count} steps are charged for {steps}.",
        ),
        _total_check(bench.contract, events[:1] * len(kind.rounds)),
    ]  # fmt: skip


def _charges_check(kind: Kind, events: Sequence[Event], asked: int) -> Check:
    """Every release is in the ledger, as the release that it was."""
    wrong = sum(event != kind.release.event for event in events) + abs(asked - len(events))
    event = kind.release.event
    return certain_check(
        f"{kind.label}: charges", float(wrong), 0.0,
        f"{len(events)} charges for {asked} releases, {wrong} of them missing or not of noise "
        f"{event.noise_multiplier:.4g} times sensitivity {event.sensitivity:.4g}.",
    )  # fmt: skip


def _total_check(contract: Contract, charged: Sequence[Event]) -> Check:
    """A whole run of what was charged stays within the contract's epsilon."""
    privacy = contract.privacy
    spent = recompute([to_document(event) for event in charged], privacy.delta)
    return certain_check(
        "ledger: a whole run", spent, privacy.epsilon * 1.01 + 0.01,
        f"All {len(charged)} releases of a run, as charged, recomputed: epsilon {spent:.4g}; the "
        f"contract says {privacy.epsilon:.4g}.",
    )  # fmt: skip
