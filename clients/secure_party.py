"""A merchant in secure sums: its session, kept between messages, and its own rules.

Every method loads the state, lets `clients.secure_sum` check and answer, and stores the new
state, with the answer, before anything is returned. Who asks the same question again gets that
answer, byte for byte: a message may be lost on the way, or a process end, and nothing is masked,
confirmed or revealed a second time.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import numpy as np

from clients.secure_sum import Label, MerchantSession, Phase, Prepared, State
from clients.session_store import SessionStore
from common.errors import SecureSumError
from common.identity import Identity, Members
from common.session import occasion_hash, session_context
from common.wire import Advertise, Confirm, Reveal, Share, SumRequest, fingerprint

_ADVERTISE, _SHARE, _UPDATE, _CONFIRM, _REVEAL = "advertise", "share", "update", "confirm", "reveal"


@dataclass(frozen=True)
class Masked:
    """What left this merchant for one step, and leaves again if it is asked for again."""

    vector: np.ndarray
    escrow: bytes  # for the next step
    head: bytes  # of the ledger, with the release


@dataclass(frozen=True)
class SecureParty:
    """What a merchant needs for secure sums.

    Attributes:
        identity: Its long-term key.
        members: Who is enrolled, as this merchant pinned it.
        minimum: Fewest merchants in a sum that it helps to unmask.
        store: Keeps the session.
    """

    identity: Identity
    members: Members
    minimum: int
    store: SessionStore

    def advertised(self, message: Advertise) -> tuple[bytes, bytes] | None:
        """Return the advert and head that answered this message, while their session waits."""
        with self.store.locked():
            return self._advertised(message)

    def _advertised(self, message: Advertise) -> tuple[bytes, bytes] | None:
        state = self._loaded()
        if state is None or state.phase is not Phase.ADVERTISED:
            return None
        known = _recalled(state, _ADVERTISE, fingerprint(message))
        return None if known is None else (state.own_advert, bytes.fromhex(known["head"]))

    def advertise(self, message: Advertise, link: bytes, head: bytes) -> tuple[bytes, bytes]:
        """Begin a session with fresh keys; an earlier one is forgotten.

        Args:
            message: What the coordinator sent.
            link: Of the last entry of this merchant's ledger.
            head: That entry as it is sent.

        Returns:
            The advert and the head to send: the earlier ones if another thread was faster.
        """
        context = session_context(message.run, message.session, message.contract)
        with self.store.locked():
            known = self._advertised(message)
            if known is not None:
                return known
            session = MerchantSession.advertise(
                self.identity, self.members, self.minimum, context, message.session, link
            )
            _remember(session.state, _ADVERTISE, fingerprint(message), head=head.hex())
            self.store.save(session.state)
        return session.advert, head

    def share(self, message: Share, join: Callable[[str], bytes]) -> tuple[bytes, bytes]:
        """Join the roster and deal the first step's shares.

        Args:
            message: What the coordinator sent.
            join: Writes down that the roster with this hash is joined and returns the ledger's
                head; raises if it was joined before. Called before anything is kept: shares that
                were dealt anew for an old roster must not be there when it is asked for again.

        Returns:
            The escrow and the head to send.
        """
        context = session_context(message.run, message.session, message.contract)
        with self._session(message.session) as session:
            if context != session.state.context:
                raise SecureSumError("field 'run': this session is of another run or contract")
            known = _recalled(session.state, _SHARE, fingerprint(message))
            if known is not None:
                return bytes.fromhex(known["escrow"]), bytes.fromhex(known["head"])
            escrow = session.share(message.roster)
            head = join(session.state.roster_hash.hex())
            _remember(
                session.state, _SHARE, fingerprint(message), escrow=escrow.hex(), head=head.hex()
            )
            return escrow, head

    def masked(self, request: SumRequest) -> Masked | None:
        """Return what answered this very request before, if anything did."""
        with self.store.locked():
            state = self._loaded()
        known = None if state is None else _recalled(state, _UPDATE, fingerprint(request))
        if known is None:
            return None
        vector = np.frombuffer(bytes.fromhex(known["vector"]), dtype=known["dtype"])
        return Masked(vector.copy(), bytes.fromhex(known["escrow"]), bytes.fromhex(known["head"]))

    def prepare(self, request: SumRequest) -> Prepared:
        """Check what a request brings for its step; nothing changes."""
        occasion = occasion_hash(
            request.stage,
            request.round,
            request.attempt,
            request.customers_per_merchant,
            request.parameters,
        )
        label = Label(request.run, request.stage, request.round, request.attempt)
        context = session_context(request.run, request.session, request.contract)
        with self._session(request.session, changes=False) as session:
            if context != session.state.context:
                raise SecureSumError("field 'run': this session is of another run or contract")
            return session.prepare(request.step, occasion, request.active, request.boxes, label)

    def mask(
        self, request: SumRequest, prepared: Prepared, vector: np.ndarray, head: bytes
    ) -> Masked:
        """Mask the vector that a request asked for, and deal the next step's shares."""
        with self._session(request.session) as session:
            found = Masked(*session.mask(prepared, vector), head)
            _remember(
                session.state,
                _UPDATE,
                fingerprint(request),
                vector=found.vector.tobytes().hex(),
                dtype=found.vector.dtype.str,
                escrow=found.escrow.hex(),
                head=head.hex(),
            )
            return found

    def confirm(self, message: Confirm) -> bytes:
        """Vouch for the set of survivors."""
        with self._session(message.session) as session:
            known = _recalled(session.state, _CONFIRM, fingerprint(message))
            if known is not None:
                return bytes.fromhex(known["confirmations"])
            confirmations = session.confirm(message.step, message.survivors)
            _remember(
                session.state,
                _CONFIRM,
                fingerprint(message),
                confirmations=confirmations.hex(),
            )
            return confirmations

    def reveal(self, message: Reveal) -> tuple[bytes, Label, int]:
        """Return the shares that unmask the sum, what was summed, and how many survived.

        The shares depend on the survivors that this merchant confirmed, not on whose
        confirmations come with the message: a second message of a step gets the same ones.
        """
        with self._session(message.session) as session:
            known = _recalled(session.state, _REVEAL, str(message.step))
            if known is not None:
                label = Label(**json.loads(known["label"]))
                return bytes.fromhex(known["shares"]), label, int(known["survivors"])
            current = session.state.step
            shares = session.reveal(message.step, message.confirmed, message.confirmations)
            if current is None:
                raise SecureSumError("field 'step': no step is under way")
            _remember(
                session.state,
                _REVEAL,
                str(message.step),
                shares=shares.hex(),
                label=json.dumps(asdict(current.label)),
                survivors=str(len(current.survivors)),
            )
            return shares, current.label, len(current.survivors)

    def forget(self, run: str, session: int, contract: str) -> None:
        """Erase the keys of a session: its run is over.

        What was answered may be asked for again. A session that was begun since stays.
        """
        with self.store.locked():
            state = self.store.load()
            if state.context != session_context(run, session, contract):
                return
            over = State(
                state.context, state.number, Phase.OVER, b"", b"", state.own_advert,
                replies=state.replies,
            )  # fmt: skip
            self.store.save(over)

    def _loaded(self) -> State | None:
        """Return the session's state; None where there is none, or none that can be read."""
        try:
            return self.store.load()
        except SecureSumError:
            return None

    @contextmanager
    def _session(self, number: int, *, changes: bool = True) -> Iterator[MerchantSession]:
        """Give the session, alone; keep its new state unless something was refused."""
        with self.store.locked():
            state = self.store.load()
            if state.number != number:
                raise SecureSumError(
                    f"field 'session': this merchant is in session {state.number}, not {number}"
                )
            # a copy: what is refused on the way leaves no trace, whatever the store keeps
            session = MerchantSession(self.identity, self.members, self.minimum, replace(state))
            yield session
            if changes:
                self.store.save(session.state)


def _remember(state: State, kind: str, question: str, **answer: str) -> None:
    """Keep an answer; those to earlier steps are forgotten when a new vector leaves."""
    if kind in {_ADVERTISE, _SHARE, _UPDATE}:
        state.replies = {}
    state.replies[kind] = {"question": question, **answer}


def _recalled(state: State, kind: str, question: str) -> dict[str, str] | None:
    known = state.replies.get(kind)
    return known if known is not None and known["question"] == question else None
