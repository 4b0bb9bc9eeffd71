"""A merchant in secure sums: its session, kept between messages, and its own rules.

Every method loads the state, lets `clients.secure_sum` check and answer, and stores the new
state before anything is returned.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from clients.secure_sum import Label, MerchantSession, Prepared
from clients.session_store import SessionStore
from common.errors import SecureSumError
from common.identity import Identity, Members
from common.session import occasion_hash, session_context
from common.wire import Advertise, Confirm, Reveal, Share, SumRequest


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

    def advertise(self, message: Advertise, head: bytes) -> bytes:
        """Begin a session with fresh keys; an earlier one is forgotten.

        Args:
            message: What the coordinator sent.
            head: Link of the last entry of this merchant's ledger.
        """
        context = session_context(message.run, message.session, message.contract)
        session = MerchantSession.advertise(
            self.identity, self.members, self.minimum, context, message.session, head
        )
        with self.store.locked():
            self.store.save(session.state)
        return session.advert

    def share(self, message: Share) -> tuple[bytes, str]:
        """Join the roster and deal the first step's shares; return them with the roster's hash."""
        context = session_context(message.run, message.session, message.contract)
        with self._session(message.session) as session:
            if context != session.state.context:
                raise SecureSumError("field 'run': this session is of another run or contract")
            return session.share(message.roster), session.state.roster_hash.hex()

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
        self, session: int, prepared: Prepared, vector: np.ndarray
    ) -> tuple[np.ndarray, bytes]:
        """Return the masked vector and the escrow of the next step."""
        with self._session(session) as found:
            return found.mask(prepared, vector)

    def confirm(self, message: Confirm) -> bytes:
        """Vouch for the set of survivors."""
        with self._session(message.session) as session:
            return session.confirm(message.step, message.survivors)

    def reveal(self, message: Reveal) -> tuple[bytes, Label, int]:
        """Return the shares that unmask the sum, what was summed, and how many survived."""
        with self._session(message.session) as session:
            current = session.state.step
            shares = session.reveal(message.step, message.confirmed, message.confirmations)
        if current is None:
            raise SecureSumError("field 'step': no step is under way")
        return shares, current.label, len(current.survivors)

    def forget(self) -> None:
        """Erase the session: its run is over."""
        with self.store.locked():
            self.store.erase()

    @contextmanager
    def _session(self, number: int, *, changes: bool = True) -> Iterator[MerchantSession]:
        """Give the session, alone; keep its new state unless something was refused."""
        with self.store.locked():
            state = self.store.load()
            if state.number != number:
                raise SecureSumError(
                    f"field 'session': this merchant is in session {state.number}, not {number}"
                )
            yield MerchantSession(self.identity, self.members, self.minimum, state)
            if changes:
                self.store.save(state)
