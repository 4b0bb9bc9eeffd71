"""The real merchant code, as the audit's subject.

`RealSubject` wires `clients.*` to the protocols of `audit.subject`: the audit may not import it.
Everything that knows the worker, the ledger and the wire is in `_Asked`.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, UInt

import clients.worker
from audit.subject import Question, Step, Table
from clients.features import encode
from clients.table import make_table
from clients.worker import Customers, Worker, seeded_noise
from common.budget import Budget, Charge
from common.chain import Head
from common.contract import Contract
from common.errors import RunError
from common.events import Event
from common.fixed_point import from_lattice
from common.identity import Identity
from common.ledger import Ledger
from common.network import initial_parameters
from common.noise import NoiseSource
from common.plan import CENSUS, EVALUATION, PROFILE, UPDATE, evaluation_rounds, lattice_of, plan_of
from common.wire import Advertise, SumRequest
from server.optimizers import Optimizer
from server.witness import Witness

_MEMORY = Path("/dev/shm")  # noqa: S108 - these ledgers need to outlive no power cut
_PLENTY = 1e5  # cap of a ledger that no other run will ever use


class _Asked:
    """A worker over generated customers, with a ledger in a folder of its own.

    Args:
        contract: A contract with plain sums.
        name: The merchant's id.
        table: Its customers.
        seed: Makes its noise repeatable, run by run; None for the operating system's.
        folder: Gets the ledger.
        witness: Countersigns the ledger.
    """

    def __init__(
        self,
        contract: Contract,
        name: str,
        table: Table,
        seed: int | None,
        folder: Path,
        witness: Witness,
    ) -> None:
        self._run, self._seed, self._name = "", seed, name
        self._sha256 = contract.sha256
        self._identity = Identity.generate(name)
        self._witness = witness
        self._ledger = Ledger(
            folder / "ledger.sqlite",
            Budget(_PLENTY, contract.privacy.delta),
            self._identity,
            witness.public,
        )
        self._worker = Worker(
            name,
            contract,
            Customers(table.inputs, table.labels, table.held_out),
            self._ledger,
            accept_unmasked_sums=True,
            noise_for=self._noise,
        )

    def answer(self, question: Question) -> UInt[np.ndarray, " P"]:
        """Return the vector that would be masked and sent."""
        if question.run != self._run:
            self._reserve(question.run)
        answer = self._worker.answer(
            SumRequest(
                question.run,
                self._sha256,
                question.stage,
                question.round,
                0,
                question.customers_per_merchant,
                0,
                0,
                b"",
                b"",
                self._witness.latest(self._identity.public),
                question.parameters,
            )
        )
        if answer.refusal:
            raise RunError(f"the merchant under audit refused: {answer.refusal}")
        return answer.vector

    def _reserve(self, run: str) -> None:
        """Let the merchant reserve a run, and the witness countersign that it did."""
        key = self._identity.public
        told = Advertise(run, self._sha256, 0, self._witness.latest(key))
        head = Head.from_bytes(self._worker.advertise(told).head)
        refused = self._witness.countersign({self._name: (key, head)})
        if refused:
            raise RunError(f"the witness refused the merchant under audit: {refused[self._name]}")
        self._run = run

    def charged(self) -> list[Event]:
        """Return the releases that the ledger holds, in order."""
        found = [entry.document for entry in self._ledger.entries()]
        return [
            Charge.from_document(document).event
            for document in found
            if document["kind"] == "release"
        ]

    def _noise(self, stage: str, number: int, attempt: int) -> NoiseSource:
        if self._seed is None:  # looked up late: what is in use is what is audited
            return clients.worker.os_noise(stage, number, attempt)
        return seeded_noise(self._seed, f"{self._name} {self._run}")(stage, number, attempt)


class _Run:
    """A whole run over several merchants, the coordinator's optimizer included."""

    def __init__(self, contract: Contract, merchants: Sequence[_Asked]) -> None:
        self._contract = contract
        self._merchants = merchants
        self._average = 0.0

    def steps(self) -> Iterator[Step]:
        """Carry out the run and yield its training rounds."""
        training = self._contract.training
        optimizer = Optimizer(training, initial_parameters(self._contract))
        census = self._total(CENSUS, 0, optimizer.theta)
        self._average = max(float(census[0]), 1.0) / len(self._merchants)
        evaluated = evaluation_rounds(self._contract)
        for number in range(1, training.rounds + 1):
            start = optimizer.theta
            total = self._total(UPDATE, number, start)
            yield Step(start, total, self._average)
            optimizer.step(self._gradient(total))
            if number in evaluated:
                self._total(EVALUATION, number, optimizer.published)
        if self._contract.publication.profiles:
            self._total(PROFILE, training.rounds, optimizer.published)

    def charged(self) -> list[Event]:
        """Return what the ledger of the first merchant was charged so far."""
        return self._merchants[0].charged()

    def _total(
        self, stage: str, number: int, parameters: Float[np.ndarray, " P"]
    ) -> Float[np.ndarray, " P"]:
        release = plan_of(self._contract).release_of(stage, number, self._contract.training.rounds)
        if release is None:
            raise RunError(f"the contract knows no stage '{stage}'")
        asked = Question("audit", stage, number, self._average, parameters)
        lattice = lattice_of(release, self._contract)
        vectors = [merchant.answer(asked) for merchant in self._merchants]
        total = np.sum(vectors, axis=0, dtype=lattice.dtype)
        return from_lattice(lattice.from_ring(total), lattice.step)

    def _gradient(self, total: Float[np.ndarray, " P"]) -> Float[np.ndarray, " P"]:
        """Return what the coordinator follows (`server.coordinator`)."""
        if self._contract.training.mode == "distributed":
            return total / (self._average * len(self._merchants))
        return -total / len(self._merchants)


class RealSubject:
    """The code of this installation; ledgers live in a folder that is gone at the end.

    >>> with RealSubject() as subject:
    ...     pass
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(
            prefix="hansa-audit-", dir=_MEMORY if _MEMORY.is_dir() else None
        )
        coordinator = Identity.generate("coordinator")
        self._witness = Witness(Path(self._folder.name) / "witness.sqlite", coordinator)
        self._count = 0

    def __enter__(self) -> "RealSubject":
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def merchant(self, contract: Contract, name: str, table: Table, seed: int | None) -> _Asked:
        """Return a merchant with these customers and a ledger of its own."""
        self._count += 1
        folder = Path(self._folder.name) / str(self._count)
        return _Asked(contract, name, table, seed, folder, self._witness)

    def training(self, contract: Contract, tables: Sequence[Table], seed: int | None) -> _Run:
        """Return a run over merchants with these customers."""
        return _Run(
            contract,
            [
                self.merchant(contract, f"merchant {m}", table, seed)
                for m, table in enumerate(tables)
            ],
        )

    def encoded(
        self, contract: Contract, columns: Mapping[str, Sequence[Any]]
    ) -> Float[np.ndarray, "R F"]:
        """Return raw feature columns as model inputs, by way of a merchant's table."""
        frame = pd.DataFrame(columns)
        frame.insert(0, "customer_id", [f"customer {row}" for row in range(len(frame))])
        return encode(make_table(frame, contract, source="the audit's customers"), contract)
