"""A world of merchants in secure sums without a network: any message can be lost, either way."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from clients.secure_sum import Label, MerchantSession, state_from_bytes, state_to_bytes
from common.errors import SecureSumError
from common.identity import Identity, Members
from common.session import occasion_hash, session_context
from server.secure_sum import CoordinatorSession

LABEL = Label("run", "update", 1, 0)
SETUP_STAGES = ("advertise", "share")
STEP_STAGES = ("update", "confirm", "reveal")
ASKED, ANSWER = "asked", "answer"  # the way on which a message is lost

Fates = Mapping[int, tuple[str, str]]  # number of the merchant -> (stage, way)


def ids(count: int) -> list[str]:
    """Return merchants' ids in order."""
    return [f"shop-{number:03d}" for number in range(count)]


def occasion(number: int) -> bytes:
    """Return the hash of what a step sums."""
    return occasion_hash("update", number, 0, 50.0, np.zeros(3))


def vectors_of(
    count: int, length: int, dtype: type[np.unsignedinteger], seed: int
) -> list[np.ndarray]:
    """Return vectors over the whole ring."""
    generator = np.random.default_rng(seed)
    most = np.iinfo(dtype).max
    return [generator.integers(0, most, length, dtype=dtype, endpoint=True) for _ in range(count)]


@dataclass
class World:
    """Merchants, their sessions, and a coordinator.

    Attributes:
        forgetful: Every merchant's state goes through bytes and back after each message.
        held: Masked vectors and escrows of the last step that were lost on their way back.
    """

    count: int
    minimum: int
    forgetful: bool = False
    number: int = 1
    merchants: dict[str, MerchantSession] = field(default_factory=dict)
    step_number: int = 0
    held: dict[int, tuple[np.ndarray, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.identities = {name: Identity.generate(name) for name in ids(self.count)}
        self.members = Members({name: one.public for name, one in self.identities.items()})
        self.context = session_context("run", self.number, "contract")
        self.coordinator = CoordinatorSession(self.context, self.members, self.minimum)

    @property
    def roster(self) -> list[str]:
        """Ids of the members by position."""
        return [advert.merchant for advert in self.coordinator.roster.adverts]

    def at(self, position: int) -> MerchantSession:
        """Return the session of the member at a position."""
        return self.merchants[self.roster[position]]

    def snapshot(self) -> "World":
        """Return a copy that goes its own way; keys that have no copy are shared."""
        other = copy.copy(self)
        other.coordinator = copy.deepcopy(self.coordinator, {id(self.members): self.members})
        other.merchants = {
            name: MerchantSession(
                self.identities[name],
                self.members,
                self.minimum,
                state_from_bytes(state_to_bytes(session.state)),
            )
            for name, session in self.merchants.items()
        }
        return other

    def advertise(self, fates: Fates | None = None) -> None:
        """Begin sessions; adverts that are not lost reach the coordinator."""
        for number, name in enumerate(ids(self.count)):
            fate = (fates or {}).get(number)
            if fate == ("advertise", ASKED):
                continue
            session = MerchantSession.advertise(
                self.identities[name], self.members, self.minimum, self.context, self.number
            )
            self.merchants[name] = session
            self._sleep(name)
            if fate != ("advertise", ANSWER):
                self.coordinator.take_advert(session.advert, name)

    def share(self, fates: Fates | None = None) -> list[SecureSumError]:
        """Show the roster; return what the members refused it for."""
        adverts, refusals = self.coordinator.close_roster(), []
        for position, name in enumerate(self.roster):
            fate = (fates or {}).get(int(name[-3:]))
            if fate == ("share", ASKED):
                continue
            try:
                escrow = self.merchants[name].share(adverts)
            except SecureSumError as error:
                refusals.append(error)
                continue
            self._sleep(name)
            if fate != ("share", ANSWER):
                self.coordinator.take_escrow(position, escrow)
        return refusals

    def set_up(self, fates: Fates | None = None) -> "World":
        """Advertise and share."""
        self.advertise(fates)
        self.share(fates)
        return self

    def update(self, vectors: list[np.ndarray], fates: Fates | None = None) -> None:
        """Begin a step and collect masked vectors."""
        self.step_number += 1
        self.held = {}
        what, kind = occasion(self.step_number), vectors[0].dtype.type
        step = self.coordinator.begin(what, len(vectors[0]), kind)
        for position, name, fate in self._asked(self.coordinator.active, "update", fates):
            active, boxes = self.coordinator.request(position)
            session = self.merchants[name]
            prepared = session.prepare(step, what, active, boxes, LABEL)
            masked, escrow = session.mask(prepared, vectors[int(name[-3:])])
            self._sleep(name)
            if fate == ANSWER:
                self.held[position] = masked, escrow
            else:
                self.coordinator.take_masked(position, masked, escrow)

    def confirm(self, fates: Fates | None = None) -> None:
        """Close the sum and collect confirmations."""
        survivors, step = self.coordinator.close_sum(), self.coordinator.step
        for position, name, fate in self._asked(self.coordinator.survivors, "confirm", fates):
            codes = self.merchants[name].confirm(step, survivors)
            self._sleep(name)
            if fate != ANSWER:
                self.coordinator.take_confirmations(position, codes)

    def reveal(self, fates: Fates | None = None) -> None:
        """Hand round the confirmations and collect shares."""
        step = self.coordinator.step
        for position, name, fate in self._asked(self.coordinator.confirmed, "reveal", fates):
            shares = self.merchants[name].reveal(
                step, *self.coordinator.confirmations_for(position)
            )
            self._sleep(name)
            if fate != ANSWER:
                self.coordinator.take_shares(position, shares)

    def sum(self, vectors: list[np.ndarray], fates: Fates | None = None) -> np.ndarray:
        """Carry out one whole step."""
        self.update(vectors, fates)
        self.confirm(fates)
        self.reveal(fates)
        return self.coordinator.total()

    def plain(self, vectors: list[np.ndarray], positions: list[int]) -> np.ndarray:
        """Return the ring sum of the vectors of the members at some positions."""
        chosen = [vectors[int(self.roster[position][-3:])] for position in positions]
        return np.sum(chosen, axis=0, dtype=vectors[0].dtype)

    def _asked(
        self, positions: list[int], stage: str, fates: Fates | None
    ) -> Iterator[tuple[int, str, str]]:
        """Yield the members that a message reaches, and whether their answer is lost."""
        for position in positions:
            name = self.roster[position]
            lost_at, way = (fates or {}).get(int(name[-3:]), ("", ""))
            if (lost_at, way) != (stage, ASKED):
                yield position, name, way if lost_at == stage else ""

    def _sleep(self, name: str) -> None:
        """Let a merchant forget everything but its state's bytes, if it is forgetful."""
        session = self.merchants[name]
        if self.forgetful:
            again = state_from_bytes(state_to_bytes(session.state))
            assert again == session.state
            self.merchants[name] = MerchantSession(
                self.identities[name], self.members, self.minimum, again
            )
