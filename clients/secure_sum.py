"""A merchant's half of secure sums: a state machine without input or output.

    ADVERTISED --share--> READY --mask--> MASKED --confirm--> CONFIRMED --reveal--> READY

A step is `prepare` (check everything that came; nothing changes), `mask` (the vector leaves),
`confirm` (which vectors are in the sum) and `reveal` (shares that unmask the sum). Each
happens once a step, on what this merchant itself checked; a refusal changes nothing and sends
nothing. A step that was not finished may be followed by the next one; it is then lost for good.

Never taken from the coordinator: the threshold (from the roster's size), the smallest sum
(from the merchant's policy and contract), who is enrolled, the model's hash. What holds secrets
has no text form, so that none gets into a log by chance. Source: Bonawitz
et al. 2017, "Practical secure aggregation for privacy-preserving machine learning", the
variant against a malicious server, with shares dealt one step ahead.
"""

import hmac
import json
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from common.errors import SecureSumError
from common.identity import Identity, Members
from common.masks import add_masks, expand, extract, stream_bytes
from common.session import (
    BOX_BYTES,
    CONFIRMATION_BYTES,
    LINK_BYTES,
    MARK_BYTES,
    MAX_STEPS,
    Advert,
    Escrow,
    Roster,
    accusation,
    commitment,
    direction,
    from_bitmap,
    mark,
    mask_key,
    pair_secret_info,
    parts,
    row_key,
    share_digest,
    step_context,
    survivors_statement,
    threshold,
)
from common.shares import ELEMENTS, SECRET_BYTES, random_elements, split
from common.streams import KEY_BYTES


class Phase(StrEnum):
    """What this merchant did last."""

    ADVERTISED = "advertised"
    READY = "ready"
    MASKED = "masked"
    CONFIRMED = "confirmed"
    OVER = "over"  # the run's last sum was unmasked; no key is left


@dataclass(repr=False)
class Pair:
    """What this merchant has in common with one other member, for the session."""

    masking: bytes  # pair keys of the steps come from it
    box_out: bytes
    box_in: bytes
    confirm_out: bytes
    confirm_in: bytes


@dataclass(frozen=True)
class Label:
    """What a step sums, for people and for the ledger."""

    run: str
    stage: str
    round: int
    attempt: int


@dataclass(repr=False)
class Step:
    """The step under way; forgotten when it is over."""

    label: Label
    context: bytes
    active: list[int]
    shares: dict[int, bytes]  # position -> share of b and of z, of every active member
    survivors: list[int] = field(default_factory=list)


@dataclass(repr=False)
class State:
    """Everything that a merchant remembers between two messages of a session."""

    context: bytes
    number: int
    phase: Phase
    transport: bytes  # private keys; empty once the pairs are known
    masking: bytes
    own_advert: bytes
    roster_hash: bytes = b""
    names: list[str] = field(default_factory=list)
    own: int = -1
    pairs: dict[int, Pair] = field(default_factory=dict)
    members: list[int] = field(default_factory=list)  # positions that are not out
    next_step: int = 1
    next_self: bytes = b""  # this merchant's b of the next step
    next_share: bytes = b""  # its own share of its own secrets
    next_keys: bytes = b""  # [n, 32]: its pair keys of the next step
    step: Step | None = None
    replies: dict[str, dict[str, str]] = field(default_factory=dict)  # see clients.secure_party


@dataclass(frozen=True, repr=False)
class Prepared:
    """A step that was checked and is not begun."""

    label: Label
    roster_hash: bytes  # of the session that it was checked in
    step: int
    context: bytes
    active: frozenset[int]
    shares: dict[int, bytes]

    @property
    def name(self) -> str:
        """Return a name that no other step of any session has."""
        return f"{self.roster_hash.hex()}/{self.step}"


class MerchantSession:
    """One session of one merchant.

    Args:
        identity: Signs the advert.
        members: Who is enrolled, as this merchant pinned it.
        minimum: Fewest members in a sum that this merchant helps to unmask.
        state: Of a session that goes on; see `advertise` for a new one.
    """

    def __init__(self, identity: Identity, members: Members, minimum: int, state: State) -> None:
        self._identity = identity
        self._members = members
        self._minimum = minimum
        self.state = state

    @classmethod
    def advertise(  # two of them for the rare caller
        cls,
        identity: Identity,
        members: Members,
        minimum: int,
        context: bytes,
        number: int = 0,
        head: bytes = bytes(LINK_BYTES),
    ) -> "MerchantSession":
        """Begin a session with fresh keys; `advert` has what is sent, and the ledger's head."""
        transport, masking = X25519PrivateKey.generate(), X25519PrivateKey.generate()
        unsigned = Advert(
            identity.merchant,
            transport.public_key().public_bytes_raw(),
            masking.public_key().public_bytes_raw(),
            head,
            b"",
        )
        advert = replace(unsigned, signature=identity.sign(unsigned.signed(context)))
        state = State(
            context,
            number,
            Phase.ADVERTISED,
            transport.private_bytes_raw(),
            masking.private_bytes_raw(),
            advert.to_bytes(),
        )
        return cls(identity, members, minimum, state)

    @property
    def advert(self) -> bytes:
        """Return this merchant's advert."""
        return self.state.own_advert

    def share(self, adverts: list[bytes]) -> bytes:
        """Check the roster, agree on keys with every member, and deal the first step's shares.

        Returns:
            The escrow of step 1.

        Raises:
            SecureSumError: The roster is not one that this merchant may join.
        """
        state = self.state
        if state.phase is not Phase.ADVERTISED:
            raise SecureSumError("field 'roster': this session has its roster already")
        roster = Roster(state.context, tuple(Advert.from_bytes(raw) for raw in adverts))
        own = self._checked_roster(roster, adverts)
        roster_hash = roster.hash
        private = [X25519PrivateKey.from_private_bytes(k) for k in (state.transport, state.masking)]
        pairs = {
            position: _pair(private, advert, roster_hash, own, position)
            for position, advert in enumerate(roster.adverts)
            if position != own
        }
        state.roster_hash, state.own, state.pairs = roster_hash, own, pairs
        state.names = [advert.merchant for advert in roster.adverts]
        state.members = list(range(roster.size))
        state.transport = state.masking = b""
        state.phase = Phase.READY
        return self._deal(1, range(roster.size)).to_bytes()

    def _checked_roster(self, roster: Roster, adverts: list[bytes]) -> int:
        """Return this merchant's position in a roster that it may join."""
        state = self.state
        if state.own_advert not in adverts:
            raise SecureSumError("field 'roster': this merchant's own advert is not in it")
        if roster.size < self._minimum:
            raise SecureSumError(
                f"field 'roster': {roster.size} members; this merchant joins sums of "
                f"{self._minimum} or more"
            )
        for advert in roster.adverts:
            if advert.merchant not in self._members.keys:
                raise SecureSumError(f"field 'roster': '{advert.merchant}' is not enrolled")
            if not self._members.verify(
                advert.merchant, advert.signed(state.context), advert.signature
            ):
                raise SecureSumError(
                    f"field 'roster': the advert of '{advert.merchant}' has a wrong signature; "
                    "its keys were swapped, or it is of another run or contract"
                )
        return adverts.index(state.own_advert)

    def _deal(self, step: int, receivers: "range | frozenset[int]") -> Escrow:
        """Draw fresh secrets for a step and deal shares of them to the receivers."""
        state, size = self.state, len(self.state.names)
        secrets = random_elements(2 * ELEMENTS)
        dealt = split(secrets, threshold(size), size).astype("<u2")
        raw = dealt.tobytes()
        shares = [raw[i : i + 2 * SECRET_BYTES] for i in range(0, len(raw), 2 * SECRET_BYTES)]
        own_secrets = secrets.astype("<u2").tobytes()
        self_secret, row_secret = own_secrets[:SECRET_BYTES], own_secrets[SECRET_BYTES:]
        boxes, keys, marks = bytearray(BOX_BYTES * size), bytearray(KEY_BYTES * size), bytearray()
        nonce = step.to_bytes(12, "big")
        for position in range(size):
            pair = state.pairs.get(position)
            if pair is None or position not in receivers:
                marks += bytes(MARK_BYTES)
                continue
            key = expand(pair.masking, pair_secret_info(state.own, position, step))
            keys[KEY_BYTES * position : KEY_BYTES * (position + 1)] = key
            marks += mark(key)
            boxes[BOX_BYTES * position : BOX_BYTES * (position + 1)] = ChaCha20Poly1305(
                pair.box_out
            ).encrypt(nonce, shares[position], state.roster_hash)
        stream = stream_bytes(row_key(row_secret), len(keys))
        row = np.frombuffer(bytes(keys), np.uint8) ^ np.frombuffer(stream, np.uint8)
        state.next_step, state.next_self, state.next_share = step, self_secret, shares[state.own]
        state.next_keys = bytes(keys)
        return Escrow(
            bytes(boxes),
            row.tobytes(),
            bytes(marks),
            b"".join(share_digest(share[:SECRET_BYTES]) for share in shares)
            + b"".join(share_digest(share[SECRET_BYTES:]) for share in shares),
            commitment(self_secret) + commitment(row_secret),
        )

    def prepare(
        self, step: int, occasion: bytes, active: bytes, boxes: bytes, label: Label
    ) -> Prepared:
        """Check all that a step brings; nothing changes.

        Args:
            step: The step's number.
            occasion: Hash of what is summed, worked out by this merchant.
            active: Bitmap of the members that are asked.
            boxes: The other active members' boxes for this one, in order.
            label: What is summed, for people.

        Raises:
            SecureSumError: The step is not the next one, a member is out or missing, too few are
                asked, or a box does not open.
        """
        state = self.state
        if state.phase is Phase.ADVERTISED:
            raise SecureSumError("field 'step': this session has no roster yet")
        if state.phase is Phase.OVER:
            raise SecureSumError("field 'step': this session is over")
        if step != state.next_step or step >= MAX_STEPS:
            raise SecureSumError(
                f"field 'step': expected step {state.next_step} of this session, got {step}; an "
                "old step is never taken up again"
            )
        asked = from_bitmap(active, len(state.names), "active")
        self._check_members(asked, frozenset(state.members), "active")
        others = sorted(asked - {state.own})
        shares = {state.own: state.next_share}
        for other, box in zip(others, parts(boxes, BOX_BYTES, len(others), "boxes"), strict=True):
            shares[other] = self._opened(other, step, box)
        context = step_context(state.roster_hash, step, occasion, asked)
        return Prepared(label, state.roster_hash, step, context, asked, shares)

    def _opened(self, other: int, step: int, box: bytes) -> bytes:
        cipher = ChaCha20Poly1305(self.state.pairs[other].box_in)
        try:
            return cipher.decrypt(step.to_bytes(12, "big"), box, self.state.roster_hash)
        except InvalidTag:
            raise accusation(
                "boxes",
                self.state.names[other],
                f"left a box for step {step} that is not authentic",
            ) from None

    def _check_members(self, chosen: frozenset[int], allowed: frozenset[int], name: str) -> None:
        """Raise unless a set of members is one that this merchant may be summed with."""
        state = self.state
        needed = max(self._minimum, threshold(len(state.names)))
        if not chosen <= allowed:
            out = ", ".join(f"'{state.names[position]}'" for position in sorted(chosen - allowed))
            raise SecureSumError(f"field '{name}': {out} cannot be in it; who is out stays out")
        if state.own not in chosen:
            raise SecureSumError(f"field '{name}': this merchant is not in it")
        if len(chosen) < needed:
            raise SecureSumError(
                f"field '{name}': {len(chosen)} members; this merchant needs {needed} or more"
            )

    def mask(self, prepared: Prepared, vector: np.ndarray) -> tuple[np.ndarray, bytes]:
        """Mask a vector of ring integers, once, and deal the next step's shares.

        Args:
            prepared: From `prepare` of this very session, with no other step begun since.
            vector: uint32 or uint64 [P]; it is not changed.

        Returns:
            The masked vector and the escrow of the next step.

        Raises:
            SecureSumError: The step was begun before, or the session is another one by now.
        """
        state = self.state
        if prepared.roster_hash != state.roster_hash:
            # the coordinator may set up a session anew while a vector is computed
            raise SecureSumError("field 'session': another session was set up meanwhile")
        if prepared.step != state.next_step:
            raise SecureSumError(f"field 'step': step {prepared.step} was begun before")
        plus: list[bytes] = [mask_key(state.next_self, prepared.context)]
        minus: list[bytes] = []
        for other in sorted(prepared.active - {state.own}):
            pair_key = state.next_keys[KEY_BYTES * other : KEY_BYTES * (other + 1)]
            key = mask_key(pair_key, prepared.context)
            (plus if state.own < other else minus).append(key)
        masked = vector.copy()
        add_masks(masked, plus, minus)
        state.members = sorted(prepared.active)
        state.step = Step(prepared.label, prepared.context, state.members, prepared.shares)
        state.phase = Phase.MASKED
        escrow = self._deal(prepared.step + 1, prepared.active)
        return masked, escrow.to_bytes()

    def confirm(self, step: int, survivors: bytes) -> bytes:
        """Vouch, once a step, for the set of members whose vectors are in the sum.

        Returns:
            A confirmation for every other survivor, in order.

        Raises:
            SecureSumError: The set is not one that this merchant helps to unmask, or it confirmed
                one before.
        """
        state, current = self.state, self._current(step, Phase.MASKED, "a confirmation")
        chosen = from_bitmap(survivors, len(state.names), "survivors")
        self._check_members(chosen, frozenset(current.active), "survivors")
        statement = survivors_statement(current.context, chosen)
        current.survivors = sorted(chosen)
        state.members = sorted(chosen)
        state.phase = Phase.CONFIRMED
        return b"".join(
            _confirmation(state.pairs[other].confirm_out, statement)
            for other in sorted(chosen - {state.own})
        )

    def reveal(self, step: int, confirmed: bytes, confirmations: bytes) -> bytes:
        """Reveal one share of each active member's secrets, once a step.

        Of a survivor the share of its self-mask, of a member that is out the share of its row.

        Args:
            step: The step's number.
            confirmed: Bitmap of the survivors whose confirmations are given.
            confirmations: One of each of them but this merchant, in order.

        Returns:
            The shares, in the order of the active members.

        Raises:
            SecureSumError: A confirmation is of another set of survivors, or too few are given.
        """
        state, current = self.state, self._current(step, Phase.CONFIRMED, "shares")
        survivors = frozenset(current.survivors)
        given = from_bitmap(confirmed, len(state.names), "confirmed")
        if not given <= survivors:
            raise SecureSumError("field 'confirmed': names a member that is not in the sum")
        statement = survivors_statement(current.context, survivors)
        others = sorted(given - {state.own})
        cut = parts(confirmations, CONFIRMATION_BYTES, len(others), "confirmations")
        for other, code in zip(others, cut, strict=True):
            expected = _confirmation(state.pairs[other].confirm_in, statement)
            if not hmac.compare_digest(code, expected):
                raise accusation(
                    "confirmations",
                    state.names[other],
                    "did not confirm this step's set of survivors; the coordinator may have shown "
                    "it another",
                )
        needed = threshold(len(state.names))
        if len(others) + 1 < needed:
            raise SecureSumError(
                f"field 'confirmed': {len(others) + 1} confirmations, {needed} are needed"
            )
        state.step, state.phase = None, Phase.READY
        return b"".join(
            share[:SECRET_BYTES] if position in survivors else share[SECRET_BYTES:]
            for position, share in sorted(current.shares.items())
        )

    def _current(self, step: int, phase: Phase, what: str) -> Step:
        """Return the step under way if it waits for this message."""
        current = self.state.step
        if current is None or step != self.state.next_step - 1:
            raise SecureSumError(f"field 'step': step {step} is not under way")
        if self.state.phase is not phase:
            raise SecureSumError(f"field 'step': {what} of step {step} cannot be given (again)")
        return current


def _pair(
    private: list[X25519PrivateKey], advert: Advert, roster_hash: bytes, own: int, other: int
) -> Pair:
    """Agree with another member on the keys of their pair."""
    try:
        transport, masking = (
            key.exchange(X25519PublicKey.from_public_bytes(public))
            for key, public in zip(private, (advert.transport, advert.masking), strict=True)
        )
    except ValueError:
        raise SecureSumError(
            f"field 'roster': a key of '{advert.merchant}' gives no secret (low order)"
        ) from None
    shared = extract(roster_hash, transport)
    return Pair(
        extract(roster_hash, masking),
        expand(shared, direction(b"box", own, other)),
        expand(shared, direction(b"box", other, own)),
        expand(shared, direction(b"confirm", own, other)),
        expand(shared, direction(b"confirm", other, own)),
    )


def _confirmation(key: bytes, statement: bytes) -> bytes:
    return expand(key, statement)[:CONFIRMATION_BYTES]


def state_to_bytes(state: State) -> bytes:
    """Return a state as JSON; it holds secrets, so it is to be sealed."""
    return json.dumps(asdict(state), default=bytes.hex, separators=(",", ":")).encode()


def state_from_bytes(raw: bytes) -> State:
    """Read a state back."""
    document = json.loads(raw)
    for name in (
        "context", "transport", "masking", "own_advert", "roster_hash", "next_self", "next_share",
        "next_keys",
    ):  # fmt: skip
        document[name] = bytes.fromhex(document[name])
    document["phase"] = Phase(document["phase"])
    document["pairs"] = {
        int(position): Pair(**{name: bytes.fromhex(text) for name, text in pair.items()})
        for position, pair in document["pairs"].items()
    }
    step = document["step"]
    if step is not None:
        shares = {int(position): bytes.fromhex(text) for position, text in step["shares"].items()}
        label, context = Label(**step["label"]), bytes.fromhex(step["context"])
        document["step"] = Step(label, context, step["active"], shares, step["survivors"])
    return State(**document)
