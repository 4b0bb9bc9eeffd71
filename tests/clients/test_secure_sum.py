"""A merchant's half of secure sums: what it answers once, and what it never answers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.secure_party import SecureParty
from clients.secure_sum import (
    Label,
    MerchantSession,
    Phase,
    Prepared,
    state_from_bytes,
    state_to_bytes,
)
from clients.session_store import FileStore, MemoryStore
from common.errors import SecureSumError
from common.identity import Identity, Members
from common.session import (
    Advert,
    from_bitmap,
    occasion_hash,
    session_context,
    to_bitmap,
)
from common.wire import Advertise, Confirm, Reveal, Share, SumRequest
from server.secure_sum import CoordinatorSession
from tests.secure_world import ANSWER, LABEL, World, ids, occasion, vectors_of

VECTORS = vectors_of(5, 6, np.uint32, 1)


@pytest.fixture
def world() -> World:
    """Give five merchants in a session."""
    return World(5, 3).set_up()


def prepared(world: World, position: int = 0) -> Prepared:
    """Prepare the step that the coordinator has begun."""
    active, boxes = world.coordinator.request(position)
    step = world.coordinator.step
    return world.at(position).prepare(step, occasion(step), active, boxes, LABEL)


def begun(world: World) -> World:
    """Begin a step."""
    world.step_number += 1
    world.coordinator.begin(occasion(world.step_number), 6, np.uint32)
    return world


def bitmap(*positions: int) -> bytes:
    """Return a set of the five."""
    return to_bitmap(positions, 5)


def refused(world: World, position: int, act: Callable[[], object], message: str) -> None:
    """Check that a merchant refuses, and remembers nothing of it."""
    before = state_to_bytes(world.at(position).state)
    with pytest.raises(SecureSumError, match=message):
        act()
    assert state_to_bytes(world.at(position).state) == before


class TestShare:
    """The roster."""

    @staticmethod
    def advertised(count: int = 5, minimum: int = 3) -> World:
        """Return merchants that have advertised."""
        world = World(count, minimum)
        world.advertise()
        return world

    def refuses(self, world: World, roster: list[bytes], message: str) -> None:
        """Check that the first merchant does not join a roster, and could join a right one."""
        session = world.merchants["shop-000"]
        before = state_to_bytes(session.state)
        with pytest.raises(SecureSumError, match=message):
            session.share(roster)
        assert state_to_bytes(session.state) == before
        session.share(world.coordinator.close_roster())

    def test_who_is_not_enrolled_is_not_joined(self) -> None:
        """Whatever the coordinator says."""
        world = self.advertised()
        identity = Identity.generate("zebra")
        context = world.context
        other = MerchantSession.advertise(identity, Members({}), 2, context)
        roster = [*world.coordinator.close_roster(), other.advert]
        self.refuses(world, roster, "'zebra' is not enrolled")

    def test_swapped_keys_are_found(self) -> None:
        """A key that its merchant did not sign is refused with the merchant's name."""
        world = self.advertised()
        roster = world.coordinator.close_roster()
        for field in ("transport", "masking"):
            swapped = replace(Advert.from_bytes(roster[3]), **{field: b"\7" * 32}).to_bytes()
            wrong = [*roster[:3], swapped, roster[4]]
            self.refuses(world, wrong, "the advert of 'shop-003' has a wrong signature")
            world = self.advertised()
            roster = world.coordinator.close_roster()

    @pytest.mark.parametrize("context", [("run", 2, "contract"), ("other", 1, "contract")])
    def test_an_advert_of_another_session_is_refused(self, context: tuple[str, int, str]) -> None:
        """Of another run, another number or another contract."""
        world = self.advertised()
        roster = world.coordinator.close_roster()
        identity = world.identities["shop-002"]
        old = MerchantSession.advertise(identity, world.members, 3, session_context(*context))
        self.refuses(world, [*roster[:2], old.advert, *roster[3:]], "'shop-002' has a wrong sign")

    def test_its_own_advert_must_be_in_it(self) -> None:
        """Left out, or exchanged for an older one of its own."""
        world = self.advertised()
        roster = world.coordinator.close_roster()
        self.refuses(world, roster[1:], "own advert is not in it")
        world = self.advertised()
        roster = world.coordinator.close_roster()
        identity = world.identities["shop-000"]
        older = MerchantSession.advertise(identity, world.members, 3, world.context)
        self.refuses(world, [older.advert, *roster[1:]], "own advert is not in it")

    def test_a_small_roster_is_refused(self) -> None:
        """The merchant's own minimum counts, not the coordinator's."""
        world = self.advertised()
        roster = world.coordinator.close_roster()
        self.refuses(world, roster[:2], "2 members; this merchant joins sums of 3 or more")

    def test_a_roster_has_one_order(self) -> None:
        """Members see the same positions or none."""
        world = self.advertised()
        roster = world.coordinator.close_roster()
        self.refuses(world, [*roster[:3], roster[4], roster[3]], "must be sorted")
        self.refuses(self.advertised(), [], "0 members")

    @pytest.mark.parametrize("raw", [b"", b"x", bytes(200), bytes(127)])
    def test_what_is_no_advert_is_refused(self, raw: bytes) -> None:
        """Garbage among adverts."""
        world = self.advertised()
        self.refuses(world, [*world.coordinator.close_roster(), raw], "is no advert")

    @pytest.mark.parametrize(
        "point", [bytes(32), b"\1" + bytes(31), b"\xed" + b"\xff" * 30 + b"\x7f"]
    )
    def test_keys_of_low_order_are_refused(self, point: bytes) -> None:
        """Of an enrolled merchant that signs a key whose secrets everybody knows."""
        world = self.advertised()
        roster = world.coordinator.close_roster()
        unsigned = replace(Advert.from_bytes(roster[4]), masking=point)
        signature = world.identities["shop-004"].sign(unsigned.signed(world.context))
        bad = replace(unsigned, signature=signature).to_bytes()
        self.refuses(
            world, [*roster[:4], bad], r"a key of 'shop-004' gives no secret \(low order\)"
        )

    def test_a_second_roster_is_refused(self, world: World) -> None:
        """One session, one roster; also not the same one again."""
        roster = world.coordinator.close_roster()
        refused(world, 0, lambda: world.at(0).share(roster), "has its roster already")

    def test_private_keys_are_forgotten(self, world: World) -> None:
        """Once the pairs are known nobody needs them."""
        assert world.at(0).state.transport == world.at(0).state.masking == b""

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.binary(max_size=200), max_size=5))
    def test_any_list_is_refused_with_a_reason(self, roster: list[bytes]) -> None:
        """Never anything but a `SecureSumError`."""
        session = MerchantSession.advertise(
            Identity("shop", Ed25519PrivateKey.from_private_bytes(bytes(32))),
            Members({}),
            2,
            bytes(32),
        )
        with pytest.raises(SecureSumError):
            session.share([session.advert, *roster])


class TestPrepare:
    """What a step brings."""

    def test_nothing_changes(self, world: World) -> None:
        """A step may be prepared and never begun."""
        begun(world)
        before = state_to_bytes(world.at(0).state)
        assert prepared(world) == prepared(world)
        assert state_to_bytes(world.at(0).state) == before

    def test_no_step_without_a_roster(self) -> None:
        """Adverts alone are no session."""
        world = World(3, 2)
        world.advertise()
        session = world.merchants["shop-000"]
        with pytest.raises(SecureSumError, match="no roster yet"):
            session.prepare(1, occasion(1), to_bitmap(range(3), 3), bytes(160), LABEL)

    @pytest.mark.parametrize("step", [0, 2, 3, 2**31 - 1])
    def test_only_the_next_step_is_taken_up(self, world: World, step: int) -> None:
        """Neither an older one nor a later one."""
        active, boxes = begun(world).coordinator.request(0)
        refused(
            world,
            0,
            lambda: world.at(0).prepare(step, occasion(1), active, boxes, LABEL),
            f"expected step 1 of this session, got {step}",
        )

    def test_a_step_is_not_taken_up_again(self, world: World) -> None:
        """After it was masked, with the same boxes and the same members."""
        active, boxes = begun(world).coordinator.request(0)
        world.at(0).mask(prepared(world), VECTORS[0])
        refused(
            world,
            0,
            lambda: world.at(0).prepare(1, occasion(1), active, boxes, LABEL),
            "expected step 2 of this session, got 1",
        )

    @pytest.mark.parametrize(
        ("active", "message"),
        [
            ([1, 2, 3, 4], "this merchant is not in it"),
            ([0, 1, 2], "3 members; this merchant needs 4 or more"),
            ([0], "1 members"),
            ([], "this merchant is not in it"),
        ],
    )
    def test_the_members_that_are_asked_are_checked(
        self, world: World, active: list[int], message: str
    ) -> None:
        """This merchant is one of them, and they are enough."""
        boxes = bytes(80 * len(set(active) - {0}))
        chosen = bitmap(*active)
        refused(
            begun(world),
            0,
            lambda: world.at(0).prepare(1, occasion(1), chosen, boxes, LABEL),
            message,
        )

    def test_its_own_minimum_may_be_above_the_threshold(self) -> None:
        """Four of five would do for the roster, not for a merchant that wants five."""
        world = begun(World(5, 5).set_up())
        _, boxes = world.coordinator.request(0)
        refused(
            world,
            0,
            lambda: world.at(0).prepare(1, occasion(1), bitmap(0, 1, 2, 3), boxes[:240], LABEL),
            "4 members; this merchant needs 5 or more",
        )

    @pytest.mark.parametrize("change", ["bit", "order", "short", "long", "own", "step"])
    def test_boxes_that_are_not_authentic_are_refused(self, world: World, change: str) -> None:
        """Changed, exchanged, cut, for somebody else, or of another step."""
        active, boxes = begun(world).coordinator.request(0)
        wrong = {
            "bit": bytes([boxes[0] ^ 1]) + boxes[1:],
            "order": boxes[80:160] + boxes[:80] + boxes[160:],
            "short": boxes[:-1],
            "long": boxes + bytes(80),
            "own": world.coordinator.request(1)[1],
            "step": boxes,
        }[change]
        step = 1
        if change == "step":
            world.at(0).mask(prepared(world), VECTORS[0])
            step = 2
        refused(
            world,
            0,
            lambda: world.at(0).prepare(step, occasion(step), active, wrong, LABEL),
            r"is not authentic|expected 320 bytes",
        )

    @settings(max_examples=100, deadline=None)
    @given(
        step=st.integers(0, 2**31 - 1) | st.just(1),
        active=st.binary(max_size=2) | st.just(bitmap(0, 1, 2, 3, 4)),
        boxes=st.binary(max_size=400) | st.just(bytes(320)),
    )
    def test_any_bytes_are_refused_with_a_reason(
        self, step: int, active: bytes, boxes: bytes
    ) -> None:
        """Never anything but a `SecureSumError`."""
        with pytest.raises(SecureSumError, match="field '"):
            _READY.at(0).prepare(step, occasion(1), active, boxes, LABEL)


_READY = World(5, 3).set_up()


class TestMask:
    """The vector that leaves."""

    def test_a_vector_leaves_once(self, world: World) -> None:
        """The same preparation does not mask a second vector."""
        one = prepared(begun(world))
        world.at(0).mask(one, VECTORS[0])
        refused(world, 0, lambda: world.at(0).mask(one, VECTORS[0]), "step 1 was begun before")

    def test_the_vector_itself_is_not_changed(self, world: World) -> None:
        """The mask is on a copy."""
        before = VECTORS[0].copy()
        masked, _ = world.at(0).mask(prepared(begun(world)), VECTORS[0])
        np.testing.assert_array_equal(VECTORS[0], before)
        assert (masked != before).all()

    @pytest.mark.parametrize("dtype", [np.int64, np.float64])
    def test_another_type_is_refused_and_nothing_was_begun(self, world: World, dtype: type) -> None:
        """A mistake of ours does not cost the step."""
        one = prepared(begun(world))
        before = state_to_bytes(world.at(0).state)
        with pytest.raises(ValueError, match="uint32 or uint64"):
            world.at(0).mask(one, VECTORS[0].astype(dtype))
        assert state_to_bytes(world.at(0).state) == before

    def test_members_that_were_shown_different_models_reveal_nothing(self, world: World) -> None:
        """Where members are shown different models, nobody helps to unmask the sum."""
        begun(world)
        active, boxes = world.coordinator.request(0)
        other = world.at(0).prepare(1, occasion(77), active, boxes, LABEL)
        for position in range(5):
            one = other if position == 0 else prepared(world, position)
            masked, escrow = world.at(position).mask(one, VECTORS[position])
            world.coordinator.take_masked(position, masked, escrow)
        world.confirm()
        with pytest.raises(SecureSumError, match="'shop-001' did not confirm"):
            world.reveal()

    @staticmethod
    def chi_square(vector: np.ndarray) -> float:
        """Return the statistic of the bytes against uniform ones; 255 degrees of freedom."""
        observed = np.bincount(vector.view(np.uint8), minlength=256)
        expected = vector.nbytes / 256
        return float(((observed - expected) ** 2 / expected).sum())

    @pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
    def test_a_masked_constant_looks_uniform(self, dtype: type[np.unsignedinteger]) -> None:
        """Chi-square of its bytes, one false alarm in a million; the vector itself is rejected."""
        limit = 377.0  # chi-square of 255 degrees exceeds 376.9 with chance 1e-6
        world = World(3, 2).set_up()
        world.coordinator.begin(occasion(1), 20_000, dtype)
        constant = np.full(20_000, 12_345, dtype=dtype)
        masked, _ = world.at(1).mask(prepared(world, 1), constant)
        assert self.chi_square(masked) < limit
        assert self.chi_square(masked - constant) < limit
        assert self.chi_square(constant) > limit

    def test_two_steps_have_different_masks(self, world: World) -> None:
        """The same vector twice leaves as two different ones."""
        seen = []
        for _ in range(2):
            twin = begun(world.snapshot())
            seen.append(twin.at(0).mask(prepared(twin), VECTORS[0])[0])
            world.sum(VECTORS)
        assert (seen[0] != seen[1]).all()


class TestConfirm:
    """The set of survivors, once."""

    def survivors(self, world: World) -> World:
        """Mask with everybody but the last one's vector arriving."""
        world.update(VECTORS, {4: ("update", ANSWER)})
        return world

    def test_only_once(self, world: World) -> None:
        """Neither another set nor the same one again."""
        self.survivors(world)
        world.at(0).confirm(1, bitmap(0, 1, 2, 3))
        for again in (bitmap(0, 1, 2, 3), bitmap(0, 1, 2, 3, 4), bitmap(0, 1, 2, 4)):
            refused(
                world, 0, lambda again=again: world.at(0).confirm(1, again), r"be given \(again\)"
            )

    @pytest.mark.parametrize(
        ("chosen", "message"),
        [
            (bitmap(1, 2, 3, 4), "this merchant is not in it"),
            (bitmap(0, 1, 2), "3 members; this merchant needs 4 or more"),
            (b"", "expected a bitmap"),
            (b"\xff", "names a position that no member has"),
            (b"\x0f\x00", "expected a bitmap"),
        ],
    )
    def test_sets_that_are_refused(self, world: World, chosen: bytes, message: str) -> None:
        """Too small, without this merchant, or no set of members."""
        self.survivors(world)
        refused(world, 0, lambda: world.at(0).confirm(1, chosen), message)

    def test_who_was_not_asked_is_no_survivor(self) -> None:
        """A vector that never was cannot be in the sum."""
        world = World(7, 3).set_up()
        vectors = vectors_of(7, 2, np.uint32, 1)
        world.sum(vectors, {6: ("update", ANSWER)})
        world.update(vectors)
        chosen = to_bitmap(range(7), 7)
        refused(world, 0, lambda: world.at(0).confirm(2, chosen), "'shop-006' cannot be in it")

    def test_who_is_not_in_a_confirmed_sum_stays_out(self, world: World) -> None:
        """Also where the next step's boxes would be there."""
        self.survivors(world).confirm()
        refused(
            world,
            0,
            lambda: world.at(0).prepare(2, occasion(2), bitmap(0, 1, 2, 3, 4), bytes(320), LABEL),
            "'shop-004' cannot be in it; who is out stays out",
        )

    @pytest.mark.parametrize("step", [0, 2, 5])
    def test_another_step_is_refused(self, world: World, step: int) -> None:
        """Only what is under way can be confirmed."""
        self.survivors(world)
        refused(
            world,
            0,
            lambda: world.at(0).confirm(step, bitmap(0, 1, 2, 3)),
            f"step {step} is not under way",
        )

    def test_nothing_under_way_is_refused(self, world: World) -> None:
        """Before the first step and after a whole one."""
        refused(world, 0, lambda: world.at(0).confirm(0, bitmap(0, 1, 2, 3)), "is not under way")
        world.sum(VECTORS)
        refused(world, 0, lambda: world.at(0).confirm(1, bitmap(0, 1, 2, 3)), "is not under way")


class TestReveal:
    """Shares, once, after enough right confirmations."""

    def confirmed(self, world: World) -> World:
        """Confirm a sum of the first four."""
        world.update(VECTORS, {4: ("update", ANSWER)})
        world.confirm()
        return world

    def test_of_survivors_the_mask_of_others_the_row(self, world: World) -> None:
        """Never both shares of anybody, never one of anything else."""
        self.confirmed(world)
        held = dict(world.at(0).state.step.shares)  # type: ignore[union-attr]
        shares = world.at(0).reveal(1, *world.coordinator.confirmations_for(0))
        expected = [held[position][:32] for position in range(4)] + [held[4][32:]]
        assert shares == b"".join(expected)

    def test_only_once(self, world: World) -> None:
        """The shares are gone after that."""
        self.confirmed(world)
        codes = world.coordinator.confirmations_for(0)
        world.at(0).reveal(1, *codes)
        refused(world, 0, lambda: world.at(0).reveal(1, *codes), "is not under way")
        assert world.at(0).state.step is None

    def test_not_before_it_confirmed(self, world: World) -> None:
        """Whatever the others did."""
        world.update(VECTORS)
        world.confirm({0: ("confirm", "asked")})
        codes = [world.coordinator._current.confirmations[other][0] for other in (1, 2, 3, 4)]
        given = bitmap(1, 2, 3, 4)
        refused(
            world, 0, lambda: world.at(0).reveal(1, given, b"".join(codes)), r"be given \(again\)"
        )

    def test_too_few_confirmations_are_refused(self, world: World) -> None:
        """Three of five, this merchant's own counted whether it is named or not."""
        self.confirmed(world)
        _, codes = world.coordinator.confirmations_for(0)
        for named in (bitmap(0, 1, 2), bitmap(1, 2)):
            refused(
                world,
                0,
                lambda named=named: world.at(0).reveal(1, named, codes[:32]),
                "3 confirmations, 4 are needed",
            )
        assert world.at(0).reveal(1, bitmap(1, 2, 3), codes)

    def test_a_code_counts_once(self, world: World) -> None:
        """Repeating a code does not make it more; neither does one of a member that is out."""
        self.confirmed(world)
        _, codes = world.coordinator.confirmations_for(0)
        refused(
            world,
            0,
            lambda: world.at(0).reveal(1, bitmap(0, 1, 2), codes[:32] + codes[:16]),
            "expected 32 bytes",
        )
        refused(
            world,
            0,
            lambda: world.at(0).reveal(1, bitmap(1, 2, 3, 4), codes + codes[:16]),
            "names a member that is not in the sum",
        )

    @pytest.mark.parametrize("change", ["bit", "order", "other set", "other step", "reflected"])
    def test_a_wrong_code_is_refused(self, world: World, change: str) -> None:
        """The message names whose it is."""
        self.confirmed(world)
        given, codes = world.coordinator.confirmations_for(0)
        if change == "bit":
            codes = bytes([codes[0] ^ 1]) + codes[1:]
        elif change == "order":
            codes = codes[16:32] + codes[:16] + codes[32:]
        elif change == "reflected":  # its own code for the other, sent back
            codes = world.coordinator._current.confirmations[0][1] + codes[16:]
        elif change == "other set":
            other = self.twin(world)
            other.at(1).confirm(1, bitmap(0, 1, 2, 3, 4))
            codes = self.code(other, 1, bitmap(0, 1, 2, 3, 4)) + codes[16:]
        else:
            world.reveal()
            world.coordinator.total()
            world.update(VECTORS)
            world.confirm()
            given, new = world.coordinator.confirmations_for(0)
            codes = codes[:16] + new[16:]
        step = 2 if change == "other step" else 1
        refused(
            world,
            0,
            lambda: world.at(0).reveal(step, given, codes),
            r"'shop-00[12]' did not confirm this step's set of survivors",
        )

    @staticmethod
    def twin(world: World) -> World:
        """Return the same world with merchant 1 before it confirmed."""
        other = world.snapshot()
        state = other.at(1).state
        state.phase = Phase.MASKED
        return other

    @staticmethod
    def code(world: World, position: int, chosen: bytes) -> bytes:
        """Return a merchant's confirmation of a set for the first merchant."""
        world.at(position).state.phase = Phase.MASKED
        codes = world.at(position).confirm(1, chosen)
        others = sorted(from_bitmap(chosen, 5, "x") - {position})
        return codes[16 * others.index(0) :][:16]

    @settings(max_examples=60, deadline=None)
    @given(given_=st.binary(max_size=2), codes=st.binary(max_size=80))
    def test_any_bytes_are_refused_with_a_reason(self, given_: bytes, codes: bytes) -> None:
        """Never anything but a `SecureSumError`."""
        with pytest.raises(SecureSumError, match="field '"):
            _CONFIRMED.at(0).reveal(1, given_, codes)


_CONFIRMED = TestReveal().confirmed(World(5, 3).set_up())


class TestState:
    """What a merchant remembers."""

    def test_it_comes_back_in_every_phase(self) -> None:
        """After every message the bytes hold all of it."""
        world = World(4, 2, forgetful=True)  # which checks it after every message
        vectors = vectors_of(4, 3, np.uint64, 2)
        world.set_up()
        for _ in range(3):
            np.testing.assert_array_equal(world.sum(vectors), world.plain(vectors, [0, 1, 2, 3]))

    def test_bytes_of_something_else_are_no_state(self) -> None:
        """Errors that a store can tell."""
        for raw in (b"", b"{}", b"[]", b"null", b'{"context": 1}'):
            with pytest.raises((ValueError, KeyError, TypeError)):
                state_from_bytes(raw)


HEAD = bytes(range(32))  # link of a ledger's last entry


def share_of(number: int, roster: list[bytes]) -> Share:
    """Return the message that shows a session's roster."""
    return Share("run", "contract", number, b"", roster)


def joined(_roster: str) -> bytes:
    """Stand for a ledger that lets every roster be joined."""
    return b"joined"


def never_joined(_roster: str) -> bytes:
    """Stand for a ledger that must not be asked."""
    raise AssertionError("joined again")


class TestParty:
    """The merchant's side of the messages."""

    @staticmethod
    def parties(folder: Path | None = None) -> list[SecureParty]:
        """Return four merchants with stores of their own, in memory or in files."""
        identities = [Identity.generate(name) for name in ids(4)]
        members = Members({identity.merchant: identity.public for identity in identities})
        return [
            SecureParty(
                one,
                members,
                3,
                MemoryStore() if folder is None else FileStore(folder / one.merchant, one),
            )
            for one in identities
        ]

    @staticmethod
    def session(parties: list[SecureParty], number: int = 1) -> CoordinatorSession:
        """Set up a session."""
        context = session_context("run", number, "contract")
        session = CoordinatorSession(context, parties[0].members, 3)
        for party in parties:
            message = Advertise("run", "contract", number, b"")
            advert, _ = party.advertise(message, HEAD, b"head")
            session.take_advert(advert, party.identity.merchant)
        roster = session.close_roster()
        for position, party in enumerate(parties):
            session.take_escrow(position, party.share(share_of(number, roster), joined)[0])
        return session

    @staticmethod
    def request(session: CoordinatorSession, position: int, stage: str) -> SumRequest:
        """Return a member's request of the step under way."""
        active, boxes = session.request(position)
        model = np.zeros(2)
        return SumRequest("run", "contract", stage, 1, 0, 50.0, 1, 1, active, boxes, b"", model)

    def test_without_a_session_nothing_is_answered(self) -> None:
        """Every message but the first needs one."""
        party = self.parties()[0]
        messages = [
            lambda: party.share(share_of(1, []), joined),
            lambda: party.confirm(Confirm(1, 1, b"")),
            lambda: party.reveal(Reveal(1, 1, b"", b"")),
        ]
        for message in messages:
            with pytest.raises(SecureSumError, match="no session under way"):
                message()

    def test_an_advert_holds_the_ledgers_head(self) -> None:
        """It is signed together with the keys."""
        party = self.parties()[0]
        raw, _ = party.advertise(Advertise("run", "contract", 1, b""), HEAD, b"head")
        assert Advert.from_bytes(raw).head == HEAD

    def test_another_sessions_number_is_refused(self) -> None:
        """A message to an earlier session does not reach this one."""
        parties = self.parties()
        self.session(parties, 2)
        with pytest.raises(SecureSumError, match="is in session 2, not 1"):
            parties[0].confirm(Confirm(1, 1, b""))

    @pytest.mark.parametrize("change", [{"run": "other"}, {"contract": "other"}])
    def test_another_run_or_contract_is_refused(self, change: dict[str, str]) -> None:
        """A session belongs to one run of one contract."""
        parties = self.parties()
        session = self.session(parties)
        session.begin(bytes(32), 2, np.uint32)
        request = replace(self.request(session, 0, "update"), **change)  # type: ignore[arg-type]
        with pytest.raises(SecureSumError, match="of another run or contract"):
            parties[0].prepare(request)

    @pytest.mark.parametrize("change", [{"run": "other"}, {"contract": "other"}])
    def test_a_roster_of_another_run_or_contract_is_refused(self, change: dict[str, str]) -> None:
        """Before anything is dealt."""
        party = self.parties()[0]
        advert, _ = party.advertise(Advertise("run", "contract", 1, b""), HEAD, b"head")
        message = replace(share_of(1, [advert]), **change)  # type: ignore[arg-type]
        with pytest.raises(SecureSumError, match="of another run or contract"):
            party.share(message, joined)

    @pytest.mark.parametrize("kind", ["memory", "files"])
    def test_a_whole_step_tells_what_was_summed(self, kind: str, tmp_path: Path) -> None:
        """After it the ledger may note label and number of survivors; then all is forgotten."""
        parties = self.parties(tmp_path if kind == "files" else None)
        session = self.session(parties)
        session.begin(occasion_hash("census", 1, 0, 50.0, np.zeros(2)), 2, np.uint32)
        vectors = vectors_of(4, 2, np.uint32, 5)
        for position, party in enumerate(parties):
            request = self.request(session, position, "census")
            sent = party.mask(request, party.prepare(request), vectors[position], b"head")
            session.take_masked(position, sent.vector, sent.escrow)
        survivors = session.close_sum()
        for position, party in enumerate(parties):
            session.take_confirmations(position, party.confirm(Confirm(1, 1, survivors)))
        for position, party in enumerate(parties):
            message = Reveal(1, 1, *session.confirmations_for(position))
            shares, label, count = party.reveal(message)
            assert (label, count) == (Label("run", "census", 1, 0), 4)
            session.take_shares(position, shares)
        expected = np.sum(vectors, axis=0, dtype=np.uint32)
        np.testing.assert_array_equal(session.total(), expected)
        parties[0].forget("run", 1, "contract")
        with pytest.raises(SecureSumError, match="step 2 is not under way"):
            parties[0].confirm(Confirm(1, 2, survivors))
        with pytest.raises(SecureSumError, match="this session is over"):
            parties[0].prepare(self.next_request(session, 0))
        left = parties[0].store.load()
        assert (left.pairs, left.next_self, left.next_share, left.next_keys) == ({}, b"", b"", b"")

    @staticmethod
    def next_request(session: CoordinatorSession, position: int) -> SumRequest:
        """Return a member's request of the step that follows."""
        session.begin(bytes(32), 2, np.uint32)
        return replace(TestParty.request(session, position, "update"), step=2)

    @pytest.mark.parametrize("kind", ["memory", "files"])
    def test_the_same_question_gets_the_same_answer(self, kind: str, tmp_path: Path) -> None:
        """Byte for byte, at every stage, also when the session's keys were erased."""
        parties = self.parties(tmp_path if kind == "files" else None)
        message = Advertise("run", "contract", 1, b"")
        first, _ = parties[0].advertise(message, HEAD, b"head")
        assert parties[0].advertised(message) == (first, b"head")
        assert parties[0].advertised(replace(message, countersigned=b"later")) == (first, b"head")
        assert parties[0].advertised(replace(message, run="other")) is None
        session = self.session(parties)
        assert parties[0].advertised(message) is None  # a roster is there: keys are used once
        roster = [advert.to_bytes() for advert in session.roster.adverts]
        for asked in (share_of(1, roster), replace(share_of(1, roster), countersigned=b"later")):
            kept = parties[0].share(asked, never_joined)
            assert kept == (session._escrows[0].to_bytes(), b"joined")
        session.begin(bytes(32), 2, np.uint32)
        request = self.request(session, 0, "update")
        for position, party in enumerate(parties):
            own = self.request(session, position, "update")
            assert party.masked(own) is None
            vector = np.full(2, position, dtype=np.uint32)
            sent = party.mask(own, party.prepare(own), vector, b"head")
            session.take_masked(position, sent.vector, sent.escrow)
            kept = party.masked(replace(own, countersigned=b"later"))
            assert kept is not None
            assert (kept.vector.tolist(), kept.escrow, kept.head) == (
                sent.vector.tolist(),
                sent.escrow,
                b"head",
            )
        assert parties[0].masked(replace(request, parameters=np.ones(2))) is None
        confirm = Confirm(1, 1, session.close_sum())
        for position, party in enumerate(parties):
            session.take_confirmations(position, party.confirm(confirm))
            assert party.confirm(confirm) == party.confirm(confirm)
        with pytest.raises(SecureSumError, match="cannot be given"):
            parties[0].confirm(replace(confirm, survivors=b"\x07"))
        reveal = Reveal(1, 1, *session.confirmations_for(0))
        shares = parties[0].reveal(reveal)
        assert parties[0].reveal(reveal) == shares
        parties[0].forget("run", 1, "contract")
        assert parties[0].reveal(reveal) == shares
        assert parties[0].masked(request) is not None

    def test_what_is_refused_is_not_kept(self) -> None:
        """After a refusal the step goes on from where it was."""
        parties = self.parties()
        session = self.session(parties)
        session.begin(bytes(32), 2, np.uint32)
        request = self.request(session, 0, "census")
        before = state_to_bytes(parties[0].store.load())
        for wrong in (
            replace(request, step=2),
            replace(request, boxes=b""),
            replace(request, active=b""),
        ):
            with pytest.raises(SecureSumError):
                parties[0].prepare(wrong)
        with pytest.raises(SecureSumError):
            parties[0].confirm(Confirm(1, 1, b"\x0f"))
        assert state_to_bytes(parties[0].store.load()) == before
        parties[0].prepare(request)

    def test_a_step_that_was_prepared_in_another_session_is_not_masked(self) -> None:
        """A slow answer must not carry old shares into a new session of the same number.

        They could be revealed a second time there: the row's where the self-mask's were before.
        """
        parties = self.parties()
        session = self.session(parties)
        session.begin(bytes(32), 2, np.uint32)
        slow = parties[0].prepare(self.request(session, 0, "update"))
        fast = parties[0].prepare(self.request(session, 0, "census"))
        fast_request = self.request(session, 0, "census")
        parties[0].mask(fast_request, fast, np.zeros(2, dtype=np.uint32), b"head")
        self.session(parties)
        with pytest.raises(SecureSumError, match="another session was set up meanwhile"):
            parties[0].mask(fast_request, slow, np.zeros(2, dtype=np.uint32), b"head")


def test_what_holds_secrets_has_no_text() -> None:
    """Neither a state nor a pair's keys tell a secret when somebody prints them."""
    session = World(4, 2).set_up().at(0)
    told = repr(session.state) + repr(session.state.pairs[1])
    assert "=" not in told
