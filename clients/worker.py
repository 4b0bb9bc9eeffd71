"""A merchant's side of a run: charge, compute, add noise, answer.

The worker alone holds rows, budget and ledger. It takes from a message the run's name, the
stage, the round, the attempt, the noisy customer average, the model's parameters and what a
secure sum needs, nothing else: clip norm, noise, rounds and stages come from the contract that
this merchant pinned, the cap from its own policy.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from clients.kernel import Kernel, Precision, Table, kernel_of
from clients.local_steps import Task, local_updates
from clients.own_optimizers import OwnOptimizer, scale_of
from clients.release import noisy_sum
from clients.secure_party import Masked, SecureParty
from clients.secure_sum import Prepared
from clients.step_loops import add_noise, move
from clients.training import GradientSum, clipped_gradient_sum
from common.budget import Charge, Occasion
from common.contract import Contract
from common.errors import (
    BudgetRefusal,
    DataError,
    HansaError,
    LedgerError,
    PolicyError,
    ReplayRefusal,
    SecureSumError,
    WireError,
    WitnessRefusal,
)
from common.fixed_point import (
    MAX_SUMMANDS,
    from_lattice,
    lattice_step,
    local_lattice,
    to_lattice,
)
from common.ledger import Ledger, whole_run
from common.network import MAX_PARAMETER, network_of, parameters_sha256
from common.noise import NoiseSource
from common.plan import CENSUS, EVALUATION, PROFILE, UPDATE, Release, lattice_of, plan_of
from common.wire import (
    Advertise,
    Advertised,
    Attest,
    Attested,
    Confirm,
    Confirmed,
    Reveal,
    Revealed,
    Share,
    Shared,
    SumAnswer,
    SumRequest,
    fingerprint,
)

logger = logging.getLogger("hansa.merchant")

NoiseFor = Callable[[str, int, int], NoiseSource]  # (stage, round, attempt) -> stream of its own


@dataclass(frozen=True)
class Charged:
    """A sum that the ledger was charged for and that is to be computed.

    Attributes:
        request: Which sum.
        parameters: SHA-256 of the request's model.
        release: The planned release.
        prepared: For the mask, where sums are secure.
        head: The ledger's, with the charge.
        noise: Stream of this release alone.
    """

    request: SumRequest
    parameters: str
    release: Release
    prepared: Prepared | None
    head: bytes
    noise: NoiseSource


@dataclass(frozen=True)
class Customers:
    """A merchant's customers as model inputs (R customers, F inputs)."""

    inputs: Float[np.ndarray, "R F"]
    labels: Int[np.ndarray, " R"]  # -1: not known
    held_out: np.ndarray  # bool [R]

    def part(self, *, held_out: bool) -> tuple[Float[np.ndarray, "N F"], Int[np.ndarray, " N"]]:
        """Return inputs and labels of the labelled customers on one side of the split."""
        chosen = (self.held_out == held_out) & (self.labels >= 0)
        return np.ascontiguousarray(self.inputs[chosen]), self.labels[chosen]


def too_many(customers: int, contract: Contract) -> str:
    """Return why proof or ring have no room for so many customers, or nothing."""
    if customers > MAX_SUMMANDS:
        return (
            f"{customers:,} customers are more than the {MAX_SUMMANDS:,} that the bound on "
            "summation error covers; divide them over several merchants"
        )
    if customers > contract.aggregation.max_customers:
        return (
            f"{customers:,} customers are more than the contract has room for "
            f"(aggregation.max_customers = {contract.aggregation.max_customers:,})"
        )
    return ""


def os_noise(_stage: str, _round: int, _attempt: int) -> NoiseSource:
    """Return a fresh stream keyed by the operating system: the source of every real merchant."""
    return NoiseSource.fresh()


def seeded_noise(seed: int, merchant: str) -> NoiseFor:
    """Return repeatable streams, for simulations only: whoever knows the seed knows the noise."""
    return lambda stage, number, attempt: NoiseSource.seeded(seed, merchant, stage, number, attempt)


class Worker:
    """Answers the coordinator for one merchant.

    Args:
        merchant: The merchant's id.
        contract: The contract this merchant pinned.
        customers: Its customers.
        ledger: Its ledger, with its own cap.
        accept_unmasked_sums: Whether its policy accepts sums without secure aggregation.
        secure: What it needs for secure sums; None where the contract has none.
        noise_for: Source of the noise of each release.
        members_version: Of the list of members that it pinned; 0 where lists have none.

    Raises:
        ContractError: Opacus finds that the model cannot be trained privately.
        DataError: There are more customers than the proof of the sensitivity or the contract's
            ring covers.
        PolicyError: The contract's sums are secure and `secure` is missing.
    """

    def __init__(  # noqa: PLR0913  # four of them by name
        self,
        merchant: str,
        contract: Contract,
        customers: Customers,
        ledger: Ledger,
        *,
        accept_unmasked_sums: bool,
        secure: SecureParty | None = None,
        noise_for: NoiseFor = os_noise,
        members_version: int = 0,
    ) -> None:
        self.merchant = merchant
        self.contract = contract
        self.ledger = ledger
        self._accept_unmasked_sums = accept_unmasked_sums
        self._secure = secure
        self._noise_for = noise_for
        self._repeatable = noise_for is not os_noise
        self._members_version = members_version
        self._tables: dict[Precision, Table] = {}  # the customers that are trained on
        # the last in a plain sum: what it was for, the request, its model by hash, the answer
        self._plain: tuple[Occasion, SumRequest, str, SumAnswer] | None = None
        self._plan = plan_of(contract)
        self._charges = self._plan.charges(contract.exposed_contributors)
        self._network = network_of(contract)
        self._train = customers.part(held_out=False)
        self._test = customers.part(held_out=True)
        self._everyone = customers.inputs
        self._gradient_sum = _engine(contract)
        self._contract_sha256 = contract.sha256
        reason = too_many(len(customers.labels), contract)
        if reason:
            raise DataError(reason)
        if contract.aggregation.secure and secure is None:
            raise PolicyError("the contract's sums are secure: this merchant needs its identity")
        if contract.training.engine == "opacus":  # our kernel knows no other layers than ours
            from clients.training_opacus import prepare

            prepare(self._network)

    @property
    def customers(self) -> int:
        """Return how many customers there are; known to this merchant only."""
        return len(self._everyone)

    @property
    def training_customers(self) -> int:
        """Return how many of them are trained on; known to this merchant only."""
        return len(self._train[1])

    def get_going(self) -> None:
        """Let everything be compiled that the first answers would wait for; seconds, once.

        Nothing of it depends on customers, and nothing leaves.
        """
        noise = NoiseSource.fresh()
        noise.discrete_gaussian(1000, 1000.0)  # of which some need more than a first look
        noise.discrete_gaussian(1, 2.0**40)
        noise.sampled(1, 1.0)
        add_noise(np.zeros(1), 1.0, 1.0, np.zeros(1, dtype=np.int64), 1.0)
        move(np.zeros((1, 1)), np.zeros((1, 1)), 1.0, 1.0)
        kernel = kernel_of(
            self._network, "float32" if self.contract.training.mode == "local" else "float64"
        )
        nobody = kernel.table(np.zeros((0, self._network.dims[0])), np.zeros(0, dtype=np.int64))
        kernel.sums(np.zeros((1, self._network.size)), [nobody], [None], 1.0)

    def attest(self, message: Attest) -> Attested:
        """Say whether this merchant takes part; nothing about customers is in the answer."""
        try:
            self._check_contract(message.contract)
            if not self._accepts_sums:
                raise BudgetRefusal(
                    "this contract sums without secure aggregation and the merchant's policy "
                    "does not accept that (accept_unmasked_sums = false)"
                )
            occasion = whole_run(message.run, message.contract)
            self.ledger.check_affordable(occasion, self._charges)
        except HansaError as refusal:
            return self._attested(_told(refusal))
        return self._attested("")

    def _attested(self, refusal: str) -> Attested:
        return Attested(self.merchant, refusal, self._repeatable, self._members_version)

    @property
    def _accepts_sums(self) -> bool:
        return self.contract.aggregation.secure or self._accept_unmasked_sums

    def advertise(self, message: Advertise) -> Advertised:
        """Reserve what the run may cost; begin a session where its sums are secure.

        Raises:
            WireError: The message is of another contract, or this merchant accepts no such sums.
            LedgerError: The ledger refuses.
        """
        self._check_contract(message.contract)
        self._check_sums()
        secure = self.contract.aggregation.secure
        known = self._party.advertised(message) if secure else None
        if known is not None:
            return Advertised(self.merchant, *known)
        head = self.ledger.reserve(
            whole_run(message.run, message.contract),
            self._charges,
            self._plan.last(self.contract.training.rounds),
            message.countersigned,
        )
        sent = head.to_bytes()
        if not secure:
            return Advertised(self.merchant, b"", sent)
        return Advertised(self.merchant, *self._party.advertise(message, head.link, sent))

    def share(self, message: Share) -> Shared:
        """Join a session; raises `SecureSumError` where its roster is not to be trusted."""
        self._check_contract(message.contract)
        party = self._party
        self.ledger.accept(message.countersigned)  # if it is refused, the session stays as it is
        escrow, head = party.share(message, lambda roster: self._join(message, roster))
        return Shared(self.merchant, escrow, head)

    def _join(self, message: Share, roster: str) -> bytes:
        try:
            return self.ledger.join(
                message.run, message.session, roster, len(message.roster), message.countersigned
            ).to_bytes()
        except ReplayRefusal as refusal:
            raise SecureSumError(f"field 'roster': {refusal}") from None

    def confirm(self, message: Confirm) -> Confirmed:
        """Vouch for who is in a sum; raises `SecureSumError` where that would be unsafe."""
        return Confirmed(self.merchant, self._party.confirm(message))

    def reveal(self, message: Reveal) -> Revealed:
        """Help to unmask a sum; raises `SecureSumError` where that would be unsafe."""
        shares, label, survivors = self._party.reveal(message)
        self.ledger.note_sum(label.run, label.stage, label.round, label.attempt, survivors)
        if (label.stage, label.round) == self._plan.last(self.contract.training.rounds):
            self.ledger.settle(label.run)
            self._party.forget(label.run, message.session, self._contract_sha256)
        return Revealed(self.merchant, shares)

    @property
    def _party(self) -> SecureParty:
        if self._secure is None or not self.contract.aggregation.secure:
            raise WireError("this merchant's contract has no secure sums")
        return self._secure

    def answer(self, request: SumRequest) -> SumAnswer:
        """Return this merchant's noisy part of a sum, charged before it is computed.

        Raises:
            SecureSumError: What the request brings for a secure sum is not right; nothing is
                charged.
        """
        charged = self.charge(request)
        if isinstance(charged, SumAnswer):
            return charged
        return self.give(charged, self.computed(charged))

    def charge(self, request: SumRequest) -> "Charged | SumAnswer":
        """Check a request and charge the ledger for what it asks.

        Returns:
            What is to be computed; or the answer, where it was given before or is a refusal.

        Raises:
            SecureSumError: As `answer`.
        """
        known = self._answered(request)
        if known is not None:
            return known
        secure = self.contract.aggregation.secure
        try:
            release = self._checked(request)
            parameters = parameters_sha256(request.parameters)
            prepared = self._party.prepare(request) if secure else None
            head = self.ledger.release(
                _occasion(request),
                Charge(
                    release.stage,
                    release.event,
                    release.towards_server(self.contract.exposed_contributors),
                ),
                parameters,
                "" if prepared is None else prepared.name,
                request.countersigned,
            ).to_bytes()
        except SecureSumError:
            raise
        except (WireError, LedgerError) as refusal:
            return self._refusal(refusal)
        noise = self._noise_for(request.stage, request.round, request.attempt)
        return Charged(request, parameters, release, prepared, head, noise)

    def computed(self, charged: "Charged") -> Int[np.ndarray, " P"]:
        """Return the noisy vector of what was charged for, in lattice steps."""
        release, request = charged.release, charged.request
        if request.stage != UPDATE or self.contract.training.mode != "local":
            return self.noisy(charged, self._exact(release, request))
        if self.contract.training.engine == "opacus":
            return self.update_of(self._local_change(charged))
        kernel = kernel_of(self._network, "float32")
        tasks = [self.task(charged, kernel)]
        return self.update_of(local_updates(kernel, tasks, self.contract.training, release)[0])

    def task(self, charged: "Charged", kernel: Kernel) -> Task:
        """Return this merchant's own steps as a task for a kernel, alone or among others."""
        request = charged.request
        return Task(self.table(kernel), request.parameters, self._batch(request), charged.noise)

    def table(self, kernel: Kernel) -> Table:
        """Return the customers that are trained on, as a kernel takes them."""
        known = self._tables.get(kernel.precision)
        if known is None:
            known = self._tables[kernel.precision] = kernel.table(*self._train)
        return known

    def update_of(self, change: Float[np.ndarray, " P"]) -> Int[np.ndarray, " P"]:
        """Return a model's change, clipped to the public bound, in lattice steps."""
        aggregation = self.contract.aggregation
        lattice, bound = local_lattice(aggregation.ring_bits, self.contract.max_merchants)
        return to_lattice(np.clip(change, -bound, bound), lattice.step)

    def give(self, charged: "Charged", multiples: Int[np.ndarray, " P"]) -> SumAnswer:
        """Return the answer that holds a noisy vector, masked where sums are secure."""
        vector = lattice_of(charged.release, self.contract).to_ring(multiples)
        request, prepared = charged.request, charged.prepared
        if prepared is None:
            answer = SumAnswer(self.merchant, "", False, b"", charged.head, vector)
            self._plain = _occasion(request), _bare(request), charged.parameters, answer
            return answer
        return self._sent(self._party.mask(request, prepared, vector, charged.head))

    def _batch(self, request: SumRequest) -> float:
        """Return what a step's sum is divided by: never this merchant's own exact number."""
        average = max(request.customers_per_merchant, 1.0)
        return average * self.contract.training.sampling_rate

    def _answered(self, request: SumRequest) -> SumAnswer | None:
        """Return what answered this very request before: nothing is computed twice."""
        if self.contract.aggregation.secure:
            masked = self._party.masked(request)
            return None if masked is None else self._sent(masked)
        if self._plain is not None and self._plain[0] == _occasion(request):
            _, known, parameters, answer = self._plain
            alike = fingerprint(known) == fingerprint(_bare(request))
            same = alike and parameters == parameters_sha256(request.parameters)
            return answer if same else None
        return None

    def _sent(self, masked: Masked) -> SumAnswer:
        return SumAnswer(self.merchant, "", False, masked.escrow, masked.head, masked.vector)

    def _refusal(self, refusal: HansaError) -> SumAnswer:
        """Return a refusal; it is for good unless only this sum, or the disk, is the matter."""
        for_good = isinstance(refusal, WireError | BudgetRefusal | WitnessRefusal)
        dtype: Any = np.uint32 if self.contract.aggregation.ring_bits == 32 else np.uint64
        nothing = np.zeros(0, dtype=dtype)
        return SumAnswer(self.merchant, _told(refusal), not for_good, b"", b"", nothing)

    def _checked(self, request: SumRequest) -> Release:
        """Return the planned release that a request asks for."""
        self._check_contract(request.contract)
        self._check_sums()
        rounds = self.contract.training.rounds
        release = self._plan.release_of(request.stage, request.round, rounds)
        if release is None:
            raise WireError(f"field 'stage': the contract knows no stage '{request.stage[:40]}'")
        if request.round > rounds:
            raise WireError(f"field 'round': the contract ends after {rounds} rounds")
        theta = request.parameters
        if theta.shape != (self._network.size,) or not (  # nor is what is not a number
            theta.min() >= -MAX_PARAMETER and theta.max() <= MAX_PARAMETER
        ):
            raise WireError(
                f"field 'vector': expected {self._network.size} finite model parameters"
            )
        return release

    def _check_contract(self, sha256: str) -> None:
        if sha256 != self._contract_sha256:
            raise WireError(
                f"field 'contract': this merchant pinned contract {self._contract_sha256[:16]}…, "
                "the run has another; compare the files"
            )

    def _check_sums(self) -> None:
        if not self._accepts_sums:
            raise WireError("this merchant does not accept sums without secure aggregation")

    def _exact(self, release: Release, request: SumRequest) -> Float[np.ndarray, " P"]:
        """Return the exact sum over this merchant's customers; it must not leave as it is."""
        if request.stage == CENSUS:
            return np.array([float(len(self._train[0]))])
        if request.stage == EVALUATION:
            return confusion_counts(
                self._test[1],
                self._network.predictions(request.parameters, self._test[0]),
                len(self.contract.segments.names),
            )
        if request.stage == PROFILE:
            predicted = self._network.predictions(request.parameters, self._everyone)
            return profile_sums(self._everyone, predicted, len(self.contract.segments.names))
        return self._gradient_sum(
            self._network, request.parameters, *self._train, release.event.sensitivity
        )

    def noisy(self, charged: "Charged", exact: Float[np.ndarray, " P"]) -> Int[np.ndarray, " P"]:
        """Return an exact sum rounded and with this merchant's share of the noise."""
        return self._noisy(charged.release, exact, charged.noise)

    def _noisy(
        self,
        release: Release,
        exact: Float[np.ndarray, " P"],
        noise: NoiseSource,
    ) -> Int[np.ndarray, " P"]:
        return noisy_sum(
            exact,
            sensitivity=release.event.sensitivity,
            noise_multiplier=release.event.noise_multiplier,
            contributors=self.contract.noise_contributors,
            noise=noise,
            steps=release.steps,
            error=release.error,
        )

    def _local_change(self, charged: "Charged") -> Float[np.ndarray, " P"]:
        """Take the same steps with Opacus' gradients."""
        release, noise, batch = charged.release, charged.noise, self._batch(charged.request)
        training, start = self.contract.training, charged.request.parameters
        optimizer, sampling = OwnOptimizer(training, start[None]), noise.spawn()
        scale = scale_of(lattice_step(release.event.sensitivity, release.steps), batch)
        for _ in range(training.local_steps):
            rows = sampling.sampled(len(self._train[1]), training.sampling_rate)
            x, y = self._train[0][rows], self._train[1][rows]
            theta, clip_norm = optimizer.theta[0], release.event.sensitivity
            exact = self._gradient_sum(self._network, theta, x, y, clip_norm)
            optimizer.step(from_lattice(self._noisy(release, exact, noise), scale)[None])
        changed: Float[np.ndarray, " P"] = optimizer.theta[0] - start
        return changed


def _bare(request: SumRequest) -> SumRequest:
    """Return a request without its model."""
    return replace(request, parameters=np.zeros(0))


def _occasion(request: SumRequest) -> Occasion:
    return Occasion(request.run, request.stage, request.round, request.attempt, request.contract)


def _told(refusal: HansaError) -> str:
    """Return what the coordinator may read of a refusal: no path, nothing of this machine."""
    told = BudgetRefusal | ReplayRefusal | WitnessRefusal
    if isinstance(refusal, LedgerError) and not isinstance(refusal, told):
        logger.error("%s", refusal)
        return "the merchant's ledger cannot be used; its own log says why"
    return str(refusal)


def _engine(contract: Contract) -> GradientSum:
    if contract.training.engine == "opacus":
        from clients.training_opacus import clipped_gradient_sum_opacus

        return clipped_gradient_sum_opacus
    return clipped_gradient_sum


def confusion_counts(
    labels: Int[np.ndarray, " N"], predicted: Int[np.ndarray, " N"], segments: int
) -> Float[np.ndarray, " SS"]:
    """Count (true, predicted) pairs, row-major; one customer moves one count by one."""
    return np.bincount(labels * segments + predicted, minlength=segments**2).astype(np.float64)


def profile_sums(
    x: Float[np.ndarray, "R F"], predicted: Int[np.ndarray, " R"], segments: int
) -> Float[np.ndarray, " S1F"]:
    """Sum, for each segment, (1, x) scaled so that one customer adds at most 1 in L2.

    Inputs lie in [-1, 1]; the count gets half of the squared norm and the F inputs the rest,
    so that counts, which everything else is divided by, are the most exact.
    """
    inputs = x.shape[1]
    rows = np.concatenate(
        [np.full((len(x), 1), np.sqrt(0.5)), np.clip(x, -1.0, 1.0) * np.sqrt(0.5 / inputs)], axis=1
    )
    sums = np.zeros((segments, 1 + inputs))
    for segment in range(segments):
        sums[segment] = rows[predicted == segment].sum(axis=0)
    return sums.ravel()
