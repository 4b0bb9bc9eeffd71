"""What both ways of getting a sum over the cohort have in common: messages and usable answers."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
from jaxtyping import Int

from common.contract import Contract
from common.errors import WireError
from common.fixed_point import Lattice
from common.plan import CENSUS, EVALUATION, PROFILE, UPDATE
from common.wire import (
    Advertised,
    Confirmed,
    Record,
    Revealed,
    Shared,
    SumAnswer,
    SumRequest,
    unpack,
)
from server.cohort import Cohort

MESSAGE_TYPES = {
    CENSUS: "query.census",
    UPDATE: "train.update",
    EVALUATION: "evaluate.confusion",
    PROFILE: "query.profile",
}
RENEWAL_STEPS = 10  # a session that lost members is set up anew after so many steps
Answer = TypeVar("Answer", Advertised, Shared, SumAnswer, Confirmed, Revealed)


@dataclass(frozen=True)
class LatticeSum:
    """A sum over the merchants that answered, in multiples of the lattice step."""

    total: Int[np.ndarray, " P"]
    merchants: tuple[str, ...]
    fewest: int  # merchants in the smallest part that was summed apart
    parts: dict[str, Int[np.ndarray, " P"]] = field(default_factory=dict)  # plain sums only


class Sums(Protocol):
    """A way to get one sum after the other."""

    def ask(self, request: SumRequest, length: int, lattice: Lattice) -> LatticeSum | None:
        """Return the sum; None where too few merchants answered.

        Raises:
            SecureSumError: Nobody could be asked; nothing is spent.
        """

    @property
    def state(self) -> dict[str, Any]:
        """Return what a later process needs to go on with the next sum."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""


@dataclass(frozen=True)
class Run:
    """What both ways know of a run.

    Attributes:
        name: The run's.
        contract: Of the run.
        cohort: Who takes part.
        look_for_late: Takes in merchants that came since the last look.
        on_change: Called when something was set up that a later process must know.
    """

    name: str
    contract: Contract
    cohort: Cohort
    look_for_late: Callable[[], object] = lambda: None
    on_change: Callable[[], object] = lambda: None


def usable(
    cohort: Cohort, message_type: str, contents: dict[int, Record], kind: type[Answer]
) -> Iterator[tuple[int, Answer]]:
    """Ask, and yield each usable answer; note what is wrong with the others."""
    answers: dict[int, Answer] = {}
    for node, record in cohort.ask(message_type, contents).items():
        try:
            answer = unpack(kind, record)
            _check_name(cohort, node, answer.merchant)
        except WireError as error:
            cohort.failures[cohort.name(node)] = str(error)
            continue
        answers[node] = answer
    if kind in {Advertised, Shared}:
        answers = cohort.witnessed(answers)
    yield from answers.items()


def answers(
    cohort: Cohort, records: dict[int, Record], length: int, lattice: Lattice
) -> dict[int, SumAnswer]:
    """Return the usable answers by node; go on without merchants that refused."""
    found = {}
    for node, record in records.items():
        try:
            answer = unpack(SumAnswer, record)
            _check_name(cohort, node, answer.merchant)
            if answer.refusal and answer.again:
                cohort.failures[cohort.name(node)] = answer.refusal
                continue
            if answer.refusal:
                cohort.dismiss(node, answer.refusal)
                continue
            _check_vector(answer.vector, length, lattice)
        except WireError as error:
            cohort.failures[cohort.name(node)] = str(error)
            continue
        found[node] = answer
    return cohort.witnessed(found)


def _check_name(cohort: Cohort, node: int, merchant: str) -> None:
    if merchant != cohort.members[node]:
        raise WireError("field 'merchant': differs from what the node attested")


def _check_vector(vector: np.ndarray, length: int, lattice: Lattice) -> None:
    if vector.shape != (length,) or vector.dtype != lattice.dtype:
        raise WireError(
            f"field 'vector': expected {length} numbers of type {lattice.dtype.__name__}"
        )
