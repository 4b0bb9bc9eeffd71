"""Plant faults into the real merchant code, and see whether the empirical audit says FAIL.

    python -m benchmarks.audit_faults --json FILE [--honest 100] [--whole]

Every fault replaces a function of `clients`, `common` or the ledger for as long as its context
lasts. `faults` in the JSON has a row for each, with the tests that caught it; `false_alarms`
counts honest runs of the whole verdict that said FAIL.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

import clients.release
import clients.worker
import common.plan
from audit.empirical import Empirical, empirical_audit
from clients.kernel import Kernel
from clients.training import clipped_gradient_sum
from clients.worker import Worker
from common.contract import Contract, parse_contract
from common.ledger import Ledger
from common.noise import NoiseSource
from simulations.audited import RealSubject

_HONEST_SUM, _HONEST_SAMPLED, _HONEST_PLAN = (
    clients.release.noisy_sum,
    NoiseSource.sampled,
    common.plan.plan_of,
)
_UNCLIPPED = 1e300


def contract_of(epsilon: float = 4.0, **sections: Any) -> Contract:
    """Return a small contract with every kind of feature; keywords replace sections."""
    document: dict[str, Any] = {
        "federation": {"name": "audited", "min_merchants": 6},
        "features": [
            {"name": "spend", "high": 5000.0, "transform": "log1p", "unit": "EUR"},
            {"name": "visits", "high": 200.0, "transform": "sqrt", "missing": 0.0},
            {"name": "channel", "kind": "category", "categories": ["shop", "web", "app"],
             "missing": "indicator"},
            {"name": "member", "kind": "flag"},
        ],
        "segments": {"names": ["low", "middle", "high"]},
        "privacy": {"epsilon": epsilon, "delta": 1e-5},
    }  # fmt: skip
    return parse_contract({**document, **sections}, source="benchmark")


DISTRIBUTED = contract_of()
LOCAL = contract_of(training={"mode": "local", "rounds": 10}, model={"family": "linear"})
SAMPLED = contract_of(
    training={"mode": "local", "rounds": 8, "sampling_rate": 0.1, "local_steps": 2},
    model={"family": "linear"},
)


@dataclass(frozen=True)
class Fault:
    """One planted fault."""

    name: str
    plant: Callable[[], Any]  # a context manager
    contract: Contract = DISTRIBUTED


def drawn(exact: np.ndarray, how: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return an honest sum's lattice point and its noise, apart."""
    lattice = np.rint(exact / (how["sensitivity"] / how["steps"])).astype(np.int64)
    return lattice, _HONEST_SUM(exact, **how) - lattice


def releases(faulty: Callable[..., np.ndarray]) -> Any:
    """Add noise with another function, to sums and to a merchant's own steps."""
    rounds: dict[int, tuple[Any, NoiseSource]] = {}  # noise drawn at once -> a stream for it

    def in_place(values: np.ndarray, release: Any, drawn: np.ndarray, scale: float) -> None:
        _, noise = rounds.setdefault(id(drawn.base), (drawn.base, NoiseSource.fresh()))
        values[:] = scale * faulty(
            values.copy(),
            sensitivity=release.event.sensitivity,
            noise_multiplier=release.event.noise_multiplier,
            contributors=1,
            noise=noise,
            steps=release.steps,
            error=release.error,
        )

    return both(
        patch("clients.worker.noisy_sum", faulty), patch("clients.local_steps.make_noisy", in_place)
    )


@contextmanager
def both(one: Any, other: Any) -> Iterator[None]:
    """Plant two things."""
    with one, other:
        yield


def noise_times(factor: float | None, length: int | None = None) -> Any:
    """Scale the noise, of vectors with one length only; None: as if sensitivities were 1."""

    def faulty(exact: np.ndarray, **how: Any) -> np.ndarray:
        lattice, noise = drawn(exact, how)
        scale = 1.0 / how["sensitivity"] if factor is None else factor
        if length is not None and exact.size != length:
            scale = 1.0
        return np.asarray(lattice + np.rint(noise * scale).astype(np.int64))

    return releases(faulty)


def gradients(faulty: Callable[..., np.ndarray]) -> Any:
    """Compute gradient sums with another function, in sums and in a merchant's own steps."""
    honest = Kernel.sums

    def sums(
        self: Kernel,
        thetas: np.ndarray,
        tables: Any,
        chosen: Any,
        clip_norm: float,
        *,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        if self.precision == "float64":  # what the faulty functions themselves compute with
            return honest(self, thetas, tables, chosen, clip_norm, out=out)
        (table,), (rows,) = tables, chosen
        x = table.inputs[rows].astype(np.float64)
        found = np.empty_like(thetas) if out is None else out
        found[0] = faulty(self.network, thetas[0], x, table.labels[rows], clip_norm)
        return found

    return both(
        patch("clients.worker._engine", lambda _contract: faulty),
        patch.object(Kernel, "sums", sums),
    )


def unclipped(network: Any, theta: np.ndarray, x: Any, y: Any, clip_norm: float) -> np.ndarray:
    """Forget to clip."""
    return clipped_gradient_sum(network, theta, x, y, _UNCLIPPED)


def batch_clipped(network: Any, theta: np.ndarray, x: Any, y: Any, clip_norm: float) -> np.ndarray:
    """Clip the mean gradient of the batch instead of every customer's."""
    total = clipped_gradient_sum(network, theta, x, y, _UNCLIPPED)
    mean = float(np.linalg.norm(total)) / max(len(y), 1)
    return np.asarray(total * min(1.0, clip_norm / max(mean, 1e-12)))


def layer_clipped(network: Any, theta: np.ndarray, x: Any, y: Any, clip_norm: float) -> np.ndarray:
    """Clip every layer's gradient to the full norm."""
    total = np.zeros(network.size)
    for row in range(len(y)):
        one = clipped_gradient_sum(network, theta, x[row : row + 1], y[row : row + 1], _UNCLIPPED)
        for layer in network.layers(one):
            norm = max(float(np.linalg.norm(layer)), 1e-12)
            np.multiply(layer, min(1.0, clip_norm / norm), out=layer)
        total += one
    return total


def looser(network: Any, theta: np.ndarray, x: Any, y: Any, clip_norm: float) -> np.ndarray:
    """Clip to a norm 5 % too large."""
    return clipped_gradient_sum(network, theta, x, y, 1.05 * clip_norm)


def twice_counted(network: Any, theta: np.ndarray, x: Any, y: Any, clip_norm: float) -> np.ndarray:
    """Count the last customer twice."""
    total = clipped_gradient_sum(network, theta, x, y, clip_norm)
    again = clipped_gradient_sum(network, theta, x[-1:], y[-1:], clip_norm)
    return np.asarray(total + again)


def noise_keyed_by(*parts: str) -> Any:
    """Draw noise from streams that only some of merchant, run, stage and round decide."""
    honest = Worker.answer

    def answer(self: Worker, request: Any) -> Any:
        known = {
            "merchant": self.merchant,
            "run": request.run,
            "stage": request.stage,
            "round": request.round,
        }
        labels = [str(known[part]) for part in parts]
        self._noise_for = lambda *_: NoiseSource.seeded(7, *labels)
        return honest(self, request)

    return patch.object(Worker, "answer", answer)


def half_of_noise_again() -> Any:
    """Use the first half of every vector's noise for its second half, too."""

    def faulty(exact: np.ndarray, **how: Any) -> np.ndarray:
        lattice, noise = drawn(exact, how)
        half = noise.size // 2
        noise[half : 2 * half] = noise[:half]
        return np.asarray(lattice + noise)

    return releases(faulty)


def same_noise_in_a_round() -> Any:
    """Draw the noise of a round's own steps once only."""
    kept: dict[int, tuple[NoiseSource, np.ndarray]] = {}

    def faulty(exact: np.ndarray, **how: Any) -> np.ndarray:
        lattice, noise = drawn(exact, how)
        source = how["noise"]
        return np.asarray(lattice + kept.setdefault(id(source), (source, noise))[1])

    return releases(faulty)


def uniform_noise() -> Any:
    """Draw noise of the right variance and the wrong shape."""

    def faulty(exact: np.ndarray, **how: Any) -> np.ndarray:
        lattice, noise = drawn(exact, how)
        width = float(np.sqrt(3 * np.mean(noise.astype(np.float64) ** 2)))
        random = np.random.default_rng(abs(int(noise[0])))
        return np.asarray(lattice + random.uniform(-width, width, exact.size).astype(np.int64))

    return releases(faulty)


def charges_missing() -> Any:
    """Write down every fourth release only."""
    honest, kept = Ledger.release, list[Any]()

    def release(self: Ledger, *arguments: Any) -> Any:
        kept.append(honest(self, *arguments) if len(kept) % 4 == 0 else kept[-1])
        return kept[-1]

    return patch.object(Ledger, "release", release)


@contextmanager
def plan_for_fewer_rounds() -> Iterator[None]:
    """Work the noise out for a quarter of the rounds."""

    def faulty(contract: Contract) -> Any:
        rounds = max(1, contract.training.rounds // 4)
        return _HONEST_PLAN(contract.revised(training={"rounds": rounds, "spare_rounds": 0}))

    with (
        patch("clients.worker.plan_of", faulty),
        patch("audit.bench.plan_of", faulty),
        patch("simulations.audited.plan_of", faulty),
    ):
        yield


def sampling(faulty: Callable[[int, float, NoiseSource], Any]) -> Any:
    """Choose customers with another function."""
    return patch.object(NoiseSource, "sampled", lambda self, n, q: faulty(n, q, self))


def fixed_batch(count: int, rate: float, noise: NoiseSource) -> np.ndarray:
    """Take a shuffled batch of a fixed size."""
    order = np.argsort(np.frombuffer(noise._words(count).tobytes(), dtype="<u8"))
    return np.asarray(order[: max(1, round(count * rate))])


def same_batch(count: int, rate: float, noise: NoiseSource) -> np.ndarray:
    """Take the same customers in every step."""
    return np.asarray(_HONEST_SAMPLED(NoiseSource.seeded(3), count, rate))


def contributors_times(factor: float) -> Any:
    """Size noise shares for another number of survivors."""

    def faulty(exact: np.ndarray, **how: Any) -> np.ndarray:
        how["contributors"] = round(how["contributors"] * factor)
        return np.asarray(_HONEST_SUM(exact, **how))

    return releases(faulty)


def shares_of_all() -> Any:
    """Size noise shares for all merchants instead of the fewest survivors."""

    def everybody(self: Contract) -> int:
        return self.federation.min_merchants if self.training.mode == "distributed" else 1

    return patch.object(Contract, "noise_contributors", property(everybody))


def unbounded_profiles() -> Any:
    """Forget that a profile has F inputs to share the norm."""
    honest = clients.worker.profile_sums

    def faulty(x: np.ndarray, predicted: np.ndarray, segments: int) -> np.ndarray:
        sums = honest(x, predicted, segments).reshape(segments, -1)
        sums[:, 1:] *= np.sqrt(x.shape[1])
        return np.asarray(sums.ravel())

    return patch("clients.worker.profile_sums", faulty)


FAULTS = (
    Fault("no noise", lambda: noise_times(0.0)),
    Fault("noise x 0.1", lambda: noise_times(0.1)),
    Fault("noise x 0.5", lambda: noise_times(0.5)),
    Fault("noise x 0.97", lambda: noise_times(0.97)),
    Fault("noise x 0.97, local", lambda: noise_times(0.97), LOCAL),
    Fault("noise not scaled by the clip norm", lambda: noise_times(None)),
    Fault("no noise on evaluations", lambda: noise_times(0.0, 9)),
    Fault("no noise on the census", lambda: noise_times(0.0, 1)),
    Fault("no clipping", lambda: gradients(unclipped)),
    Fault("no clipping, local", lambda: gradients(unclipped), LOCAL),
    Fault("batch clipping", lambda: gradients(batch_clipped)),
    Fault("per-layer clipping at full norm", lambda: gradients(layer_clipped)),
    Fault("clip norm 5 % too large", lambda: gradients(looser)),
    Fault("one customer counted twice", lambda: gradients(twice_counted)),
    Fault("same noise every step", lambda: noise_keyed_by("merchant", "stage")),
    Fault("same noise in every run", lambda: noise_keyed_by("merchant", "stage", "round")),
    Fault("same noise at two merchants", lambda: noise_keyed_by("run", "stage", "round")),
    Fault("same noise in a round's own steps", same_noise_in_a_round, SAMPLED),
    Fault("half of the noise used twice", half_of_noise_again),
    Fault("noise of another shape", uniform_noise),
    Fault("accountant misses steps", charges_missing),
    Fault("noise planned for a quarter of the steps", plan_for_fewer_rounds),
    Fault(
        "sampling rate under-reported",
        lambda: sampling(lambda n, q, s: _HONEST_SAMPLED(s, n, min(4 * q, 0.99))),
        SAMPLED,
    ),
    Fault("shuffled instead of Poisson", lambda: sampling(fixed_batch), SAMPLED),
    Fault("same batch every step", lambda: sampling(same_batch), SAMPLED),
    Fault("noise shares for twice the survivors", lambda: contributors_times(2.0)),
    Fault("noise shares for all merchants", shares_of_all),
    Fault("profile beyond its norm", unbounded_profiles),
)


def audited(contract: Contract, *, whole: bool = False, seed: int | None = None) -> Empirical:
    """Audit this installation as it is at the moment."""
    with RealSubject() as subject:
        return empirical_audit(subject, contract, mechanism_only=not whole, seed=seed)


def tried(fault: Fault, *, whole: bool = False) -> dict[str, Any]:
    """Plant a fault, audit, and tell what caught it."""
    began = time.monotonic()
    with fault.plant():
        found = audited(fault.contract, whole=whole)
    return {
        "name": fault.name,
        "caught": found.verdict == "FAIL",
        "by": [check.name for check in found.checks if not check.passed],
        "claimed_epsilon": fault.contract.privacy.epsilon,
        "lower_bound": None if found.one_run is None else found.one_run.bound.epsilon,
        "seconds": round(time.monotonic() - began, 1),
    }


def honest(number: int) -> dict[str, Any]:
    """Give the whole verdict on the code as it is; contracts and claims take turns."""
    epsilon = (1.0, 4.0, 8.0)[number % 3]
    shapes: tuple[dict[str, Any], ...] = (
        {},
        {"model": {"family": "linear"}},
        {"training": {"mode": "local", "rounds": 10}, "model": {"family": "linear"}},
    )
    found = audited(contract_of(epsilon, **shapes[number // 3 % 3]), whole=True)
    return {
        "number": number,
        "claimed_epsilon": epsilon,
        "lower_bound": None if found.one_run is None else found.one_run.bound.epsilon,
        "verdict": found.verdict,
        "failures": list(found.failures),
        "seconds": round(found.seconds[1], 1),
    }


def main() -> None:
    """Try all faults, then as many honest runs as asked for; write and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--honest", type=int, default=100, help="honest runs")
    parser.add_argument("--whole", action="store_true", help="canaries for faults, too")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    with ProcessPoolExecutor(options.processes) as pool:
        runs = [pool.submit(honest, number) for number in range(options.honest)]
        rows = []
        for fault in FAULTS:  # in this process: what is replaced is replaced for good reasons
            rows.append(tried(fault, whole=options.whole))
            print(json.dumps(rows[-1]), flush=True)
        clean = [run.result() for run in runs]
    document = {
        "faults": rows,
        "caught": sum(row["caught"] for row in rows),
        "honest_runs": len(clean),
        "false_alarms": sum(run["verdict"] == "FAIL" for run in clean),
        "honest": clean,
    }
    options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"{document['caught']} of {len(rows)} faults, {document['false_alarms']} false alarms")


if __name__ == "__main__":
    main()
