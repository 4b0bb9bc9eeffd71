"""The attacker's tools: real merchants, a coordinator that keeps everything, and its algebra.

`Server` obeys no rule of `server.secure_sum`: it stores what it sees and sends what it likes.
`unmasked_alone` is what it would compute for one merchant if it got both kinds of shares.
"""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from clients.secure_party import SecureParty
from clients.secure_sum import Label, MerchantSession, Prepared, State
from clients.session_store import FileStore, MemoryStore, SessionStore
from clients.worker import Customers, Worker
from common.budget import Budget
from common.chain import Head
from common.contract import Contract, parse_contract
from common.identity import Identity, Members
from common.masks import add_masks, expand, stream_bytes
from common.network import initial_parameters
from common.session import (
    BOX_BYTES,
    CONFIRMATION_BYTES,
    Advert,
    Escrow,
    Roster,
    commitment,
    mask_key,
    occasion_hash,
    pair_secret_info,
    row_key,
    session_context,
    step_context,
    to_bitmap,
)
from common.shares import SECRET_BYTES, combine
from common.streams import KEY_BYTES
from common.wire import Advertise, Confirm, Reveal, Share, SumAnswer, SumRequest
from server.secure_sum import CoordinatorSession
from tests.witnessed import COORDINATOR, ledger_at, witness

LENGTH = 512
MODEL = np.linspace(-1.0, 1.0, 16)
CONTEXT = session_context("run", 1, "contract")
LABEL = Label("run", "update", 1, 0)

Naive = Callable[[State], MerchantSession]


def occasion(number: int = 1, attempt: int = 0, model: np.ndarray = MODEL) -> bytes:
    """Return the hash of an update that is asked for."""
    return occasion_hash("update", number, attempt, 10.0, model)


def planted(position: int) -> np.ndarray:
    """Return a vector that is easy to recognise and is nobody else's."""
    return (np.arange(LENGTH, dtype=np.uint32) * 7 + 1_000_003 * (position + 1)).astype(np.uint32)


def names_of(count: int) -> list[str]:
    """Return ids in the order of a roster."""
    return [f"m{number:03d}" for number in range(count)]


def share_of_self(raw: bytes) -> bytes:
    """Return the half of a dealt share that belongs to the self-mask secret."""
    return raw[:SECRET_BYTES]


def share_of_row(raw: bytes) -> bytes:
    """Return the half of a dealt share that belongs to the row secret."""
    return raw[SECRET_BYTES:]


def secret_of(shares: Mapping[int, bytes], needed: int) -> bytes:
    """Restore a secret from the first `needed` shares by position."""
    chosen = sorted(shares.items())[:needed]
    rows = np.array([np.frombuffer(share, dtype="<u2") for _, share in chosen])
    points = tuple(position + 1 for position, _ in chosen)
    return combine(points, rows.astype(np.uint16)).astype("<u2").tobytes()


def row_of(escrow: Escrow, row_secret: bytes) -> list[bytes]:
    """Return the pair keys that a row secret opens."""
    stream = stream_bytes(row_key(row_secret), len(escrow.row))
    opened = bytes(a ^ b for a, b in zip(escrow.row, stream, strict=True))
    return [opened[i : i + KEY_BYTES] for i in range(0, len(opened), KEY_BYTES)]


def unmasked_alone(
    masked: np.ndarray, own: int, context: bytes, self_secret: bytes, pair_keys: Mapping[int, bytes]
) -> np.ndarray:
    """Take one merchant's masks off its vector, given what the protocol keeps apart."""
    vector = masked.copy()
    plus = [mask_key(key, context) for other, key in pair_keys.items() if other < own]
    minus = [mask_key(key, context) for other, key in pair_keys.items() if other > own]
    add_masks(vector, plus, [*minus, mask_key(self_secret, context)])
    return vector


def equal_words(one: np.ndarray, other: np.ndarray) -> int:
    """Count the places where two vectors agree."""
    return int((one == other).sum())


def looks_random(vector: np.ndarray, bound: float = 400.0) -> bool:
    """Tell whether the bytes are uniform: chi-squared of 255 degrees stays below 6.4 sigma."""
    counts = np.bincount(np.frombuffer(vector.tobytes(), np.uint8), minlength=256)
    expected = vector.nbytes / 256
    return float(((counts - expected) ** 2 / expected).sum()) < bound


@dataclass
class Reply:
    """What a merchant sent for a step."""

    masked: np.ndarray
    context: bytes
    active: frozenset[int]


@dataclass
class Server:
    """A coordinator that does what it likes with real merchants.

    Attributes:
        clients: By position in the roster.
        members: Who is enrolled.
        adverts: The roster that everybody was shown.
        escrows: (step, position) -> what a merchant left for a step.
        replies: (step, position) -> masked vector.
        codes: (step, survivors, sender) -> receiver -> confirmation.
    """

    identities: list[Identity]
    members: Members
    clients: list[MerchantSession]
    adverts: list[bytes] = field(default_factory=list)
    escrows: dict[tuple[int, int], Escrow] = field(default_factory=dict)
    replies: dict[tuple[int, int], Reply] = field(default_factory=dict)
    codes: dict[tuple[int, frozenset[int], int], dict[int, bytes]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Members of the roster."""
        return len(self.clients)

    @property
    def everyone(self) -> frozenset[int]:
        """All positions."""
        return frozenset(range(self.size))

    @property
    def needed(self) -> int:
        """The threshold, written down anew."""
        return 2 * self.size // 3 + 1

    def boxes_for(self, position: int, step: int, active: Iterable[int]) -> bytes:
        """Return the boxes that the others left for a merchant."""
        others = sorted(set(active) - {position})
        return b"".join(self.escrows[step, other].box(position) for other in others)

    def prepare(
        self,
        position: int,
        step: int = 1,
        active: frozenset[int] | None = None,
        what: bytes | None = None,
        boxes: bytes | None = None,
    ) -> Prepared:
        """Ask a merchant to check a step."""
        chosen = self.everyone if active is None else active
        return self.clients[position].prepare(
            step,
            occasion() if what is None else what,
            to_bitmap(chosen, self.size),
            self.boxes_for(position, step, chosen) if boxes is None else boxes,
            LABEL,
        )

    def update(
        self,
        position: int,
        step: int = 1,
        active: frozenset[int] | None = None,
        what: bytes | None = None,
        vector: np.ndarray | None = None,
    ) -> np.ndarray:
        """Get a merchant's masked vector, and keep it with its escrow."""
        prepared = self.prepare(position, step, active, what)
        own = planted(position) if vector is None else vector
        masked, escrow = self.clients[position].mask(prepared, own)
        self.escrows[step + 1, position] = Escrow.from_bytes(escrow, self.size)
        self.replies[step, position] = Reply(masked, prepared.context, prepared.active)
        return masked

    def confirm(self, position: int, step: int, survivors: Iterable[int]) -> dict[int, bytes]:
        """Let a merchant confirm a set of survivors, and keep what it sent."""
        chosen = frozenset(survivors)
        raw = self.clients[position].confirm(step, to_bitmap(chosen, self.size))
        codes = codes_by_receiver(raw, chosen, position)
        self.codes[step, chosen, position] = codes
        return codes

    def confirmations(
        self, position: int, step: int, survivors: Iterable[int], senders: Iterable[int]
    ) -> tuple[bytes, bytes]:
        """Return bitmap and confirmations of some senders for a merchant."""
        chosen, given = frozenset(survivors), sorted(senders)
        codes = [self.codes[step, chosen, s][position] for s in given if s != position]
        return to_bitmap(given, self.size), b"".join(codes)

    def reveal(
        self, position: int, step: int, survivors: Iterable[int], senders: Iterable[int]
    ) -> dict[int, bytes]:
        """Let a merchant reveal, showing it some senders' confirmations."""
        raw = self.clients[position].reveal(
            step, *self.confirmations(position, step, survivors, senders)
        )
        return shares_by_dealer(raw, self.replies[step, position].active)

    def honest_step(
        self, step: int = 1, out: frozenset[int] = frozenset(), what: bytes | None = None
    ) -> np.ndarray:
        """Carry out one step as an honest coordinator would; `out` fall silent after it began."""
        active = frozenset(p for s, p in self.escrows if s == step)
        survivors = active - out
        for position in sorted(survivors):
            self.update(position, step, active, what)
        for position in sorted(survivors):
            self.confirm(position, step, survivors)
        shares = {p: self.reveal(p, step, survivors, survivors) for p in sorted(survivors)}
        return self.sum_of(step, survivors, shares)

    def sum_of(
        self, step: int, survivors: frozenset[int], shares: Mapping[int, Mapping[int, bytes]]
    ) -> np.ndarray:
        """Unmask a sum from revealed shares: holder -> dealer -> share."""
        first = self.replies[step, min(survivors)]
        total = np.sum([self.replies[step, p].masked for p in survivors], axis=0, dtype=np.uint32)
        plus, minus = [], []
        for dealer in sorted(first.active):
            secret = secret_of({h: given[dealer] for h, given in shares.items()}, self.needed)
            if dealer in survivors:
                minus.append(mask_key(secret, first.context))
                continue
            keys = row_of(self.escrows[step, dealer], secret)
            for other in survivors:
                (minus if other < dealer else plus).append(mask_key(keys[other], first.context))
        add_masks(total, plus, minus)
        return total

    def attacked(
        self,
        victim: int,
        step: int,
        self_shares: Mapping[int, bytes],
        row_shares: Mapping[int, bytes],
    ) -> np.ndarray | None:
        """Try to get a victim's vector from shares of its two secrets; None where they fail.

        The server tries it on the real escrow, and checks each secret against the commitment.
        """
        escrow, reply = self.escrows[step, victim], self.replies[step, victim]
        found = []
        for kind, shares in enumerate((self_shares, row_shares)):
            promised = escrow.commitments[KEY_BYTES * kind : KEY_BYTES * (kind + 1)]
            if len(shares) < self.needed:
                return None
            secret = secret_of(shares, self.needed)
            if commitment(secret) != promised:
                return None
            found.append(secret)
        keys = row_of(escrow, found[1])
        pairs = {other: keys[other] for other in reply.active if other != victim}
        return unmasked_alone(reply.masked, victim, reply.context, found[0], pairs)


def codes_by_receiver(raw: bytes, survivors: frozenset[int], own: int) -> dict[int, bytes]:
    """Cut a merchant's confirmations."""
    others = sorted(survivors - {own})
    assert len(raw) == CONFIRMATION_BYTES * len(others)
    return {
        other: raw[CONFIRMATION_BYTES * i : CONFIRMATION_BYTES * (i + 1)]
        for i, other in enumerate(others)
    }


def shares_by_dealer(raw: bytes, active: frozenset[int]) -> dict[int, bytes]:
    """Cut what a merchant revealed."""
    return {
        dealer: raw[SECRET_BYTES * i : SECRET_BYTES * (i + 1)]
        for i, dealer in enumerate(sorted(active))
    }


def enrolled(count: int) -> tuple[list[Identity], Members]:
    """Return identities in the order of their ids, and the list of them with the witness."""
    identities = [Identity.generate(name) for name in names_of(count)]
    return identities, Members({i.merchant: i.public for i in identities}, COORDINATOR.public)


def advertised(count: int, minimum: int = 2, context: bytes = CONTEXT) -> Server:
    """Return merchants that advertised and have no roster yet."""
    identities, members = enrolled(count)
    clients = [MerchantSession.advertise(i, members, minimum, context, 1) for i in identities]
    return Server(identities, members, clients)


def ready(count: int, minimum: int = 2) -> Server:
    """Return merchants whose session is set up honestly."""
    server = advertised(count, minimum)
    server.adverts = [client.advert for client in server.clients]
    for position, client in enumerate(server.clients):
        server.escrows[1, position] = Escrow.from_bytes(client.share(server.adverts), count)
    return server


def snapshot(client: MerchantSession) -> State:
    """Return a copy of what a merchant remembers: what it would still know if it did no check."""
    return deepcopy(client.state)


def both_shares(state: State, dealer: int) -> tuple[bytes, bytes]:
    """Return what a merchant holds of a dealer's two secrets in the step under way."""
    assert state.step is not None
    raw = state.step.shares[dealer]
    return share_of_self(raw), share_of_row(raw)


def pair_keys_of(state: State, step: int) -> dict[int, bytes]:
    """Return a merchant's own pair keys of a step, as a colluder hands them over."""
    return {
        other: expand(pair.masking, pair_secret_info(state.own, other, step))
        for other, pair in state.pairs.items()
    }


def coordinator_of(server: Server, minimum: int = 2) -> CoordinatorSession:
    """Return an honest coordinator's session over the same merchants, with the first escrows."""
    session = CoordinatorSession(CONTEXT, server.members, minimum)
    for identity, client in zip(server.identities, server.clients, strict=True):
        session.take_advert(client.advert, identity.merchant)
    adverts = session.close_roster()
    for position, client in enumerate(server.clients):
        session.take_escrow(position, client.share(adverts))
    return session


def roster_context(server: Server, step: int, what: bytes, active: frozenset[int]) -> bytes:
    """Return the context of a step as the server works it out from what it sent."""
    roster = Roster(CONTEXT, tuple(Advert.from_bytes(raw) for raw in server.adverts))
    return step_context(roster.hash, step, what, active)


def flipped(raw: bytes, at: int = 0) -> bytes:
    """Return the bytes with one bit changed."""
    changed = bytearray(raw)
    changed[at] ^= 1
    return bytes(changed)


def without_box_of(raw: bytes, index: int) -> bytes:
    """Return boxes with one of them taken out."""
    return raw[: BOX_BYTES * index] + raw[BOX_BYTES * (index + 1) :]


def small_contract(merchants: int, **sections: dict[str, Any]) -> Contract:
    """Return a contract of a small linear model, with attempts to spare."""
    document: dict[str, Any] = {
        "federation": {"name": "test", "min_merchants": merchants},
        "features": [{"name": f"f{i}", "low": -1.0} for i in range(5)],
        "segments": {"names": ["a", "b", "c", "d"]},
        "model": {"family": "linear"},
        "training": {"rounds": 10, "spare_rounds": 10},
        "privacy": {"epsilon": 2.0, "delta": 1e-5},
    }
    return parse_contract({**document, **sections}, source="test")


def some_customers(seed: int, count: int = 40) -> Customers:
    """Return customers of whom none is held out."""
    random = np.random.default_rng(seed)
    inputs = random.uniform(-1, 1, (count, 5))
    return Customers(inputs, random.integers(0, 4, count), np.zeros(count, dtype=bool))


@dataclass
class Shops:
    """Real workers with real ledgers, and the malicious coordinator's view of them."""

    contract: Contract
    identities: list[Identity]
    members: Members
    workers: list[Worker]
    stores: list[SessionStore]
    escrows: dict[tuple[int, int, int], Escrow] = field(default_factory=dict)
    rosters: dict[int, list[bytes]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of merchants."""
        return len(self.workers)

    def countersigned(self, position: int) -> bytes:
        """Return what the witness saw last of a merchant's ledger.

        Without an honest witness this coordinator would get nothing at all.
        """
        return witness().latest(self.identities[position].public)

    def witnessed(self, position: int, head: bytes) -> None:
        """Let the witness see the head of a merchant's ledger."""
        one = self.identities[position]
        assert not witness().countersign({one.merchant: (one.public, Head.from_bytes(head))})

    def advertise(self, session: int = 1, run: str = "run") -> None:
        """Let everybody reserve the run and begin a session."""
        self.rosters[session] = []
        for position, worker in enumerate(self.workers):
            seen = self.countersigned(position)
            answer = worker.advertise(Advertise(run, self.contract.sha256, session, seen))
            self.witnessed(position, answer.head)
            self.rosters[session].append(answer.advert)

    def share_message(self, position: int, session: int = 1, run: str = "run") -> Share:
        """Return the message that shows a merchant the roster."""
        seen, roster = self.countersigned(position), self.rosters[session]
        return Share(run, self.contract.sha256, session, seen, roster)

    def share(self, session: int = 1, run: str = "run") -> None:
        """Show everybody the roster, and keep what they leave for the first step."""
        for position, worker in enumerate(self.workers):
            answer = worker.share(self.share_message(position, session, run))
            self.witnessed(position, answer.head)
            self.escrows[session, 1, position] = Escrow.from_bytes(answer.escrow, self.size)

    def set_up(self, session: int = 1, run: str = "run") -> None:
        """Set up a session with everybody."""
        self.advertise(session, run)
        self.share(session, run)

    def request(self, position: int, step: int, **changed: Any) -> SumRequest:
        """Return an honest request of round 1, or one in which some fields are changed."""
        others = [other for other in range(self.size) if other != position]
        session = changed.get("session", 1)
        boxes = b"".join(self.escrows[session, step, other].box(position) for other in others)
        honest = SumRequest(
            "run",
            self.contract.sha256,
            "update",
            1,
            0,
            40.0,
            session,
            step,
            to_bitmap(range(self.size), self.size),
            boxes,
            self.countersigned(position),
            initial_parameters(self.contract),
        )
        return replace(honest, **changed)

    def ask(self, position: int, step: int, **changed: Any) -> SumAnswer:
        """Ask a merchant, and keep what it leaves for the next step."""
        request = self.request(position, step, **changed)
        answer = self.workers[position].answer(request)
        if not answer.refusal:
            self.witnessed(position, answer.head)
            escrow = Escrow.from_bytes(answer.escrow, self.size)
            self.escrows[request.session, step + 1, position] = escrow
        return answer

    def confirm(self, step: int, session: int = 1) -> dict[int, dict[int, bytes]]:
        """Let everybody confirm everybody; sender -> receiver -> confirmation."""
        everyone = frozenset(range(self.size))
        message = Confirm(session, step, to_bitmap(everyone, self.size))
        return {
            position: codes_by_receiver(worker.confirm(message).confirmations, everyone, position)
            for position, worker in enumerate(self.workers)
        }

    def reveal_message(
        self, position: int, step: int, codes: dict[int, dict[int, bytes]], session: int = 1
    ) -> Reveal:
        """Return the message that asks a merchant to reveal."""
        raw = b"".join(codes[other][position] for other in sorted(codes) if other != position)
        return Reveal(session, step, to_bitmap(codes, self.size), raw)

    def exact(self, position: int, before: State, request: SumRequest, masked: np.ndarray) -> Any:
        """Return a merchant's noisy vector, with its own secrets from before the step."""
        active = frozenset(range(self.size))
        what = occasion_hash(
            request.stage,
            request.round,
            request.attempt,
            request.customers_per_merchant,
            request.parameters,
        )
        context = step_context(before.roster_hash, request.step, what, active)
        keys = pair_keys_of(before, request.step)
        return unmasked_alone(masked, position, context, before.next_self, keys)


def shops(
    folder: Path, count: int = 3, files: bool = False, contract: Contract | None = None
) -> Shops:
    """Open workers; with `files` their sessions are kept in sealed files."""
    contract = contract or small_contract(count)
    identities, members = enrolled(count)
    stores: list[SessionStore] = [
        FileStore(folder / f"{one.merchant}.sealed", one) if files else MemoryStore()
        for one in identities
    ]
    found = Shops(contract, identities, members, [], stores)
    found.workers = [worker_of(found, position, folder) for position in range(count)]
    return found


def worker_of(found: Shops, position: int, folder: Path, **options: Any) -> Worker:
    """Open the worker at a position, on the ledger and the session that are there."""
    identity = found.identities[position]
    party = SecureParty(
        identity, found.members, found.contract.min_survivors, found.stores[position]
    )
    return Worker(
        identity.merchant,
        found.contract,
        some_customers(position),
        ledger_at(folder / f"{identity.merchant}.sqlite", identity, Budget(50.0, 1e-5)),
        accept_unmasked_sums=False,
        secure=party,
        **options,
    )
