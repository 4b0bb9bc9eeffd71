"""The coordinator's half of secure sums: what it takes, what it adds up, whom it blames."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.secure_sum import MerchantSession
from common.errors import SecureSumError
from common.identity import Identity, Members
from common.session import Advert, Escrow, accused, session_context, to_bitmap
from server.secure_sum import CoordinatorSession, groups
from tests.secure_world import ANSWER, ASKED, World, vectors_of

VECTORS = vectors_of(5, 6, np.uint32, 1)

Change = Callable[[bytes], bytes]


@pytest.fixture
def world() -> World:
    """Give five merchants in a session; four are enough."""
    return World(5, 3).set_up()


def flipped(raw: bytes, at: int, length: int = 1) -> bytes:
    """Return bytes with some of them changed."""
    return raw[:at] + bytes(byte ^ 0x55 for byte in raw[at : at + length]) + raw[at + length :]


class TestAdverts:
    """Keys that merchants send."""

    def test_only_the_merchants_own_advert_is_taken(self) -> None:
        """Enrolled, signed for this session, and sent by the node that attested the name."""
        world = World(3, 2)
        world.advertise()
        adverts = [world.merchants[name].advert for name in sorted(world.merchants)]
        fresh = CoordinatorSession(world.context, world.members, 2)
        with pytest.raises(SecureSumError, match="is not that of 'shop-001'"):
            fresh.take_advert(adverts[0], "shop-001")
        with pytest.raises(SecureSumError, match="'shop-000' is not enrolled with it"):
            fresh.take_advert(flipped(adverts[0], 10), "shop-000")
        other = CoordinatorSession(session_context("run", 2, "contract"), world.members, 2)
        with pytest.raises(SecureSumError, match="is not enrolled with it"):
            other.take_advert(adverts[0], "shop-000")
        stranger = MerchantSession.advertise(Identity.generate("x"), Members({}), 2, world.context)
        with pytest.raises(SecureSumError, match="'x' is not enrolled"):
            fresh.take_advert(stranger.advert, "x")
        assert [fresh.take_advert(raw, f"shop-00{n}") for n, raw in enumerate(adverts)] == [
            "shop-000",
            "shop-001",
            "shop-002",
        ]

    def test_a_second_advert_is_refused(self) -> None:
        """The first one stands; the same one again is no harm."""
        world = World(2, 2)
        world.advertise()
        first = world.merchants["shop-000"].advert
        world.coordinator.take_advert(first, "shop-000")
        second = MerchantSession.advertise(
            world.identities["shop-000"], world.members, 2, world.context
        )
        with pytest.raises(SecureSumError, match="gave another one before"):
            world.coordinator.take_advert(second.advert, "shop-000")
        assert world.coordinator.close_roster()[0] == first

    @settings(max_examples=100, deadline=None)
    @given(st.binary(max_size=300))
    def test_any_bytes_are_refused_with_a_reason(self, raw: bytes) -> None:
        """Never anything but a `SecureSumError`."""
        session = CoordinatorSession(bytes(32), Members({}), 2)
        with pytest.raises(SecureSumError):
            session.take_advert(raw, "shop")

    @pytest.mark.parametrize(
        "keys",
        [
            ("transport", "masking"),
            ("masking", "transport"),
            ("transport", "transport"),
            ("masking", "masking"),
        ],
    )
    def test_a_copied_key_is_refused(self, keys: tuple[str, str]) -> None:
        """Who signs another's public key is left out, and the others' session goes on."""
        world = World(4, 2)
        world.advertise({3: ("advertise", ANSWER)})
        own, victims = keys
        victim = Advert.from_bytes(world.merchants["shop-000"].advert)
        copied = {own: getattr(victim, victims)}
        with pytest.raises(SecureSumError, match="field 'advert': a key that is there already"):
            world.coordinator.take_advert(self.signed_anew(world, **copied), "shop-003")
        self.check_goes_on(world)

    def test_one_key_for_two_purposes_is_refused(self) -> None:
        """The roster would be one that nobody may join."""
        world = World(4, 2)
        world.advertise({3: ("advertise", ANSWER)})
        own = Advert.from_bytes(world.merchants["shop-003"].advert)
        with pytest.raises(SecureSumError, match="field 'advert': a key that is there already"):
            world.coordinator.take_advert(
                self.signed_anew(world, masking=own.transport), "shop-003"
            )
        self.check_goes_on(world)

    @pytest.mark.parametrize("key", [bytes(32), b"\x01" + bytes(31)], ids=["zero", "one"])
    @pytest.mark.parametrize("name", ["transport", "masking"])
    def test_a_key_of_low_order_is_refused(self, name: str, key: bytes) -> None:
        """Otherwise every honest merchant refuses the roster, and nobody is left."""
        world = World(4, 2)
        world.advertise({3: ("advertise", ANSWER)})
        with pytest.raises(SecureSumError, match="field 'advert': a key that gives no secret"):
            world.coordinator.take_advert(self.signed_anew(world, **{name: key}), "shop-003")
        self.check_goes_on(world)

    @staticmethod
    def signed_anew(world: World, **keys: bytes) -> bytes:
        """Return the advert of the last of four with other keys and a good signature."""
        unsigned = replace(Advert.from_bytes(world.merchants["shop-003"].advert), **keys)
        signature = world.identities["shop-003"].sign(unsigned.signed(world.context))
        return replace(unsigned, signature=signature).to_bytes()

    @staticmethod
    def check_goes_on(world: World) -> None:
        """Check that the first three of four sum without the last."""
        assert world.share() == []
        vectors = vectors_of(4, 3, np.uint32, 1)
        np.testing.assert_array_equal(world.sum(vectors), world.plain(vectors, [0, 1, 2]))


class TestOrder:
    """What is asked out of order is refused with a reason."""

    def test_without_a_roster_there_is_no_step(self) -> None:
        """Everything but adverts needs one."""
        session = CoordinatorSession(bytes(32), Members({}), 2)
        acts: list[Callable[[], object]] = [
            lambda: session.roster,
            lambda: session.needed,
            lambda: session.take_escrow(0, b""),
            lambda: session.begin(bytes(32), 1, np.uint32),
        ]
        for act in acts:
            with pytest.raises(SecureSumError, match="no roster yet"):
                act()

    def test_without_a_step_nothing_is_taken(self, world: World) -> None:
        """Before the first and after the last message of one."""
        session = world.coordinator
        acts: list[Callable[[], object]] = [
            lambda: session.request(0),
            lambda: session.take_masked(0, VECTORS[0], b""),
            session.close_sum,
            lambda: session.take_confirmations(0, b""),
            lambda: session.confirmations_for(0),
            lambda: session.take_shares(0, b""),
            session.total,
            lambda: session.step,
            lambda: session.active,
        ]
        for _ in range(2):
            for act in acts:
                with pytest.raises(SecureSumError, match="no step of this session is under way"):
                    act()
            world.sum(VECTORS)

    def test_too_few_escrows_begin_no_step(self) -> None:
        """The message says how many there are."""
        world = World(5, 3).set_up({0: ("share", ASKED), 1: ("share", ANSWER)})
        with pytest.raises(SecureSumError, match=r"3 members can take part.* 4 are needed"):
            world.update(VECTORS)

    def test_the_minimum_may_be_above_the_threshold(self) -> None:
        """Four of five would restore secrets, but the contract wants five."""
        world = World(5, 5).set_up()
        assert world.coordinator.needed == 5
        world.update(VECTORS, {0: ("update", ANSWER)})
        with pytest.raises(SecureSumError, match="4 masked vectors came, 5 are needed"):
            world.coordinator.close_sum()

    def test_steps_are_numbered_from_one(self, world: World) -> None:
        """And no number comes twice, also where a step failed."""
        for number in (1, 2, 3):
            world.update(VECTORS)
            assert world.coordinator.step == number
            if number == 2:
                world.confirm()
                world.reveal()


class TestVectors:
    """Masked vectors as they come."""

    def test_a_second_vector_is_refused(self, world: World) -> None:
        """The first is in the sum, and once."""
        world.update(VECTORS, {4: ("update", ANSWER)})
        masked, escrow = world.held[4]
        world.coordinator.take_masked(4, masked, escrow)
        with pytest.raises(SecureSumError, match="was not asked for, is there already, or is late"):
            world.coordinator.take_masked(4, masked, escrow)
        world.confirm()
        world.reveal()
        np.testing.assert_array_equal(
            world.coordinator.total(), world.plain(VECTORS, [0, 1, 2, 3, 4])
        )

    def test_who_was_not_asked_is_not_summed(self, world: World) -> None:
        """A member that is out sends in vain."""
        world.sum(VECTORS, {4: ("update", ANSWER)})
        world.update(VECTORS)
        with pytest.raises(SecureSumError, match="was not asked for"):
            world.coordinator.take_masked(4, VECTORS[4], world.held.get(4, (None, b""))[1])

    @pytest.mark.parametrize("position", [-1, 4, 5, 10**6])
    def test_strangers_send_in_vain(self, world: World, position: int) -> None:
        """One that is out and ones that never were: no stage takes anything of them."""
        world.update(VECTORS, {4: ("update", ANSWER)})
        masked, escrow = world.held[4]
        if position != 4:
            with pytest.raises(SecureSumError, match="field 'vector': was not asked for"):
                world.coordinator.take_masked(position, masked, escrow)
        world.confirm()
        with pytest.raises(SecureSumError, match="or is late"):
            world.coordinator.take_masked(position, masked, escrow)
        with pytest.raises(SecureSumError, match="field 'confirmations': were not asked for"):
            world.coordinator.take_confirmations(position, bytes(16 * 3))
        world.reveal()
        with pytest.raises(SecureSumError, match="field 'shares': were not asked for"):
            world.coordinator.take_shares(position, bytes(32 * 5))
        np.testing.assert_array_equal(world.coordinator.total(), world.plain(VECTORS, [0, 1, 2, 3]))
        assert world.coordinator.ready == [0, 1, 2, 3]

    def test_nobody_confirms_before_the_set_is_fixed(self, world: World) -> None:
        """A code for a set that may still grow would be for another set."""
        world.update(VECTORS)
        with pytest.raises(SecureSumError, match="field 'confirmations': were not asked for"):
            world.coordinator.take_confirmations(0, bytes(16 * 4))
        world.confirm()
        world.reveal()
        np.testing.assert_array_equal(world.coordinator.total(), world.plain(VECTORS, [*range(5)]))

    def test_who_did_not_confirm_reveals_nothing(self, world: World) -> None:
        """Its shares were not asked for."""
        world.update(VECTORS)
        world.confirm({4: ("confirm", ANSWER)})
        with pytest.raises(SecureSumError, match="field 'shares': were not asked for"):
            world.coordinator.take_shares(4, bytes(32 * 5))
        world.reveal()
        np.testing.assert_array_equal(world.coordinator.total(), world.plain(VECTORS, [*range(5)]))

    @pytest.mark.parametrize("kind", ["length", "type", "axes", "escrow"])
    def test_a_malformed_answer_leaves_no_trace(self, world: World, kind: str) -> None:
        """Its sender drops out; the sum of the others is right."""
        world.update(VECTORS, {4: ("update", ANSWER)})
        masked, escrow = world.held[4]
        vector = {
            "length": masked[:-1],
            "type": masked.astype(np.uint64),
            "axes": masked[None, :],
            "escrow": masked,
        }[kind]
        cut = escrow[:-1] if kind == "escrow" else escrow
        with pytest.raises(SecureSumError, match="expected"):
            world.coordinator.take_masked(4, vector, cut)
        world.confirm()
        world.reveal()
        np.testing.assert_array_equal(world.coordinator.total(), world.plain(VECTORS, [0, 1, 2, 3]))
        assert world.coordinator.ready == [0, 1, 2, 3]

    def test_answers_may_come_in_any_order(self, world: World) -> None:
        """The sum, its set and its confirmations are the same."""
        lost = {number: ("update", ANSWER) for number in range(5)}
        world.update(VECTORS, lost)
        for position in (3, 0, 4, 2, 1):
            world.coordinator.take_masked(position, *world.held[position])
        world.confirm()
        world.reveal()
        np.testing.assert_array_equal(
            world.coordinator.total(), world.plain(VECTORS, [0, 1, 2, 3, 4])
        )

    def test_what_is_taken_is_not_changed(self, world: World) -> None:
        """The total is a vector of its own."""
        world.update(VECTORS, {4: ("update", ANSWER)})
        masked, escrow = world.held[4]
        before = masked.copy()
        world.coordinator.take_masked(4, masked, escrow)
        world.confirm()
        world.reveal()
        world.coordinator.total()
        np.testing.assert_array_equal(masked, before)


class TestMalformed:
    """Confirmations and shares of the wrong length."""

    def test_their_senders_are_as_good_as_silent(self, world: World) -> None:
        """The sum of five needs four that confirm and reveal."""
        world.update(VECTORS)
        world.confirm({0: ("confirm", ASKED)})
        for raw in (b"", bytes(63), bytes(65)):
            with pytest.raises(SecureSumError, match="field 'confirmations'"):
                world.coordinator.take_confirmations(0, raw)
        assert world.coordinator.confirmed == [1, 2, 3, 4]
        world.reveal()
        with pytest.raises(SecureSumError, match="field 'shares'"):
            world.coordinator.take_shares(0, bytes(32 * 4))
        np.testing.assert_array_equal(
            world.coordinator.total(), world.plain(VECTORS, [0, 1, 2, 3, 4])
        )


class TestLiars:
    """Members that send something false are found, and no sum is wrong."""

    @staticmethod
    def revealed(world: World, liar: int, lie: Change, lost: int = 4) -> CoordinatorSession:
        """Take a step to its end; one member's shares are changed."""
        world.update(VECTORS, {lost: ("update", ANSWER)} if lost >= 0 else {})
        world.confirm()
        session = world.coordinator
        for position in session.confirmed:
            raw = world.at(position).reveal(1, *session.confirmations_for(position))
            session.take_shares(position, lie(raw) if position == liar else raw)
        return session

    @pytest.mark.parametrize("dealer", range(5))
    def test_a_false_share_is_passed_over(self, world: World, dealer: int) -> None:
        """With one holder to spare, the sum is right, and somebody is blamed."""
        session = self.revealed(world, 1, lambda raw: flipped(raw, 32 * dealer), lost=-1)
        np.testing.assert_array_equal(session.total(), world.plain(VECTORS, [0, 1, 2, 3, 4]))
        assert list(session.blamed) == [f"shop-001 or shop-00{dealer}"]

    def test_a_false_share_without_one_to_spare_ends_the_step(self, world: World) -> None:
        """No wrong sum comes of it, and the next step has everybody."""
        session = self.revealed(world, 1, lambda raw: flipped(raw, 0))
        with pytest.raises(SecureSumError, match="3 good shares of 'shop-000' were revealed"):
            session.total()
        assert session.ready == [0, 1, 2, 3]
        assert "shop-001 or shop-000" in session.blamed

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 159), st.binary(min_size=1, max_size=40), st.booleans())
    def test_whatever_is_revealed_no_sum_is_wrong(
        self, at: int, junk: bytes, somebody_lost: bool
    ) -> None:
        """The sum of the survivors, or an error."""
        world = _TWINS.snapshot()

        def lie(raw: bytes) -> bytes:
            return (raw[:at] + junk + raw[at + len(junk) :])[: len(raw)]

        session = self.revealed(world, 2, lie, lost=4 if somebody_lost else -1)
        survivors = [0, 1, 2, 3] if somebody_lost else [0, 1, 2, 3, 4]
        try:
            total = session.total()
        except SecureSumError:
            assert somebody_lost
        else:
            np.testing.assert_array_equal(total, world.plain(VECTORS, survivors))

    @staticmethod
    def dealt(change: Callable[[Escrow], Escrow], dealer: int = 1) -> World:
        """Set up a session in which one member's first escrow is changed."""
        world = World(5, 3)
        world.advertise()
        roster = world.coordinator.close_roster()
        for position, name in enumerate(world.roster):
            raw = world.merchants[name].share(roster)
            if position == dealer:
                raw = change(Escrow.from_bytes(raw, 5)).to_bytes()
            world.coordinator.take_escrow(position, raw)
        return world

    def test_who_breaks_its_commitment_is_named_and_put_out(self) -> None:
        """Shares that fit their digests and restore something else."""
        world = self.dealt(lambda e: replace(e, commitments=flipped(e.commitments, 0)))
        with pytest.raises(SecureSumError, match="'shop-001' dealt shares that do not belong"):
            world.sum(VECTORS)
        assert list(world.coordinator.blamed) == ["shop-001"]
        assert world.coordinator.ready == [0, 2, 3, 4]
        np.testing.assert_array_equal(world.sum(VECTORS), world.plain(VECTORS, [0, 2, 3, 4]))

    def test_who_deals_false_shares_to_all_is_put_out(self) -> None:
        """More bad shares than there can be liars are the dealer's."""
        world = self.dealt(lambda e: replace(e, digests=flipped(e.digests, 0, 80)))
        with pytest.raises(SecureSumError, match="good shares of 'shop-001' were revealed"):
            world.sum(VECTORS)
        assert world.coordinator.ready == [0, 2, 3, 4]
        np.testing.assert_array_equal(world.sum(VECTORS), world.plain(VECTORS, [0, 2, 3, 4]))

    def test_one_false_digest_is_passed_over(self) -> None:
        """One share fewer is one that can be missed."""
        world = self.dealt(lambda e: replace(e, digests=flipped(e.digests, 3 * 8, 8)))
        np.testing.assert_array_equal(world.sum(VECTORS), world.plain(VECTORS, [0, 1, 2, 3, 4]))
        assert list(world.coordinator.blamed) == ["shop-003 or shop-001"]

    @pytest.mark.parametrize(("part", "dealer"), [("row", 4), ("marks", 1)])
    def test_pairs_that_left_different_keys_are_named(self, part: str, dealer: int) -> None:
        """A row or a mark that is false ends the step of a member that is out, not a wrong sum."""

        def change(escrow: Escrow) -> Escrow:
            if part == "row":
                return replace(escrow, row=flipped(escrow.row, 32, 32))
            return replace(escrow, marks=flipped(escrow.marks, 8 * 4, 8))

        world = self.dealt(change, dealer)
        with pytest.raises(SecureSumError, match="'shop-001', 'shop-004' left different keys"):
            world.sum(VECTORS, {4: ("update", ANSWER)})
        assert list(world.coordinator.blamed) == ["'shop-001', 'shop-004'"]
        assert world.coordinator.conflicts == [(4, 1)]
        np.testing.assert_array_equal(world.sum(VECTORS), world.plain(VECTORS, [0, 1, 2, 3]))

    def test_a_false_row_does_no_harm_while_its_owner_is_there(self) -> None:
        """Nobody looks into it."""
        world = self.dealt(lambda e: replace(e, row=flipped(e.row, 0, 160)))
        np.testing.assert_array_equal(world.sum(VECTORS), world.plain(VECTORS, [0, 1, 2, 3, 4]))

    def test_a_false_confirmation_does_not_end_the_step_of_all(self, world: World) -> None:
        """Four right confirmations are enough, whatever the fifth member sends."""
        session = world.coordinator
        world.update(VECTORS)
        world.confirm()
        session.take_confirmations(2, bytes(16 * 4))
        for position in (0, 1, 3, 4):
            with pytest.raises(SecureSumError, match="'shop-002' did not confirm") as error:
                world.at(position).reveal(1, *session.confirmations_for(position))
            liar = accused(str(error.value))
            assert liar == "shop-002"
            bitmap, codes = session.confirmations_for(position, without={liar})
            assert bitmap == to_bitmap([0, 1, 3, 4], 5)
            session.take_shares(position, world.at(position).reveal(1, bitmap, codes))
        np.testing.assert_array_equal(session.total(), world.plain(VECTORS, [*range(5)]))

    def test_too_few_right_confirmations_reveal_nothing(self, world: World) -> None:
        """Leaving out liars does not lower what a merchant needs."""
        world.update(VECTORS)
        world.confirm()
        given = world.coordinator.confirmations_for(0, without={"shop-001", "shop-002"})
        with pytest.raises(SecureSumError, match="3 confirmations, 4 are needed"):
            world.at(0).reveal(1, *given)

    def test_who_is_put_out_is_in_the_sum_and_not_in_the_next(self, world: World) -> None:
        """Its vector had come; a name that is no member's changes nothing."""
        world.update(VECTORS)
        world.coordinator.put_out("shop-002")
        world.coordinator.put_out("nobody")
        world.confirm()
        world.reveal()
        np.testing.assert_array_equal(world.coordinator.total(), world.plain(VECTORS, [*range(5)]))
        assert world.coordinator.ready == [0, 1, 3, 4]
        np.testing.assert_array_equal(world.sum(VECTORS), world.plain(VECTORS, [0, 1, 3, 4]))


_TWINS = World(5, 3).set_up()


class TestGroups:
    """Merchants divided into sums of their own."""

    @settings(max_examples=300, deadline=None)
    @given(st.integers(0, 60), st.integers(1, 20), st.integers(0, 19))
    def test_as_many_merchants_in_as_few_groups_as_can_be(
        self, count: int, most: int, less: int
    ) -> None:
        """Compared with all numbers of groups; sizes differ by one at most."""
        fewest = max(1, most - less)
        names = [f"m{number:02d}" for number in range(count)]
        found = groups(names[::-1], most, fewest)
        taken = [name for group in found for name in group]
        assert len(set(taken)) == len(taken)
        assert set(taken) <= set(names)
        if count < fewest:  # one group that is too small, which its session will say
            assert found == [names]
            return
        sizes = [len(group) for group in found]
        assert fewest <= min(sizes) <= max(sizes) <= min(most, min(sizes) + 1)
        possible = [(min(n * most, count), -n) for n in range(1, count + 1) if n * fewest <= count]
        assert (len(taken), -len(found)) == max(possible)

    def test_who_comes_first_does_not_matter(self) -> None:
        """The same merchants are the same groups."""
        names = [f"m{number}" for number in range(9)]
        assert groups(names, 4, 2) == groups(reversed(names), 4, 2)
        assert all(group == sorted(group) for group in groups(names, 4, 2))
