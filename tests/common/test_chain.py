"""Tests of links, heads and countersignatures; what comes from outside is only ever refused."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.chain import (
    NO_LINK,
    Countersignature,
    Entry,
    Head,
    Seen,
    body_bytes,
    extended,
    is_signed,
    link_after,
    signed_head,
)
from common.errors import LedgerError, WireError
from common.identity import Identity

SHOP, OTHER, WITNESS = (Identity.generate(name) for name in ("shop", "other", "coordinator"))
LINK = bytes(range(32))
MOST = 2**63 - 1

links = st.binary(min_size=32, max_size=32)
bodies = st.lists(st.binary(max_size=50), max_size=6)


@st.composite
def heads(draw: st.DrawFn) -> Head:
    """Return any head that can be sent."""
    digests = draw(st.lists(links, max_size=5).map(tuple))
    seq = draw(st.integers(max(1, len(digests)), MOST))
    signature = draw(st.binary(min_size=64, max_size=64))
    return Head(seq, draw(links), signature, seq - len(digests), digests)


def signed(document: Any, witness: Identity = WITNESS) -> Countersignature:
    """Return what a witness says, whatever that is."""
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return Countersignature(body, witness.sign(Countersignature.signed(body)))


def statement(**changes: Any) -> dict[str, Any]:
    """Return a proper statement; keywords change fields."""
    proper = {"at": 5.0, "key": SHOP.public.hex(), "link": LINK.hex(), "seq": 3}
    return {**proper, **changes}


class TestLinks:
    """link_after and extended."""

    @given(links, bodies, bodies)
    def test_extension_in_parts(self, link: bytes, first: list[bytes], second: list[bytes]) -> None:
        """Whoever knows the bodies and whoever knows their hashes come to the same link."""
        found = link
        for body in [*first, *second]:
            found = link_after(found, body)
        hashes = [[entry_hash(body) for body in part] for part in (first, second)]
        assert extended(extended(link, hashes[0]), hashes[1]) == found

    @given(bodies.filter(bool), st.data())
    def test_every_change_shows(self, sequence: list[bytes], data: st.DataObject) -> None:
        """Another text, a missing or one more entry gives another link."""
        place = data.draw(st.integers(0, len(sequence) - 1))
        head = extended(NO_LINK, [entry_hash(body) for body in sequence])
        for other in (
            [*sequence[:place], sequence[place] + b"x", *sequence[place + 1 :]],
            [*sequence[:place], *sequence[place + 1 :]],
            [*sequence[:place], b"new", *sequence[place:]],
        ):
            assert extended(NO_LINK, [entry_hash(body) for body in other]) != head

    def test_body_is_canonical(self) -> None:
        """Keys are sorted, there are no spaces and only ASCII; what is no number is refused."""
        assert body_bytes({"b": "ü\ud800", "a": 1.5}) == b'{"a":1.5,"b":"\\u00fc\\ud800"}'
        with pytest.raises(ValueError, match="not JSON compliant"):
            body_bytes({"a": float("nan")})


def entry_hash(body: bytes) -> bytes:
    """Return a body's hash the long way round."""
    return hashlib.sha256(body).digest()


class TestEntry:
    """Entry.document."""

    @pytest.mark.parametrize("body", [b"", b"[]", b"1", b"{", b"\xff", b"[" * 100_000, b"9" * 9999])
    def test_no_object(self, body: bytes) -> None:
        """A body that is no JSON object is an error of the ledger."""
        with pytest.raises(LedgerError, match="entry 7 of the ledger is no JSON object"):
            _ = Entry(7, body, b"", b"").document


class TestHead:
    """Head."""

    @given(heads())
    def test_round_trip(self, head: Head) -> None:
        """What is sent arrives."""
        assert Head.from_bytes(head.to_bytes()) == head

    @given(st.binary(max_size=400))
    def test_hostile_bytes(self, raw: bytes) -> None:
        """Bytes are a head that is written the same way, or are refused."""
        try:
            head = Head.from_bytes(raw)
        except WireError:
            return
        assert head.to_bytes() == raw

    @given(heads(), st.data())
    def test_other_lengths(self, head: Head, data: st.DataObject) -> None:
        """Neither a shorter nor a longer message is read."""
        raw = head.to_bytes()
        cut = data.draw(st.integers(0, len(raw) - 1))
        for other in (raw[:cut], raw + b"\x00", raw + bytes(32)):
            with pytest.raises(WireError, match="field 'head'"):
                Head.from_bytes(other)

    @pytest.mark.parametrize("seq", [0, 2**63, 2**64 - 1])
    def test_numbers_that_no_database_holds(self, seq: int) -> None:
        """A signed head with a monstrous number is refused, before a witness counts with it."""
        signature = SHOP.sign(signed_head(SHOP.public, seq, LINK))
        with pytest.raises(WireError, match="is no head"):
            Head.from_bytes(Head(seq, LINK, signature, seq, ()).to_bytes())

    def test_since_after_the_end(self) -> None:
        """An extension begins before it ends."""
        raw = (5).to_bytes(8, "big") + (6).to_bytes(8, "big") + bytes(96)
        with pytest.raises(WireError):
            Head.from_bytes(raw)

    def test_is_of(self) -> None:
        """A head is of the merchant that signed exactly it."""
        head = Head(3, LINK, SHOP.sign(signed_head(SHOP.public, 3, LINK)), 3, ())
        assert head.is_of(SHOP.public)
        assert not head.is_of(OTHER.public)
        assert not head.is_of(b"no key")
        assert not Head(4, LINK, head.signature, 4, ()).is_of(SHOP.public)
        assert not Head(3, bytes(32), head.signature, 3, ()).is_of(SHOP.public)

    @pytest.mark.parametrize("signature", [b"", b"x", bytes(64), bytes(65)])
    def test_signatures_of_any_length(self, signature: bytes) -> None:
        """What is no signature does not fit, and that is all."""
        assert not is_signed(SHOP.public, b"message", signature)


class TestMadeHere:
    """Signatures that this process made itself are known; nothing else is taken for one."""

    @given(st.binary(max_size=80), st.binary(max_size=80))
    def test_only_what_was_signed(self, message: bytes, other: bytes) -> None:
        """Another message, another key or another signature does not fit."""
        signature = SHOP.sign(message)
        assert is_signed(SHOP.public, message, signature)
        assert is_signed(SHOP.public, other, signature) == (message == other)
        assert not is_signed(OTHER.public, message, signature)
        assert not is_signed(SHOP.public, message, bytes([signature[0] ^ 1]) + signature[1:])
        longer = SHOP.public + message[:1]
        assert is_signed(longer, message[1:], signature) == (longer == SHOP.public)

    def test_the_same_without_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What another process made is checked by itself."""
        signature = SHOP.sign(b"message")
        monkeypatch.setattr("common.chain._made_here", {})
        assert is_signed(SHOP.public, b"message", signature)
        assert not is_signed(SHOP.public, b"massage", signature)

    def test_what_changes_under_way(self) -> None:
        """A message that is changed after it was signed is another one."""
        message = bytearray(b"message")
        signature = SHOP.sign(message)  # type: ignore[arg-type]
        message[:] = b"massage"
        assert not is_signed(SHOP.public, bytes(message), signature)
        assert is_signed(SHOP.public, b"message", bytearray(signature))  # type: ignore[arg-type]

    def test_memory_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """However many threads sign; an older signature is checked anew."""
        made: dict[bytes, bytes] = {}
        monkeypatch.setattr("common.chain._made_here", made)
        monkeypatch.setattr("common.chain._MOST_MADE_HERE", 20)
        first = SHOP.sign(b"first")

        def sign(name: int) -> None:
            for number in range(200):
                assert is_signed(SHOP.public, b"%d" % number, SHOP.sign(b"%d" % number))

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(sign, range(8)))
        SHOP.sign(b"last")
        assert len(made) == 20
        assert first not in made
        assert is_signed(SHOP.public, b"first", first)


class TestCountersignature:
    """Countersignature."""

    @given(st.integers(1, MOST), links, st.floats(allow_nan=False, allow_infinity=False))
    def test_round_trip(self, seq: int, link: bytes, at: float) -> None:
        """What a witness countersigns is what the merchant reads."""
        body = Countersignature.statement(SHOP.public, seq, link, at)
        sent = signed(body).to_bytes()
        seen = Countersignature.from_bytes(sent).opened(WITNESS.public, SHOP.public)
        assert seen == Seen(seq, link, at)

    @given(st.binary(max_size=200))
    def test_hostile_bytes(self, raw: bytes) -> None:
        """Bytes that nobody signed are refused."""
        with pytest.raises(WireError, match="not signed by the pinned witness"):
            Countersignature.from_bytes(raw).opened(WITNESS.public, SHOP.public)

    @given(st.binary(max_size=60))
    def test_signed_bytes(self, body: bytes) -> None:
        """Bytes that the true witness signed, and that are no statement, are refused."""
        with pytest.raises(WireError):
            signed(body).opened(WITNESS.public, SHOP.public)

    @pytest.mark.parametrize(
        "changes",
        [
            *({"seq": seq} for seq in (0, -1, 2**63, 10**30, 2.0, 1e999, True, None, "3", [3])),
            *({"at": at} for at in (float("nan"), 1e999, -1e999, 10**400, None, "5", [], {})),
            *({"link": link} for link in (5, None, "zz", "abc", ["00"], {})),
            *({"key": key} for key in (None, "", 7, OTHER.public.hex(), SHOP.public.hex().upper())),
        ],
    )
    def test_odd_fields(self, changes: dict[str, Any]) -> None:
        """The true witness may sign anything; what makes no sense is a bad message, no crash."""
        with pytest.raises(WireError, match="field 'countersigned'"):
            signed(statement(**changes)).opened(WITNESS.public, SHOP.public)

    @pytest.mark.parametrize("gone", ["at", "key", "link", "seq"])
    def test_missing_fields(self, gone: str) -> None:
        """A statement without one of its fields says nothing."""
        document = statement()
        del document[gone]
        with pytest.raises(WireError):
            signed(document).opened(WITNESS.public, SHOP.public)

    @given(
        st.dictionaries(
            st.sampled_from(["at", "key", "link", "seq", "other"]),
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats()
            | st.text(max_size=70)
            | st.lists(st.integers(), max_size=2),
        )
    )
    def test_any_fields(self, changes: dict[str, Any]) -> None:
        """Whatever the witness signed is a countersignature with sound numbers, or refused."""
        try:
            seen = signed(statement(**changes)).opened(WITNESS.public, SHOP.public)
        except WireError:
            return
        assert 0 < seen.seq < 2**63
        assert abs(seen.at) < float("inf")
        assert isinstance(seen.link, bytes)

    def test_nesting_without_end(self) -> None:
        """A statement that is nested deeper than a parser goes is refused."""
        body = b'{"a":' + b"[" * 100_000
        with pytest.raises(WireError):
            signed(body).opened(WITNESS.public, SHOP.public)

    def test_another_witness(self) -> None:
        """Nobody but the pinned witness countersigns; without a pinned one, nobody does."""
        for pinned in (OTHER.public, b"", bytes(32)):
            with pytest.raises(WireError, match="pinned witness"):
                signed(statement()).opened(pinned, SHOP.public)

    def test_a_head_is_no_countersignature(self) -> None:
        """A signature is good for what was signed: labels keep statements apart."""
        body = Countersignature.statement(SHOP.public, 3, LINK, 5.0)
        as_head = Countersignature(body, WITNESS.sign(signed_head(SHOP.public, 3, LINK)))
        bare = Countersignature(body, WITNESS.sign(body))
        for forged in (as_head, bare):
            with pytest.raises(WireError):
                forged.opened(WITNESS.public, SHOP.public)
