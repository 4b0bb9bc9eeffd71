"""What is audited: code that answers for a merchant, and the contract it is tried with.

The audit knows no room but `common`. Who wires it to the real code (`simulations.audited`)
passes a `Subject`. All customers are generated: nothing here has seen a real one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Float, Int, UInt

from common.contract import Contract, parse_contract
from common.events import Event

MAX_FEATURES = 4096  # of a contract


@dataclass(frozen=True)
class Table:
    """Generated customers as model inputs (R customers, F inputs)."""

    inputs: Float[np.ndarray, "R F"]
    labels: Int[np.ndarray, " R"]
    held_out: Bool[np.ndarray, " R"]


@dataclass(frozen=True)
class Question:
    """What a coordinator, not always an honest one, asks a merchant for."""

    run: str
    stage: str
    round: int
    customers_per_merchant: float
    parameters: Float[np.ndarray, " P"]


class Merchant(Protocol):
    """One merchant, as its messages and its ledger show it."""

    def answer(self, question: Question) -> UInt[np.ndarray, " P"]:
        """Return the vector that would be masked and sent, in the ring.

        Raises:
            HansaError: It refuses.
        """

    def charged(self) -> Sequence[Event]:
        """Return what its ledger was charged, in order."""


@dataclass(frozen=True)
class Step:
    """One training round as an observer sees it."""

    parameters: Float[np.ndarray, " P"]  # that the merchants were sent
    total: Float[np.ndarray, " P"]  # noisy sum, decoded
    customers_per_merchant: float  # that they were told


class Training(Protocol):
    """A whole run."""

    def steps(self) -> Iterator[Step]:
        """Carry out the run and yield its training rounds."""

    def charged(self) -> Sequence[Event]:
        """Return what the ledger of the first merchant was charged so far."""


class Subject(Protocol):
    """The code under audit.

    A `seed` makes noise repeatable; without one it comes from where a real merchant's comes
    from. The same seed, name, run, stage and round give the same noise, whatever the table.
    """

    def merchant(self, contract: Contract, name: str, table: Table, seed: int | None) -> Merchant:
        """Return a merchant with these customers and a ledger of its own."""

    def training(self, contract: Contract, tables: Sequence[Table], seed: int | None) -> Training:
        """Return a run over merchants with these customers."""

    def encoded(
        self, contract: Contract, columns: Mapping[str, Sequence[Any]]
    ) -> Float[np.ndarray, "R F"]:
        """Return raw feature columns as model inputs."""


def twin(contract: Contract, columns: int, **sections: dict[str, Any]) -> Contract:
    """Return the contract to try things with: plain sums, further columns, some keys replaced.

    Plain sums show what secure ones mask; the noise shares stay those of the contract. Own steps
    (mode `local`) are plain SGD's, whose changes show the noisy sums; other optimizers work on the
    very same sums. The further columns stand for categories that no real customer has; there
    canaries and planted rows can be told apart.

    Raises:
        ContractError: The replaced keys make no valid contract.
    """
    document = contract.model_dump(mode="json")
    document["aggregation"] |= {
        "secure": False,
        "min_survivors": contract.min_survivors,
        "max_customers": max(contract.aggregation.max_customers, 20_000),
    }
    document["training"] |= {"local_optimizer": "sgd", "local_momentum": 0.0}
    room = min(columns, MAX_FEATURES - len(contract.features))
    document["features"] = [
        *document["features"],
        *({"name": f"audit column {i}", "low": -1.0, "high": 1.0} for i in range(room)),
    ]
    for section, changes in sections.items():
        document[section] = {**document[section], **changes}
    return parse_contract(document, source="the contract as the audit tries it")


def noise_shares(contract: Contract) -> int:
    """Return how many merchants' shares must make up the noise, worked out anew."""
    if contract.training.mode == "local":
        return 1
    return contract.min_survivors - contract.aggregation.colluders
