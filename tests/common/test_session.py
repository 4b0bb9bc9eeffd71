"""What both halves agree on: adverts, rosters, escrows, contexts and sets of members."""

from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.contract import MAX_COHORT
from common.errors import SecureSumError
from common.identity import Identity
from common.session import (
    MIN_COHORT,
    Advert,
    Escrow,
    Roster,
    accusation,
    accused,
    direction,
    from_bitmap,
    mark,
    occasion_hash,
    pair_secret_info,
    parts,
    session_context,
    share_digest,
    step_context,
    survivors_statement,
    threshold,
    to_bitmap,
)

CONTEXT = session_context("run", 1, "contract")


def advert(name: str, seed: int) -> Advert:
    """Return an advert with keys that depend on a seed."""
    transport, masking = (bytes([kind, *seed.to_bytes(31, "big")]) for kind in (1, 2))
    return Advert(name, transport, masking, bytes([3] * 32), bytes(64))


def adverts(count: int) -> tuple[Advert, ...]:
    """Return adverts in order."""
    return tuple(advert(f"shop-{number:03d}", number) for number in range(count))


class TestThreshold:
    """How many restore a secret."""

    @pytest.mark.parametrize("members", range(MIN_COHORT, MAX_COHORT + 1))
    def test_two_sets_share_more_than_a_third(self, members: int) -> None:
        """Two different sums need more than a third to lie; no smaller number would do."""
        found = threshold(members)
        assert 3 * (2 * found - members) > members
        assert 3 * (2 * (found - 1) - members) <= members
        assert found <= members


class TestAdvert:
    """A merchant's keys for a session."""

    @settings(max_examples=50, deadline=None)
    @given(
        name=st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z"),
        keys=st.tuples(*[st.binary(min_size=size, max_size=size) for size in (32, 32, 32, 64)]),
    )
    def test_it_comes_back(self, name: str, keys: tuple[bytes, bytes, bytes, bytes]) -> None:
        """Whatever keys, head and signature are."""
        one = Advert(name, *keys)
        assert Advert.from_bytes(one.to_bytes()) == one

    @settings(max_examples=200, deadline=None)
    @given(st.one_of(st.binary(max_size=300), st.binary(max_size=4).map(lambda b: b + bytes(160))))
    def test_any_bytes_are_read_or_refused(self, raw: bytes) -> None:
        """And what is read is the only reading."""
        with suppress(SecureSumError):
            assert Advert.from_bytes(raw).to_bytes() == raw

    @pytest.mark.parametrize(
        "name", [b"", b"a b", b"-a", b"a" * 65, b"a\n", "é".encode(), b"\xff", b"a\0", b"a/b"]
    )
    def test_names_that_are_none_are_refused(self, name: bytes) -> None:
        """Ids that no members.toml could hold."""
        with pytest.raises(SecureSumError, match="is no advert of a merchant"):
            Advert.from_bytes(name + bytes(160))

    def test_a_signature_binds_the_session_the_name_both_keys_and_the_head(self) -> None:
        """Each change gives another message to sign."""
        one = advert("shop", 1)
        changed = [
            one.signed(session_context("run", 2, "contract")),
            replace(one, merchant="shop2").signed(CONTEXT),
            replace(one, transport=bytes(32)).signed(CONTEXT),
            replace(one, masking=bytes(32)).signed(CONTEXT),
            replace(one, transport=one.masking, masking=one.transport).signed(CONTEXT),
            replace(one, head=bytes(32)).signed(CONTEXT),
            replace(one, masking=one.head, head=one.masking).signed(CONTEXT),
            one.signed(CONTEXT),
        ]
        assert len(set(changed)) == len(changed)

    def test_a_real_advert_is_as_short_as_the_docs_say(self) -> None:
        """Id, two keys, a ledger's head, a signature."""
        identity = Identity.generate("shop")
        one = advert("shop", 1)
        signed = replace(one, signature=identity.sign(one.signed(CONTEXT)))
        assert len(signed.to_bytes()) == len("shop") + 160


class TestRoster:
    """The members of a session."""

    @pytest.mark.parametrize("count", [MIN_COHORT, 3, MAX_COHORT])
    def test_a_roster_of_two_to_two_hundred(self, count: int) -> None:
        """Size and threshold follow from the adverts."""
        roster = Roster(CONTEXT, adverts(count))
        assert (roster.size, roster.threshold) == (count, threshold(count))

    @pytest.mark.parametrize("count", [0, 1, MAX_COHORT + 1])
    def test_too_few_or_too_many(self, count: int) -> None:
        """The message says how many there are and how many there may be."""
        with pytest.raises(SecureSumError, match=f"{count} members; a secure sum needs 2 to 200"):
            Roster(CONTEXT, adverts(count))

    def test_the_order_is_that_of_the_ids(self) -> None:
        """One form only: another order is refused, and so is an id given twice."""
        one, two, three = adverts(3)
        for wrong in (
            (two, one, three),
            (one, three, two),
            (one, replace(two, merchant="shop-000")),
        ):
            with pytest.raises(SecureSumError, match="must be sorted and differ"):
                Roster(CONTEXT, wrong)

    def test_keys_are_different(self) -> None:
        """Among all keys of all members, and between the two of one."""
        one, two = adverts(2)
        for wrong in (
            (one, replace(two, transport=one.transport)),
            (one, replace(two, masking=one.masking)),
            (one, replace(two, masking=one.transport)),
            (one, replace(two, masking=two.transport)),
        ):
            with pytest.raises(SecureSumError, match="equal key"):
                Roster(CONTEXT, wrong)

    def test_its_hash_binds_everything(self) -> None:
        """Context, ids, keys, signatures and number of members."""
        three = adverts(3)
        rosters = [
            Roster(CONTEXT, three),
            Roster(session_context("run", 2, "contract"), three),
            Roster(CONTEXT, three[:2]),
            Roster(CONTEXT, (*three[:2], replace(three[2], merchant="shop-003"))),
            Roster(CONTEXT, (*three[:2], replace(three[2], transport=bytes(32)))),
            Roster(CONTEXT, (*three[:2], replace(three[2], masking=bytes(32)))),
            Roster(CONTEXT, (*three[:2], replace(three[2], signature=b"\1" * 64))),
        ]
        assert len({roster.hash for roster in rosters}) == len(rosters)

    def test_names_are_for_people(self) -> None:
        """In the order of positions, quoted."""
        assert Roster(CONTEXT, adverts(3)).names([2, 0]) == "'shop-000', 'shop-002'"


class TestEscrow:
    """What a member leaves with the others."""

    @settings(max_examples=30, deadline=None)
    @given(st.integers(2, 20), st.integers(0, 2**32))
    def test_it_comes_back(self, members: int, seed: int) -> None:
        """Every part where it was."""
        raw = np.random.default_rng(seed).bytes(136 * members + 64)
        escrow = Escrow.from_bytes(raw, members)
        assert escrow.to_bytes() == raw
        assert b"".join(escrow.box(position) for position in range(members)) == escrow.boxes
        sizes = [len(part) for part in vars(escrow).values()]
        assert sizes == [80 * members, 32 * members, 8 * members, 16 * members, 64]

    @pytest.mark.parametrize("length", [0, 63, 64, 335, 337, 136 * 3 + 64])
    def test_another_length_is_refused(self, length: int) -> None:
        """The message says which was expected."""
        with pytest.raises(SecureSumError, match=f"expected 336 bytes for 2 members, got {length}"):
            Escrow.from_bytes(bytes(length), 2)


class TestContexts:
    """Hashes that keys depend on."""

    def test_a_session_is_named_by_run_number_and_contract(self) -> None:
        """Parts do not run into each other."""
        found = {
            session_context("run", 1, "contract"),
            session_context("run", 2, "contract"),
            session_context("ru", 1, "ncontract"),
            session_context("runc", 1, "ontract"),
            session_context("", 1, "runcontract"),
        }
        assert len(found) == 5

    def test_an_occasion_is_all_that_a_step_sums(self) -> None:
        """Stage, round, attempt, customers and every bit of the model."""
        model = np.array([1.0, 2.0])
        found = {
            occasion_hash("update", 1, 0, 50.0, model),
            occasion_hash("census", 1, 0, 50.0, model),
            occasion_hash("update", 2, 0, 50.0, model),
            occasion_hash("update", 1, 1, 50.0, model),
            occasion_hash("update", 1, 0, 50.5, model),
            occasion_hash("update", 1, 0, 50.0, np.array([1.0, np.nextafter(2.0, 3.0)])),
            occasion_hash("update", 1, 0, 50.0, np.array([1.0, 2.0, 0.0])),
            occasion_hash("update", 1, 0, 50.0, np.zeros(0)),
        }
        assert len(found) == 8

    def test_a_step_is_bound_to_roster_number_occasion_and_members(self) -> None:
        """Each of them changes every mask of the step."""
        hashes = [bytes([number]) * 32 for number in range(3)]
        found = {
            step_context(hashes[0], 1, hashes[1], frozenset({0, 1})),
            step_context(hashes[2], 1, hashes[1], frozenset({0, 1})),
            step_context(hashes[0], 2, hashes[1], frozenset({0, 1})),
            step_context(hashes[0], 1, hashes[2], frozenset({0, 1})),
            step_context(hashes[0], 1, hashes[1], frozenset({0, 1, 2})),
        }
        assert len(found) == 5

    def test_sets_have_one_statement(self) -> None:
        """The order in which a set was made does not matter; its members do."""
        context = bytes(32)
        one = survivors_statement(context, frozenset([3, 1, 2]))
        assert one == survivors_statement(context, frozenset([2, 3, 1]))
        assert one != survivors_statement(context, frozenset([1, 2]))
        assert one != survivors_statement(bytes([1]) * 32, frozenset([1, 2, 3]))

    def test_both_of_a_pair_agree_and_directions_differ(self) -> None:
        """Pair keys are common; box and confirmation keys are not."""
        assert pair_secret_info(3, 7, 2) == pair_secret_info(7, 3, 2)
        assert pair_secret_info(3, 7, 2) != pair_secret_info(3, 7, 3)
        assert direction(b"box", 3, 7) != direction(b"box", 7, 3)

    def test_marks_and_digests_are_not_each_others(self) -> None:
        """The same bytes as a key and as a share have different marks."""
        assert mark(bytes(32)) != share_digest(bytes(32))
        assert len(mark(bytes(32))) == len(share_digest(bytes(32))) == 8


class TestAccused:
    """Whom a refusal accuses."""

    @pytest.mark.parametrize("field", ["boxes", "confirmations"])
    @pytest.mark.parametrize("name", ["s", "shop-001", "x" * 64])
    def test_what_was_written_is_read_whatever_is_around_it(self, field: str, name: str) -> None:
        """Flower hands over an exception as text, with its type and more."""
        text = str(accusation(field, name, "left something that is not authentic"))
        assert accused(text) == name
        assert accused(f'error 500: SecureSumError("{text}")\n  at line 3') == name

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "no answer within 1 s",
            "field 'boxes': expected 80 bytes, got 0",
            "field 'active': 'shop-001' cannot be in it; who is out stays out",
            "field 'step': step 2 is not under way",
            "'shop-001' left a box",
            "field 'boxes': ''",
            f"field 'boxes': '{'x' * 65}' left a box",
            "field 'boxes' : 'shop-001'",
        ],
    )
    def test_every_other_refusal_accuses_nobody(self, text: str) -> None:
        """Above all one that names a member for another reason."""
        assert accused(text) is None

    def test_one_refusal_accuses_one(self) -> None:
        """The first that it names; a liar cannot accuse everybody at once."""
        texts = [str(accusation("boxes", name, "lied")) for name in ("one", "two")]
        assert accused("; ".join(texts)) == "one"


class TestBitmaps:
    """Sets of members as bits."""

    @settings(max_examples=200, deadline=None)
    @given(st.integers(2, 200), st.data())
    def test_a_set_comes_back(self, members: int, data: st.DataObject) -> None:
        """In the fewest bytes."""
        chosen = data.draw(st.frozensets(st.integers(0, members - 1)))
        raw = to_bitmap(chosen, members)
        assert len(raw) == (members + 7) // 8
        assert from_bitmap(raw, members, "x") == chosen

    @settings(max_examples=200, deadline=None)
    @given(st.integers(2, 200), st.binary(max_size=26))
    def test_any_bytes_are_read_or_refused(self, members: int, raw: bytes) -> None:
        """And what is read has no other form."""
        with suppress(SecureSumError):
            assert to_bitmap(from_bitmap(raw, members, "active"), members) == raw

    def test_the_lowest_position_is_the_lowest_bit(self) -> None:
        """Byte by byte."""
        assert to_bitmap([0, 2, 9], 10) == bytes([0b101, 0b10])

    @pytest.mark.parametrize("position", range(10, 16))
    def test_bits_of_nobody_are_refused(self, position: int) -> None:
        """Beyond the last member there is none."""
        raw = bytearray(2)
        raw[1] = 1 << (position - 8)
        with pytest.raises(SecureSumError, match="names a position that no member has"):
            from_bitmap(bytes(raw), 10, "survivors")

    @pytest.mark.parametrize("length", [0, 1, 3])
    def test_another_length_is_refused(self, length: int) -> None:
        """Too short as well as too long."""
        with pytest.raises(SecureSumError, match="expected a bitmap of 10 members"):
            from_bitmap(bytes(length), 10, "survivors")


class TestParts:
    """Lists of equal parts."""

    def test_they_are_cut_in_order(self) -> None:
        """And none is left."""
        assert list(parts(b"aabbcc", 2, 3, "x")) == [b"aa", b"bb", b"cc"]
        assert list(parts(b"", 2, 0, "x")) == []

    @pytest.mark.parametrize("raw", [b"", b"aabbc", b"aabbccd", b"aabbccdd"])
    def test_another_length_is_refused(self, raw: bytes) -> None:
        """The message names the field and both lengths."""
        with pytest.raises(SecureSumError, match=rf"field 'x': expected 6 bytes, got {len(raw)}"):
            parts(raw, 2, 3, "x")
