"""What a run will release, worked out from the contract alone.

Both ends compute the same plan; a client never takes a noise multiplier, a clip norm or a
number of rounds from a message.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from common.accounting import epsilon, mu_for, sampled_noise_multiplier
from common.budget import Charge
from common.contract import Contract
from common.errors import AccountingError
from common.events import Event, GaussianSum, PoissonGaussianSum
from common.fixed_point import (
    MIN_NOISE_STEPS,
    Lattice,
    float32_error,
    lattice_sensitivity,
    lattice_step,
    local_lattice,
    local_steps,
    ring_steps,
)
from common.network import network_of

CENSUS, UPDATE, EVALUATION, PROFILE = "census", "update", "evaluation", "profile"


@dataclass(frozen=True)
class Release:
    """One kind of noisy sum that a run asks of every merchant."""

    stage: str
    event: Event  # towards whoever sees sums
    length: int  # numbers in the vector
    times: int  # how often the plan pays for it
    steps: int  # lattice steps in one sensitivity
    error: float = 0.0  # of float32, relative to the sensitivity

    @property
    def sensitivity(self) -> float:
        """L2 bound on what one customer moves, as it is computed and rounded."""
        return lattice_sensitivity(self.event.sensitivity, self.length, self.steps, self.error)

    def towards_server(self, contributors: int) -> Event:
        """Return the event towards whoever sees this merchant's single vector."""
        sigma = self.event.noise_multiplier / math.sqrt(contributors)
        return replace(self.event, noise_multiplier=sigma)


@dataclass(frozen=True)
class Plan:
    """All releases of a run under one contract."""

    census: Release
    update: Release
    evaluation: Release
    final_evaluation: Release
    profile: Release | None

    def releases(self) -> Iterator[Release]:
        """Yield every release that the plan pays for."""
        yield from (self.census, self.update, self.evaluation, self.final_evaluation)
        if self.profile is not None:
            yield self.profile

    def events(self) -> tuple[Event, ...]:
        """Return everything the plan pays for, counts included."""
        return tuple(
            replace(release.event, count=release.event.count * release.times)
            for release in self.releases()
            if release.times
        )

    def charges(self, contributors: int) -> tuple[Charge, ...]:
        """Return everything the plan pays for, stage by stage, counts included."""
        found = []
        for release in self.releases():
            if release.times:
                count = release.event.count * release.times
                towards_server = release.towards_server(contributors)
                found.append(
                    Charge(
                        release.stage,
                        replace(release.event, count=count),
                        replace(towards_server, count=count),
                    )
                )
        return tuple(found)

    def events_towards_server(self, contributors: int) -> tuple[Event, ...]:
        """Return the same as seen by whoever sees a merchant's single messages."""
        events = [(release.towards_server(contributors), release) for release in self.releases()]
        return tuple(
            replace(event, count=event.count * release.times)
            for event, release in events
            if release.times
        )

    def last(self, rounds: int) -> tuple[str, int]:
        """Return stage and round of a run's last sum."""
        return (EVALUATION if self.profile is None else PROFILE, rounds)

    def release_of(self, stage: str, round_number: int, rounds: int) -> Release | None:
        """Return what `stage` releases in a round, or None if the plan knows no such release."""
        if stage == EVALUATION:
            return self.final_evaluation if round_number == rounds else self.evaluation
        return {CENSUS: self.census, UPDATE: self.update, PROFILE: self.profile}.get(stage)


def evaluation_rounds(contract: Contract) -> tuple[int, ...]:
    """Return the rounds after which the model is evaluated; the last round always is."""
    last, every = contract.training.rounds, contract.publication.evaluate_every
    return (*range(every, last, every), last)


@lru_cache(maxsize=64)
def plan_of(contract: Contract) -> Plan:
    """Divide the contract's budget over the releases of a run.

    Sums over all customers share mu^2, in which Gaussian mechanisms add up exactly; with
    Poisson-sampled training Opacus finds the training's noise multiplier for what is left.

    Raises:
        AccountingError: No noise reaches the contract's epsilon, or the ring has no room for it.
    """
    privacy, training = contract.privacy, contract.training
    split = privacy.split
    total = mu_for(privacy.epsilon, privacy.delta) ** 2
    times = len(evaluation_rounds(contract)) - 1
    share = split.evaluation / 2 if times else split.evaluation
    segments = len(contract.segments.names)

    def gaussian(stage: str, part: float, count: int, sensitivity: float, length: int) -> Release:
        sigma = math.sqrt(max(count, 1) / (part * total))
        steps = _steps(contract, sigma)
        return Release(stage, GaussianSum(sigma, sensitivity), length, count, steps)

    census = gaussian(CENSUS, split.census, 1, 1.0, 1)
    evaluation = gaussian(EVALUATION, split.evaluation - share or share, times, 1.0, segments**2)
    final = gaussian(EVALUATION, share, 1, 1.0, segments**2)
    profile = gaussian(PROFILE, split.profiles, 1, 1.0, profile_length(contract))
    profile_or_none = profile if contract.publication.profiles else None
    steps = (training.rounds + training.spare_rounds) * training.local_steps
    unused = 0.0 if contract.publication.profiles else split.profiles
    event: Event
    if training.sampling_rate == 1.0:
        sigma = math.sqrt(steps / ((split.training + unused) * total))
        event = GaussianSum(sigma, privacy.clip_norm, training.local_steps)
    else:
        others = tuple(
            replace(r.event, count=r.times)
            for r in (census, evaluation, final, profile_or_none)
            if r is not None and r.times
        )
        sigma = sampled_noise_multiplier(
            privacy.epsilon, privacy.delta, training.sampling_rate, steps, others
        )
        event = PoissonGaussianSum(
            sigma, privacy.clip_norm, training.sampling_rate, training.local_steps
        )
    network, single = network_of(contract), training.mode == "local"
    update = Release(
        UPDATE,
        event,
        network.size,
        training.rounds + training.spare_rounds,
        # in mode local, noise stays at the merchant and no ring limits its lattice
        local_steps(event.noise_multiplier) if single else _steps(contract, event.noise_multiplier),
        float32_error(network.dims) if precision_of(contract) == "float32" else 0.0,
    )
    return Plan(census, update, evaluation, final, profile_or_none)


def precision_of(contract: Contract) -> Literal["float32", "float64"]:
    """Return the number format in which a merchant computes gradients.

    Float32 where it takes many steps of its own; what is computed once a round for a sum over
    all merchants is float64, as is what Opacus computes.
    """
    training = contract.training
    return "float32" if (training.mode, training.engine) == ("local", "fused") else "float64"


def _steps(contract: Contract, noise_multiplier: float) -> int:
    """Return the lattice steps in one sensitivity of a sum that travels in the ring."""
    aggregation, contributors = contract.aggregation, contract.noise_contributors
    steps = ring_steps(
        aggregation.ring_bits,
        aggregation.max_customers,
        noise_multiplier,
        math.sqrt(contract.max_merchants / contributors),
    )
    share = noise_multiplier / math.sqrt(contributors) * steps
    if share < MIN_NOISE_STEPS:
        raise AccountingError(
            f"with aggregation.max_customers = {aggregation.max_customers} a ring of "
            f"{aggregation.ring_bits} bits leaves {share:.3g} steps for a noise share, "
            f"{MIN_NOISE_STEPS:g} are needed; lower it, or set aggregation.ring_bits = 64"
        )
    return steps


def lattice_of(release: Release, contract: Contract) -> Lattice:
    """Return how the numbers of a release travel."""
    ring_bits = contract.aggregation.ring_bits
    if release.stage == UPDATE and contract.training.mode == "local":
        return local_lattice(ring_bits, contract.max_merchants)[0]
    return Lattice(lattice_step(release.event.sensitivity, release.steps), ring_bits)


def planned_epsilon(contract: Contract) -> float:
    """Return epsilon of the whole plan at the contract's delta; never above the contract's."""
    return epsilon(plan_of(contract).events(), contract.privacy.delta)


def planned_epsilon_towards_server(contract: Contract) -> float:
    """Return epsilon of the whole plan towards whoever sees a merchant's single messages."""
    events = plan_of(contract).events_towards_server(contract.exposed_contributors)
    return epsilon(events, contract.privacy.delta)


def profile_length(contract: Contract) -> int:
    """Return the length of the profile vector: for each segment a count and F input sums."""
    return len(contract.segments.names) * (1 + contract.inputs)
