"""Merchants that break the rules of secure sums: what the others and the coordinator do then.

A merchant can always spoil a sum that it is in, by sending nonsense. What it cannot do is to
learn of another, to be counted in twice, or to stay unnamed where that can be told.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message

from clients import secure_sum
from clients.app import create_app
from clients.secure_sum import MerchantSession
from common.errors import SecureSumError, WireError
from common.identity import Members
from common.masks import digest
from common.session import (
    BOX_BYTES,
    CONFIRMATION_BYTES,
    MARK_BYTES,
    Advert,
    Escrow,
    session_context,
)
from common.shares import ELEMENTS, SECRET_BYTES, random_elements, split
from common.streams import KEY_BYTES
from common.wire import (
    Advertised,
    Attested,
    Confirmed,
    Revealed,
    Shared,
    SumAnswer,
    pack,
    unpack,
)
from server.coordinator import Coordinator
from server.outcome import Outcome
from server.secure_sum import CoordinatorSession
from simulations.grid import FIRST_NODE, InProcessGrid
from tests.adversary.secure_world import (
    CONTEXT,
    LABEL,
    LENGTH,
    Server,
    Shops,
    advertised,
    coordinator_of,
    flipped,
    occasion,
    planted,
    shops,
    small_contract,
)
from tests.witnessed import archive_at

LIAR = 1
LOW_ORDER = [
    "00" * 32,
    "01" + "00" * 31,
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "00" * 31 + "80",
    "01" + "00" * 30 + "80",
]
Lie = Callable[[int, bytes], bytes]  # (sender, honest bytes) -> what is sent


def honest(_sender: int, raw: bytes) -> bytes:
    """Return what an honest merchant sends."""
    return raw


def total_of(
    world: Server,
    session: CoordinatorSession,
    *,
    out: frozenset[int] = frozenset(),
    silent: frozenset[int] = frozenset(),
    escrow: Lie = honest,
    confirmation: Lie = honest,
    share: Lie = honest,
) -> np.ndarray:
    """Carry out a step with an honest coordinator; some merchants lie, drop out or fall silent."""
    session.begin(occasion(session._next), LENGTH, np.uint32)
    step = session.step
    for position in sorted(set(session.active) - out):
        active, boxes = session.request(position)
        prepared = world.clients[position].prepare(step, occasion(step), active, boxes, LABEL)
        vector, left = world.clients[position].mask(prepared, planted(position))
        session.take_masked(position, vector, escrow(position, left))
    survivors = session.close_sum()
    for position in session.survivors:
        raw = world.clients[position].confirm(step, survivors)
        session.take_confirmations(position, confirmation(position, raw))
    for position in session.confirmed:
        if position not in silent:
            raw = world.clients[position].reveal(step, *session.confirmations_for(position))
            session.take_shares(position, share(position, raw))
    return session.total()


def exact(positions: set[int]) -> np.ndarray:
    """Return the sum of the planted vectors."""
    return np.sum([planted(position) for position in positions], axis=0, dtype=np.uint32)


def only(liar: int, lie: Callable[[bytes], bytes]) -> Lie:
    """Let one merchant lie."""
    return lambda sender, raw: lie(raw) if sender == liar else raw


def changed(raw: bytes, size: int, **parts: Callable[[bytes], bytes]) -> bytes:
    """Return an escrow in which some parts are replaced."""
    found = Escrow.from_bytes(raw, size)
    return replace(found, **{n: f(getattr(found, n)) for n, f in parts.items()}).to_bytes()


@contextmanager
def lying_dealer(how: Callable[[np.ndarray], np.ndarray]) -> Iterator[None]:
    """Let whoever deals in this block deal shares that `how` changed, with fitting digests."""
    plain = secure_sum.split
    secure_sum.split = lambda secrets, t, n: how(plain(secrets, t, n))
    try:
        yield
    finally:
        secure_sum.split = plain


class TestReveal:
    """Shares that are not those that were dealt."""

    @pytest.mark.parametrize(
        "lie",
        [
            flipped,
            lambda raw: bytes(len(raw)),
            lambda raw: raw[32:] + raw[:32],
            lambda r: b"\xff" * len(r),
        ],
        ids=["one bit", "zeros", "swapped", "no field elements"],
    )
    def test_a_bad_share_is_named_and_passed_over(self, lie: Callable[[bytes], bytes]) -> None:
        """Enough others reveal: the sum is right and the liar is known."""
        world = advertised(7)
        session = coordinator_of(world)
        total = total_of(world, session, share=only(LIAR, lie))
        assert np.array_equal(total, exact(set(range(7))))
        assert session.blamed
        assert all("m001" in name.split(" or ") for name in session.blamed)
        assert set(session.blamed.values()) == {"a share is not the one that was promised"}
        assert np.array_equal(total_of(world, session), exact(set(range(7))))  # and life goes on

    def test_too_many_bad_shares(self) -> None:
        """Three liars of seven leave four good shares; the reason says whose and how many."""
        world = advertised(7)
        session = coordinator_of(world)
        liars = {1, 2, 3}
        with pytest.raises(SecureSumError, match="4 good shares of 'm000' were revealed, 5 are"):
            total_of(world, session, share=lambda s, raw: flipped(raw) if s in liars else raw)
        assert len(session.blamed) == 3

    @pytest.mark.parametrize("raw", [b"", bytes(7 * SECRET_BYTES - 1), bytes(8 * SECRET_BYTES)])
    def test_a_wrong_size(self, raw: bytes) -> None:
        """Shares of a wrong size are refused; the others suffice."""
        world = advertised(7)
        session = coordinator_of(world)

        def lie(_raw: bytes) -> bytes:
            with pytest.raises(SecureSumError, match="field 'shares': expected 224 bytes"):
                session.take_shares(LIAR, raw)
            return bytes(7 * SECRET_BYTES)

        total = total_of(world, session, share=only(LIAR, lie))
        assert np.array_equal(total, exact(set(range(7))))

    def test_shares_of_the_other_kind(self) -> None:
        """A merchant that gives row shares of survivors gives nothing that fits."""
        world = advertised(4)
        session = coordinator_of(world)
        held: dict[int, bytes] = {}

        def lie(raw: bytes) -> bytes:
            del raw
            return b"".join(held[p] for p in sorted(held))

        session.begin(occasion(), LENGTH, np.uint32)
        for position in range(4):
            active, boxes = session.request(position)
            prepared = world.clients[position].prepare(1, occasion(), active, boxes, LABEL)
            if position == LIAR:
                held = {p: share[SECRET_BYTES:] for p, share in prepared.shares.items()}
            session.take_masked(
                position, *world.clients[position].mask(prepared, planted(position))
            )
        survivors = session.close_sum()
        for position in range(4):
            session.take_confirmations(position, world.clients[position].confirm(1, survivors))
        for position in range(4):
            raw = world.clients[position].reveal(1, *session.confirmations_for(position))
            session.take_shares(position, lie(raw) if position == LIAR else raw)
        assert np.array_equal(session.total(), exact(set(range(4))))
        assert len(session.blamed) == 4


class TestDealing:
    """Escrows that do not hold together."""

    @pytest.mark.parametrize(
        "how",
        [
            lambda shares: np.concatenate([shares[:3], shares[3:] ^ np.uint16(1)]),
            lambda shares: split(random_elements(2 * ELEMENTS), 7, 7),
        ],
        ids=["some shares", "too high a degree"],
    )
    def test_shares_of_no_polynomial(self, how: Callable[[np.ndarray], np.ndarray]) -> None:
        """The step is lost with a reason; the dealer is named, and out of the next step."""
        world = advertised(7)
        session = CoordinatorSession(CONTEXT, world.members, 2)
        for identity, client in zip(world.identities, world.clients, strict=True):
            session.take_advert(client.advert, identity.merchant)
        adverts = session.close_roster()
        for position, client in enumerate(world.clients):
            if position == LIAR:
                with lying_dealer(how):
                    session.take_escrow(position, client.share(adverts))
            else:
                session.take_escrow(position, client.share(adverts))
        with pytest.raises(SecureSumError, match="'m001' dealt shares that do not belong together"):
            total_of(world, session)
        assert session.blamed == {"m001": "dealt shares that do not belong together"}
        assert LIAR not in session.ready
        total = total_of(world, session)
        assert np.array_equal(total, exact(set(range(7)) - {LIAR}))

    @pytest.mark.parametrize(
        ("lie", "reason"),
        [
            ({"commitments": flipped}, "'m001' dealt shares that do not belong together"),
            ({"commitments": lambda raw: bytes(len(raw))}, "'m001' dealt shares"),
            ({"digests": lambda raw: bytes(len(raw))}, "0 good shares of 'm001' were revealed"),
        ],
        ids=["commitment", "no commitment", "digests"],
    )
    def test_promises_that_do_not_fit(self, lie: dict[str, Any], reason: str) -> None:
        """A sum with the liar is lost, with the reason; nobody else's is."""
        world = advertised(5)
        session = coordinator_of(world)
        total = total_of(world, session, escrow=only(LIAR, lambda raw: changed(raw, 5, **lie)))
        assert np.array_equal(total, exact(set(range(5))))
        with pytest.raises(SecureSumError, match=reason):
            total_of(world, session)
        assert any("m001" in name for name in session.blamed)

    def test_a_row_of_wrong_pair_keys(self) -> None:
        """A merchant that drops out with a wrong row is named with the one it disagrees with.

        Nobody can tell which of the two lied; the one that dropped out is out, the rest go on.
        """
        world = advertised(7)
        session = coordinator_of(world)
        lie = only(LIAR, lambda raw: changed(raw, 7, row=flipped))
        total_of(world, session, escrow=lie)
        with pytest.raises(SecureSumError, match="field 'row': 'm000', 'm001' left different keys"):
            total_of(world, session, out=frozenset({LIAR}))
        assert session.blamed == {"'m000', 'm001'": "left different keys of their pair"}
        assert session.conflicts == [(LIAR, 0)]
        assert session.ready == [0, 2, 3, 4, 5, 6]
        assert np.array_equal(total_of(world, session), exact({0, 2, 3, 4, 5, 6}))

    def test_wrong_marks(self) -> None:
        """A survivor whose marks are wrong is noticed as soon as somebody else drops out."""
        world = advertised(5)
        session = coordinator_of(world)
        lie = only(LIAR, lambda raw: changed(raw, 5, marks=lambda m: bytes(len(m))))
        total_of(world, session, escrow=lie)
        with pytest.raises(SecureSumError, match="field 'row': 'm001', 'm004' left different keys"):
            total_of(world, session, out=frozenset({4}))
        assert session.blamed == {"'m001', 'm004'": "left different keys of their pair"}
        assert session.conflicts == [(4, LIAR)]

    def test_bad_boxes(self) -> None:
        """A box that does not open is refused by its receiver, who names the sender."""
        world = advertised(5)
        session = coordinator_of(world)
        total_of(world, session, escrow=only(LIAR, lambda r: changed(r, 5, boxes=flipped)))
        session.begin(occasion(2), LENGTH, np.uint32)
        before = world.clients[0].state.next_step
        active, boxes = session.request(0)
        with pytest.raises(
            SecureSumError, match="'m001' left a box for step 2 that is not authentic"
        ):
            world.clients[0].prepare(2, occasion(2), active, boxes, LABEL)
        assert world.clients[0].state.next_step == before
        active, boxes = session.request(2)  # its box was left alone
        world.clients[2].prepare(2, occasion(2), active, boxes, LABEL)

    @pytest.mark.parametrize("extra", [-1, 1, -BOX_BYTES, 136])
    def test_a_wrong_size_of_escrow(self, extra: int) -> None:
        """An escrow of a wrong size is refused before its vector is added."""
        world = advertised(4)
        session = coordinator_of(world)

        def lie(raw: bytes) -> bytes:
            wrong = raw[:extra] if extra < 0 else raw + bytes(extra)
            with pytest.raises(SecureSumError, match="field 'escrow': expected 608 bytes for 4"):
                session.take_masked(LIAR, planted(LIAR), wrong)
            return raw

        total = total_of(world, session, escrow=only(LIAR, lie))
        assert np.array_equal(total, exact(set(range(4))))


class TestAdverts:
    """Keys that are not a member's own, or are none at all."""

    @staticmethod
    def signed(world: Server, transport: bytes, masking: bytes) -> bytes:
        """Return an advert of the liar, truly signed, with keys of its choice."""
        unsigned = Advert("m001", transport, masking, bytes(32), b"")
        signature = world.identities[LIAR].sign(unsigned.signed(CONTEXT))
        return replace(unsigned, signature=signature).to_bytes()

    @pytest.mark.parametrize("which", ["transport", "masking"])
    def test_an_equal_key(self, which: str) -> None:
        """A member that shows another's key as its own is in no roster."""
        world = advertised(4)
        adverts = [client.advert for client in world.clients]
        own, victim = Advert.from_bytes(adverts[LIAR]), Advert.from_bytes(adverts[0])
        keys = {"transport": own.transport, "masking": own.masking}
        keys[which] = getattr(victim, which)
        adverts[LIAR] = self.signed(world, keys["transport"], keys["masking"])
        session = CoordinatorSession(CONTEXT, world.members, 2)
        for position in (0, 2, 3):
            session.take_advert(adverts[position], world.identities[position].merchant)
        with pytest.raises(SecureSumError, match="field 'advert': a key that is there already"):
            session.take_advert(adverts[LIAR], "m001")
        with pytest.raises(SecureSumError, match="two members have an equal key"):
            world.clients[0].share(adverts)  # from a coordinator that takes it
        roster = session.close_roster()
        assert roster == [adverts[position] for position in (0, 2, 3)]
        others = [world.clients[position] for position in (0, 2, 3)]
        for position, client in enumerate(others):
            session.take_escrow(position, client.share(roster))
        world.clients = others
        assert np.array_equal(total_of(world, session), exact({0, 1, 2}))

    def test_one_key_for_both_uses(self) -> None:
        """A key for transport is none for masking, be it one's own or another's."""
        world = advertised(4)
        session = CoordinatorSession(CONTEXT, world.members, 2)
        session.take_advert(world.clients[0].advert, "m000")
        own = Advert.from_bytes(world.clients[LIAR].advert)
        victim = Advert.from_bytes(world.clients[0].advert)
        for keys in (
            (own.transport, own.transport),
            (victim.masking, own.masking),
            (own.transport, victim.transport),
        ):
            with pytest.raises(SecureSumError, match="field 'advert': a key that is there already"):
                session.take_advert(self.signed(world, *keys), "m001")
        session.take_advert(world.clients[LIAR].advert, "m001")  # a refusal leaves no trace

    def test_an_equal_key_in_another_spelling(self) -> None:
        """The unused bit of an X25519 key makes two spellings; pair keys differ all the same."""
        world = advertised(4)
        adverts = [client.advert for client in world.clients]
        victim = Advert.from_bytes(adverts[0])
        spelled = victim.masking[:31] + bytes([victim.masking[31] ^ 0x80])
        own = Advert.from_bytes(adverts[LIAR])
        adverts[LIAR] = self.signed(world, own.transport, spelled)
        for position in (2, 3):
            client = world.clients[position]
            client.share(adverts)
            keys = client.state.next_keys
            assert client.state.pairs[0].masking == client.state.pairs[LIAR].masking
            first, second = keys[:KEY_BYTES], keys[KEY_BYTES : 2 * KEY_BYTES]
            assert first != second

    @pytest.mark.parametrize("raw", LOW_ORDER)
    @pytest.mark.parametrize("which", ["transport", "masking"])
    def test_a_key_of_low_order(self, which: str, raw: str) -> None:
        """A key that gives everybody the same secret gives it to nobody."""
        world = advertised(4)
        adverts = [client.advert for client in world.clients]
        own = Advert.from_bytes(adverts[LIAR])
        keys = {"transport": own.transport, "masking": own.masking, which: bytes.fromhex(raw)}
        adverts[LIAR] = self.signed(world, keys["transport"], keys["masking"])
        session = CoordinatorSession(CONTEXT, world.members, 2)
        with pytest.raises(SecureSumError, match="field 'advert': a key that gives no secret"):
            session.take_advert(adverts[LIAR], "m001")
        for position in (0, 2, 3):  # from a coordinator that takes it
            with pytest.raises(SecureSumError, match=r"key of 'm001' gives no secret \(low order"):
                world.clients[position].share(adverts)
            assert not world.clients[position].state.pairs

    def test_adverts_of_others_and_of_other_runs(self) -> None:
        """The coordinator takes a merchant's own advert for this session, once."""
        world = advertised(4)
        session = CoordinatorSession(CONTEXT, world.members, 2)
        adverts = [client.advert for client in world.clients]
        with pytest.raises(SecureSumError, match="field 'advert': is not that of 'm001'"):
            session.take_advert(adverts[0], "m001")
        session.take_advert(adverts[LIAR], "m001")
        own = Advert.from_bytes(adverts[LIAR])
        for keys in ((own.masking, own.transport), (own.transport, digest(b"other"))):
            with pytest.raises(SecureSumError, match="'m001' gave another one before"):
                session.take_advert(self.signed(world, *keys), "m001")
        old = session_context("old", 1, "contract")
        late = MerchantSession.advertise(world.identities[LIAR], world.members, 2, old)
        with pytest.raises(SecureSumError, match="'m001' is not enrolled with it"):
            session.take_advert(late.advert, "m001")
        with pytest.raises(SecureSumError, match="'m000' is not enrolled with it"):
            session.take_advert(adverts[0][:-64] + adverts[1][-64:], "m000")
        stranger = CoordinatorSession(CONTEXT, Members({}), 2)
        with pytest.raises(SecureSumError, match="'m000' is not enrolled with it"):
            stranger.take_advert(adverts[0], "m000")
        for raw in (b"", b"m000", adverts[0][3:] * 2, b"\xff" + adverts[0], b"../" + adverts[0]):
            with pytest.raises(SecureSumError, match="field 'advert': is no advert of a merch"):
                session.take_advert(raw, "m000")


class TestVectors:
    """What a merchant puts into a sum."""

    @pytest.mark.parametrize(
        "vector",
        [
            planted(1).astype(np.uint64),
            planted(1).astype(np.int32),
            planted(1)[:-1],
            np.zeros(0, np.uint32),
            np.zeros((LENGTH, 1), np.uint32),
            np.concatenate([planted(1), planted(1)]),
        ],
        ids=["uint64", "int32", "short", "empty", "matrix", "long"],
    )
    def test_a_wrong_shape(self, vector: np.ndarray) -> None:
        """A vector that does not fit is refused; it counts as not sent."""
        world = advertised(4)
        session = coordinator_of(world)
        session.begin(occasion(), LENGTH, np.uint32)
        with pytest.raises(SecureSumError, match="field 'vector': expected 512 numbers of type"):
            session.take_masked(LIAR, vector, b"")
        assert session.survivors == []

    def test_twice_and_unasked(self) -> None:
        """One vector a member and step, before the sum is closed."""
        refusal = "field 'vector': was not asked for, is there already, or is late"
        world = advertised(4)
        session = coordinator_of(world)
        session._escrows.pop(3)
        session.begin(occasion(), LENGTH, np.uint32)
        active, boxes = session.request(LIAR)
        prepared = world.clients[LIAR].prepare(1, occasion(), active, boxes, LABEL)
        masked, escrow = world.clients[LIAR].mask(prepared, planted(LIAR))
        session.take_masked(LIAR, masked, escrow)
        for position in (LIAR, 3, 9):
            with pytest.raises(SecureSumError, match=refusal):
                session.take_masked(position, masked, escrow)
        with pytest.raises(SecureSumError, match="1 masked vectors came, 3 are needed"):
            session.close_sum()
        with pytest.raises(SecureSumError, match=refusal):
            session.take_masked(2, masked, escrow)  # asked, and late
        assert session.survivors == [LIAR]


class TestConfirmations:
    """Merchants that vouch wrongly, twice, or not at all."""

    def test_wrong_confirmations_are_refused_by_their_receivers(self) -> None:
        """Nothing is revealed on them, and the receivers' reason names the sender."""
        world = advertised(5)
        session = coordinator_of(world)
        with pytest.raises(SecureSumError, match="'m001' did not confirm this step's set"):
            total_of(world, session, confirmation=only(LIAR, flipped))

    @pytest.mark.parametrize("size", [0, 1, 3 * CONFIRMATION_BYTES, 5 * CONFIRMATION_BYTES])
    def test_a_wrong_size(self, size: int) -> None:
        """Confirmations of a wrong size are refused; the merchant has not confirmed."""
        world = advertised(7)
        session = coordinator_of(world)
        session.begin(occasion(), LENGTH, np.uint32)
        for position in range(5):
            active, boxes = session.request(position)
            prepared = world.clients[position].prepare(1, occasion(), active, boxes, LABEL)
            session.take_masked(
                position, *world.clients[position].mask(prepared, planted(position))
            )
        session.close_sum()
        with pytest.raises(SecureSumError, match="field 'confirmations': expected 64 bytes"):
            session.take_confirmations(LIAR, bytes(size))
        with pytest.raises(SecureSumError, match="0 members confirmed the sum, 5 are needed"):
            _ = session.confirmed

    def test_confirming_twice(self) -> None:
        """A second confirmation takes the place of the first; the sum is the same."""
        world = advertised(5)
        session = coordinator_of(world)

        def twice(raw: bytes) -> bytes:
            session.take_confirmations(LIAR, bytes(len(raw)))
            return raw

        total = total_of(world, session, confirmation=only(LIAR, twice))
        assert np.array_equal(total, exact(set(range(5))))

    def test_silence(self) -> None:
        """Of seven, two may be silent at each stage; a third one ends the step with a reason."""
        for silent in ({5, 6}, {4, 5, 6}):
            world = advertised(7)
            session = coordinator_of(world)
            if len(silent) == 2:
                total = total_of(world, session, silent=frozenset(silent))
                assert np.array_equal(total, exact(set(range(7))))
                continue
            with pytest.raises(SecureSumError, match="4 good shares of 'm000' were revealed, 5"):
                total_of(world, session, silent=frozenset(silent))
        world = advertised(7)
        session = coordinator_of(world)
        total = total_of(world, session, out=frozenset({5, 6}))
        assert np.array_equal(total, exact(set(range(5))))
        world = advertised(7)
        session = coordinator_of(world)
        with pytest.raises(SecureSumError, match="4 masked vectors came, 5 are needed"):
            total_of(world, session, out=frozenset({4, 5, 6}))


Tamper = Callable[[int, Message, Message], Message]


def run_over_grid(found: Shops, tamper: Tamper, nodes: list[int] | None = None) -> Outcome:
    """Run the real coordinator; `tamper` gets (node's number, question, honest reply)."""
    speaks = nodes or list(range(found.size))

    def worker_at(context: Context) -> Any:
        return found.workers[speaks[int(context.node_config["partition-id"])]]

    app = create_app(worker_at)

    def answer(message: Message, context: Context) -> Message:
        reply = app(message, context)
        return tamper(int(context.node_config["partition-id"]), message, reply)

    grid = InProcessGrid(answer, len(speaks), {}, None)  # type: ignore[arg-type]
    folder = found.workers[0].ledger.path.with_name("server")
    archive = archive_at(folder)
    return Coordinator(grid, found.contract, lambda _report: None, found.members, archive).run()


def tiny(count: int, spare: int = 2) -> Any:
    """Return a contract of two rounds."""
    return small_contract(
        count,
        training={"rounds": 2, "spare_rounds": spare},
        aggregation={"min_survivors": 3},
        federation={"name": "test", "min_merchants": count, "round_timeout_s": 0.02},
    )


class TestOverTheGrid:
    """The same through the coordinator: what a run does about it."""

    def test_two_nodes_with_one_identity(self, tmp_path: Path) -> None:
        """The second node is left out, and said to be."""
        found = shops(tmp_path, 4, contract=tiny(4))
        outcome = run_over_grid(found, lambda _n, _m, reply: reply, [0, 1, 2, 3, 1])
        assert outcome.merchants == ["m000", "m001", "m002", "m003"]
        assert "a second node called itself 'm001'" in outcome.failures["node 6"]
        assert outcome.cohorts == [4, 4]

    def test_somebody_elses_name(self, tmp_path: Path) -> None:
        """A stranger may take a name; it cannot sign for it, and is in no sum."""
        found = shops(tmp_path, 5, contract=tiny(5))

        def tamper(number: int, _message: Message, reply: Message) -> Message:
            if number == 0:
                for kind in (Attested, Advertised, Shared, SumAnswer, Confirmed, Revealed):
                    try:
                        answer = unpack(kind, reply.content)
                    except WireError:
                        continue
                    reply.content = pack(replace(answer, merchant="m001"))
            return reply

        outcome = run_over_grid(found, tamper)
        assert "is not signed with this merchant's key" in outcome.failures["m001"]
        assert outcome.cohorts == [3, 3]

    @pytest.mark.parametrize("kind", [Shared, SumAnswer, Confirmed, Revealed])
    def test_silence_and_errors_at_each_stage(self, tmp_path: Path, kind: type[Any]) -> None:
        """One of five merchants that fails at a stage does not stop the run."""
        found = shops(tmp_path, 5, contract=tiny(5))

        def tamper(number: int, _message: Message, reply: Message) -> Message:
            if number == LIAR:
                try:
                    answer = unpack(kind, reply.content)
                except WireError:
                    return reply
                spoiled = {
                    name: value[:-1]
                    for name, value in vars(answer).items()
                    if isinstance(value, bytes) and value
                }
                reply.content = pack(replace(answer, **spoiled))
            return reply

        outcome = run_over_grid(found, tamper)
        assert len(outcome.cohorts) == 2
        assert min(outcome.cohorts) >= 4
        assert "field '" in outcome.failures["m001"]

    @pytest.mark.parametrize("kind", ["confirmations", "boxes", "advert"])
    def test_one_liar_does_not_end_the_run(self, tmp_path: Path, kind: str) -> None:
        """A merchant whose lie every honest one reports is left out of the next attempt."""
        found = shops(tmp_path, 5, contract=tiny(5))

        def tamper(number: int, _message: Message, reply: Message) -> Message:
            return lying(kind, reply) if number == LIAR else reply

        if kind == "advert":
            found.workers[LIAR]._party.__dict__["advertise"] = low_order(found)
        outcome = run_over_grid(found, tamper)
        assert outcome.cohorts == [4, 4]
        if kind == "advert":
            assert outcome.failures["m001"] == "field 'advert': a key that gives no secret"
            return
        for name in ("m000", "m002", "m003", "m004"):
            assert f"field '{kind}': 'm001' " in outcome.failures[name]


def lying(kind: str, reply: Message) -> Message:
    """Spoil what one merchant left for the others, keeping its size."""
    for answer_kind, name in (
        (Confirmed, "confirmations"),
        (Shared, "boxes"),
        (SumAnswer, "boxes"),
    ):
        try:
            answer = unpack(answer_kind, reply.content)
        except WireError:
            continue
        if kind != name:
            return reply
        if isinstance(answer, Confirmed):
            reply.content = pack(replace(answer, confirmations=bytes(len(answer.confirmations))))
        elif answer.escrow:
            size = (len(answer.escrow) - 2 * KEY_BYTES) // (BOX_BYTES + KEY_BYTES + 3 * MARK_BYTES)
            escrow = changed(answer.escrow, size, boxes=lambda raw: bytes(len(raw)))
            reply.content = pack(replace(answer, escrow=escrow))
    return reply


def low_order(found: Shops) -> Callable[[Any, bytes, bytes], tuple[bytes, bytes]]:
    """Return an `advertise` whose signed keys have low order."""

    def advertise(message: Any, link: bytes, head: bytes) -> tuple[bytes, bytes]:
        context = session_context(message.run, message.session, message.contract)
        unsigned = Advert("m001", bytes(32), b"\x01" + bytes(31), link, b"")
        signature = found.identities[LIAR].sign(unsigned.signed(context))
        return replace(unsigned, signature=signature).to_bytes(), head

    return advertise


assert FIRST_NODE == 2  # node 6 is the fifth
