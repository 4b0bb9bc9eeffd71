"""The coordinator's half of secure sums: a state machine without input or output.

It collects adverts and escrows, adds masked vectors as they come, relays confirmations, and
takes the masks off the sum with the shares that members reveal. It never holds what a single
vector could be unmasked with. See `docs/secure-aggregation.md`.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from common.errors import SecureSumError
from common.identity import Members
from common.masks import add_masks, stream_bytes
from common.session import (
    CONFIRMATION_BYTES,
    MARK_BYTES,
    Advert,
    Escrow,
    Roster,
    commitment,
    mark,
    mask_key,
    parts,
    row_key,
    share_digest,
    step_context,
    to_bitmap,
)
from common.shares import ELEMENTS, SECRET_BYTES, combine
from common.streams import KEY_BYTES

_SELF, _ROW = 0, 1  # the two secrets of a step


@dataclass
class _Step:
    number: int
    context: bytes
    active: list[int]
    escrows: dict[int, Escrow]  # what the active members left for this step
    total: np.ndarray
    survivors: list[int] = field(default_factory=list)
    closed: bool = False  # the survivors are fixed
    confirmations: dict[int, dict[int, bytes]] = field(default_factory=dict)  # from -> to -> code
    shares: dict[int, dict[int, bytes]] = field(default_factory=dict)  # holder -> dealer -> share


class CoordinatorSession:
    """One session, from adverts to any number of steps.

    Args:
        context: See `common.session.session_context`.
        members: Who is enrolled.
        minimum: Fewest members in a sum, besides the roster's threshold.
    """

    def __init__(self, context: bytes, members: Members, minimum: int) -> None:
        self._context = context
        self._members = members
        self._minimum = minimum
        self._adverts: dict[str, Advert] = {}
        self._roster: Roster | None = None
        self._hash = b""
        self._escrows: dict[int, Escrow] = {}  # for the step to come
        self._step: _Step | None = None
        self._next = 1
        self._trial = X25519PrivateKey.generate()
        self.blamed: dict[str, str] = {}  # merchant -> what it did
        self.conflicts: list[tuple[int, int]] = []  # members of whom one lied about their pair

    def take_advert(self, raw: bytes, merchant: str) -> str:
        """Take a merchant's advert and return the merchant's id.

        Raises:
            SecureSumError: It is no advert of this enrolled merchant for this session.
        """
        advert = Advert.from_bytes(raw)
        if advert.merchant != merchant:
            raise SecureSumError(f"field 'advert': is not that of '{merchant}'")
        if not self._members.verify(
            advert.merchant, advert.signed(self._context), advert.signature
        ):
            raise SecureSumError(f"field 'advert': '{advert.merchant}' is not enrolled with it")
        self._check_keys(advert)
        if self._adverts.setdefault(advert.merchant, advert) != advert:
            raise SecureSumError(f"field 'advert': '{advert.merchant}' gave another one before")
        return advert.merchant

    def _check_keys(self, advert: Advert) -> None:
        """Refuse keys for which every other member would refuse the roster."""
        taken = {
            key
            for other in self._adverts.values()
            if other.merchant != advert.merchant
            for key in (other.transport, other.masking)
        }
        keys = (advert.transport, advert.masking)
        if len({*keys}) != len(keys) or taken & {*keys}:
            raise SecureSumError("field 'advert': a key that is there already")
        for key in keys:
            try:
                self._trial.exchange(X25519PublicKey.from_public_bytes(key))
            except ValueError:
                raise SecureSumError("field 'advert': a key that gives no secret") from None

    @property
    def state(self) -> dict[str, Any]:
        """Return the session between two steps, for `restored`; the roster must be fixed."""
        return {
            "context": self._context.hex(),
            "adverts": [advert.to_bytes().hex() for advert in self.roster.adverts],
            "escrows": {
                position: escrow.to_bytes().hex() for position, escrow in self._escrows.items()
            },
            "next": self._next,
        }

    @classmethod
    def restored(
        cls, state: Mapping[str, Any], members: Members, minimum: int
    ) -> "CoordinatorSession":
        """Return a session that goes on where `state` was taken.

        Raises:
            SecureSumError: The state is not that of a session of these members.
        """
        session = cls(bytes.fromhex(state["context"]), members, minimum)
        for raw in state["adverts"]:
            advert = Advert.from_bytes(bytes.fromhex(raw))
            session.take_advert(advert.to_bytes(), advert.merchant)
        session.close_roster()
        for position, raw in state["escrows"].items():
            session.take_escrow(int(position), bytes.fromhex(raw))
        session._next = int(state["next"])
        return session

    def put_out(self, merchant: str) -> None:
        """Go on without a member that others accuse."""
        for position, advert in enumerate(self.roster.adverts):
            if advert.merchant == merchant:
                self._escrows.pop(position, None)

    def close_roster(self) -> list[bytes]:
        """Fix the roster and return its adverts in order.

        Raises:
            SecureSumError: Too few or too many adverts, or two equal keys.
        """
        names = sorted(self._adverts)
        self._roster = Roster(self._context, tuple(self._adverts[name] for name in names))
        self._hash = self._roster.hash
        return [advert.to_bytes() for advert in self._roster.adverts]

    @property
    def roster(self) -> Roster:
        """The roster.

        Raises:
            SecureSumError: It is not fixed yet.
        """
        if self._roster is None:
            raise SecureSumError("this session has no roster yet")
        return self._roster

    @property
    def needed(self) -> int:
        """Fewest members in a sum."""
        return max(self._minimum, self.roster.threshold)

    @property
    def ready(self) -> list[int]:
        """Positions of the members that can take part in the step to come."""
        return sorted(self._escrows)

    @property
    def step(self) -> int:
        """Number of the step under way."""
        return self._current.number

    @property
    def active(self) -> list[int]:
        """Positions of the members that are asked in the step under way."""
        return list(self._current.active)

    @property
    def survivors(self) -> list[int]:
        """Positions of the members whose vectors are in the sum."""
        return list(self._current.survivors)

    @property
    def confirmed(self) -> list[int]:
        """Positions of the members that confirmed the sum.

        Raises:
            SecureSumError: They are fewer than the threshold.
        """
        found = sorted(self._current.confirmations)
        if len(found) < self.roster.threshold:
            raise SecureSumError(
                f"{len(found)} members confirmed the sum, {self.roster.threshold} are needed"
            )
        return found

    def take_escrow(self, position: int, raw: bytes) -> None:
        """Take what a member leaves for the first step; raises `SecureSumError` if malformed."""
        self._escrows[position] = Escrow.from_bytes(raw, self.roster.size)

    def begin(self, occasion: bytes, length: int, dtype: type[np.unsignedinteger]) -> int:
        """Begin a step with all members that can take part; return its number.

        Raises:
            SecureSumError: They are too few.
        """
        if len(self._escrows) < self.needed:
            raise SecureSumError(
                f"{len(self._escrows)} members can take part in a secure sum, {self.needed} are "
                "needed"
            )
        active = sorted(self._escrows)
        context = step_context(self._hash, self._next, occasion, frozenset(active))
        total = np.zeros(length, dtype=dtype)
        self._step = _Step(self._next, context, active, self._escrows, total)
        self._escrows = {}
        self._next += 1
        return self._step.number

    def request(self, position: int) -> tuple[bytes, bytes]:
        """Return for a member the bitmap of active members and the boxes for it."""
        step = self._current
        boxes = [step.escrows[other].box(position) for other in step.active if other != position]
        return to_bitmap(step.active, self.roster.size), b"".join(boxes)

    def take_masked(self, position: int, vector: np.ndarray, escrow: bytes) -> None:
        """Add a member's masked vector.

        Raises:
            SecureSumError: Wrong type, length or escrow, not asked, or taken before.
        """
        step = self._current
        if position not in step.active or position in step.survivors or step.closed:
            raise SecureSumError("field 'vector': was not asked for, is there already, or is late")
        if vector.dtype != step.total.dtype or vector.shape != step.total.shape:
            raise SecureSumError(
                f"field 'vector': expected {len(step.total)} numbers of type {step.total.dtype}"
            )
        self._escrows[position] = Escrow.from_bytes(escrow, self.roster.size)
        np.add(step.total, vector, out=step.total)
        step.survivors.append(position)

    def close_sum(self) -> bytes:
        """Fix which vectors are in the sum and return their bitmap.

        Raises:
            SecureSumError: They are too few; nothing will be unmasked.
        """
        step = self._current
        step.survivors.sort()
        step.closed = True
        if len(step.survivors) < self.needed:
            raise SecureSumError(
                f"{len(step.survivors)} masked vectors came, {self.needed} are needed"
            )
        return to_bitmap(step.survivors, self.roster.size)

    def take_confirmations(self, position: int, raw: bytes) -> None:
        """Take a survivor's confirmations for the others; raises `SecureSumError` if malformed."""
        step = self._current
        if position not in step.survivors or not step.closed:
            raise SecureSumError("field 'confirmations': were not asked for")
        others = [other for other in step.survivors if other != position]
        codes = parts(raw, CONFIRMATION_BYTES, len(others), "confirmations")
        step.confirmations[position] = dict(zip(others, codes, strict=True))

    def confirmations_for(
        self, position: int, without: Collection[str] = ()
    ) -> tuple[bytes, bytes]:
        """Return the bitmap of survivors that confirmed and their confirmations for a member.

        Args:
            position: The member.
            without: Members whose confirmations it found to be wrong.

        Raises:
            SecureSumError: Fewer than the threshold confirmed.
        """
        sent, adverts = self._current.confirmations, self.roster.adverts
        confirmed = [i for i in self.confirmed if adverts[i].merchant not in without]
        codes = [sent[other][position] for other in confirmed if other != position]
        return to_bitmap(confirmed, self.roster.size), b"".join(codes)

    def take_shares(self, position: int, raw: bytes) -> None:
        """Take the shares that a member reveals; raises `SecureSumError` if malformed."""
        step = self._current
        if position not in step.confirmations:
            raise SecureSumError("field 'shares': were not asked for")
        cut = parts(raw, SECRET_BYTES, len(step.active), "shares")
        step.shares[position] = dict(zip(step.active, cut, strict=True))

    def total(self) -> np.ndarray:
        """Take the masks off and return the sum, in the ring.

        A holder whose share is not the one that was dealt is noted in `blamed` and passed over.

        Raises:
            SecureSumError: Too few good shares, or a member dealt or left something false; the
                step is lost.
        """
        step, self._step = self._current, None
        survivors = frozenset(step.survivors)
        secrets = self._restored(step, survivors)
        plus: list[bytes] = []
        minus = [mask_key(secrets[position], step.context) for position in step.survivors]
        for position in sorted(set(step.active) - survivors):
            for other, key in self._row(step, position, secrets[position]).items():
                # what is in the sum is the other's mask: added if it comes first, else subtracted
                (minus if other < position else plus).append(mask_key(key, step.context))
        add_masks(step.total, plus, minus)
        return step.total

    def _restored(self, step: _Step, survivors: frozenset[int]) -> dict[int, bytes]:
        """Return each active member's self-mask secret or row secret, whichever was revealed."""
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for dealer in step.active:
            kind = _SELF if dealer in survivors else _ROW
            groups[self._holders(step, dealer, kind)].append(dealer)
        secrets: dict[int, bytes] = {}
        for holders, dealers in groups.items():
            raw = b"".join(step.shares[holder][dealer] for holder in holders for dealer in dealers)
            shares = np.frombuffer(raw, dtype="<u2").reshape(len(holders), -1)
            restored = combine(tuple(holder + 1 for holder in holders), shares.astype(np.uint16))
            for dealer, elements in zip(dealers, restored.reshape(-1, ELEMENTS), strict=True):
                secrets[dealer] = elements.astype("<u2").tobytes()
        for dealer, secret in secrets.items():
            kind = _SELF if dealer in survivors else _ROW
            promised = step.escrows[dealer].commitments[KEY_BYTES * kind : KEY_BYTES * (kind + 1)]
            if commitment(secret) != promised:
                self._escrows.pop(dealer, None)
                name = self.roster.adverts[dealer].merchant
                self.blamed[name] = "dealt shares that do not belong together"
                raise SecureSumError(f"field 'shares': '{name}' {self.blamed[name]}")
        return secrets

    def _holders(self, step: _Step, dealer: int, kind: int) -> tuple[int, ...]:
        """Return `threshold` members that revealed the share that this dealer dealt."""
        size, dealt_by = self.roster.size, self.roster.adverts[dealer].merchant
        digests = step.escrows[dealer].digests[size * MARK_BYTES * kind :]
        good: list[int] = []
        bad: list[int] = []
        for holder in sorted(step.shares):
            promised = digests[MARK_BYTES * holder : MARK_BYTES * (holder + 1)]
            fits = share_digest(step.shares[holder][dealer]) == promised
            (good if fits else bad).append(holder)
            if len(good) == self.roster.threshold:
                break
        for holder in bad:
            names = f"{self.roster.adverts[holder].merchant} or {dealt_by}"
            self.blamed[names] = "a share is not the one that was promised"
        if len(good) < self.roster.threshold:
            if len(bad) > (size - 1) // 3:  # fewer than a third lie: so the dealer did
                self._escrows.pop(dealer, None)
            raise SecureSumError(
                f"field 'shares': {len(good)} good shares of '{dealt_by}' were revealed, "
                f"{self.roster.threshold} are needed"
            )
        return tuple(good)

    def _row(self, step: _Step, absent: int, secret: bytes) -> dict[int, bytes]:
        """Return the pair keys of a member that is out with every survivor."""
        sealed = step.escrows[absent].row
        opened = np.frombuffer(sealed, np.uint8) ^ np.frombuffer(
            stream_bytes(row_key(secret), len(sealed)), np.uint8
        )
        keys = parts(opened.tobytes(), KEY_BYTES, self.roster.size, "row")
        for other in step.survivors:
            promised = step.escrows[other].marks[MARK_BYTES * absent : MARK_BYTES * (absent + 1)]
            if mark(keys[other]) != promised:
                names = self.roster.names([absent, other])
                self.blamed[names] = "left different keys of their pair"
                self.conflicts.append((absent, other))
                raise SecureSumError(f"field 'row': {names} left different keys of their pair")
        return {other: keys[other] for other in step.survivors}

    @property
    def _current(self) -> _Step:
        if self._step is None:
            raise SecureSumError("no step of this session is under way")
        return self._step


def groups(merchants: Iterable[str], most: int, fewest: int) -> list[list[str]]:
    """Divide merchants into as few groups as can be, of at most `most` and at least `fewest`.

    Where the numbers do not work out, the last merchants in order are left out.

    >>> groups(["a", "b", "c", "d", "e"], most=3, fewest=2)
    [['a', 'c', 'e'], ['b', 'd']]
    >>> groups(["a", "b", "c", "d"], most=3, fewest=3)
    [['a', 'b', 'c']]
    """
    names = sorted(merchants)
    count = max(1, -(-len(names) // most))
    if len(names) // count < fewest:
        count = max(1, len(names) // fewest)
    taken = names[: count * most]
    return [taken[start::count] for start in range(count)]
