"""Tokens, statements and signed lists."""

import base64
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.enrolment import (
    PREFIX,
    Enrolling,
    SignedList,
    Token,
    authority_statement,
    contract_statement,
    difference,
    fingerprint,
    grouped,
    is_gateway_url,
    members_statement,
    parse_list,
    parse_token,
    rotate_statement,
    signed,
)
from common.errors import EnrolmentError
from common.identity import MERCHANT_ID, Identity, Members
from common.rotation import sign_rotation

OPERATOR = Identity.generate("coordinator")
HEX = st.binary(min_size=32, max_size=32).map(bytes.hex)
IDS = st.from_regex(MERCHANT_ID, fullmatch=True).filter(lambda text: not text.endswith("\n"))
HOSTS = st.sampled_from(["127.0.0.1", "hansa.example.org", "[::1]", "a"])
URLS = st.builds("https://{}:{}".format, HOSTS, st.integers(1, 65535))
TOKENS = st.builds(Token, URLS, HEX, HEX, HEX, IDS, HEX)


@st.composite
def lists(draw: st.DrawFn) -> SignedList:
    """Draw a list that an operator could sign."""
    names = draw(st.lists(IDS, unique=True, max_size=6))
    keys = draw(st.sets(st.binary(min_size=32, max_size=32), min_size=len(names), max_size=6))
    members = dict(zip(names, keys, strict=False))
    gone = draw(st.lists(IDS.filter(lambda name: name not in members), unique=True, max_size=3))
    version = draw(st.integers(1, 2**40))
    at = st.integers(1, version)
    added = {name: draw(at) for name in members}
    return SignedList(version, members, added, {name: draw(at) for name in gone}, OPERATOR.public)


def spoken(listed: SignedList, by: Identity = OPERATOR) -> tuple[Any, str]:
    """Return what goes over the wire."""
    return json.loads(json.dumps(listed.document())), by.sign(listed.canonical()).hex()


LISTED = SignedList(
    3, {"a": b"\1" * 32, "b": b"\2" * 32}, {"a": 1, "b": 3}, {"c": 2}, OPERATOR.public
)


class TestToken:
    """One word that holds all that a merchant must know."""

    @given(TOKENS)
    def test_comes_back(self, token: Token) -> None:
        """What was written is what is read."""
        assert parse_token(f"  {token.text()}\n") == token

    @given(TOKENS, st.data())
    def test_a_changed_character_never_passes_unseen(
        self, token: Token, data: st.DataObject
    ) -> None:
        """It is refused, or it is another token."""
        text = token.text()
        place = data.draw(st.integers(0, len(text) - 1))
        other = data.draw(st.characters(min_codepoint=33, max_codepoint=126))
        changed = text[:place] + other + text[place + 1 :]
        try:
            found = parse_token(changed)
        except EnrolmentError as error:
            assert token.secret not in str(error)  # noqa: PT017
        else:
            assert found.text() == changed or found == token

    @given(st.text(max_size=60))
    def test_anything_else_is_refused(self, text: str) -> None:
        """With a sentence."""
        for given_text in (text, PREFIX + text):
            with pytest.raises(EnrolmentError):
                parse_token(given_text)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"v": 2}, "another version"),
            ({"secret": "ab"}, "secret is not 64"),
            ({"ca": "A" * 64}, "ca is not 64"),
            ({"operator": 3}, "operator is not 64"),
            ({"merchant": "../x"}, "no merchant id"),
            ({"url": "http://a:1"}, "not like https"),
            ({"url": "https://a:1/../x"}, "not like https"),
            ({"more": 1}, "does not hold"),
        ],
        ids=str,
    )
    def test_what_does_not_fit(self, change: dict[str, Any], words: str) -> None:
        """Is named."""
        token = Token("https://a:1", "0" * 64, "1" * 64, "2" * 64, "shop", "3" * 64)
        body = json.loads(base64.urlsafe_b64decode(token.text()[len(PREFIX) :] + "=="))
        text = PREFIX + base64.urlsafe_b64encode(json.dumps(body | change).encode()).decode()
        with pytest.raises(EnrolmentError, match=words):
            parse_token(text.rstrip("="))

    def test_too_long(self) -> None:
        """A book is no token."""
        with pytest.raises(EnrolmentError, match="no token"):
            parse_token(PREFIX + "A" * 5000)

    @pytest.mark.parametrize(
        "text",
        [
            "https://a", "https://:1", "https://a:0x1", "https://a:99999", "https://u@a:1",
            "https://a:1?x", "https://a:1#x", "https://a:01", "https:// a:1", "ftp://a:1",
        ],
    )  # fmt: skip
    def test_addresses(self, text: str) -> None:
        """Only a host and a port."""
        assert not is_gateway_url(text)


class TestStatements:
    """A signature for one purpose fits no other."""

    def test_all_differ(self) -> None:
        """The same values in another role are another message."""
        key, name, pem = b"\1" * 32, "shop", b"pem"
        asked = Enrolling(name, key, pem, "0" * 64)
        found = [
            contract_statement(key.hex()),
            authority_statement("pem", ""),
            authority_statement("", "pem"),
            asked.statement(key),
            members_statement(key, name, 1),
            members_statement(key, name, 11),
            rotate_statement(key, name, pem, 1),
            LISTED.canonical(),
        ]
        assert len(set(found)) == len(found)

    @pytest.mark.parametrize(
        "signature", [None, 3, "", "zz" * 64, "00" * 64, "0" * 127, b"\0" * 64]
    )
    def test_no_signature(self, signature: object) -> None:
        """Whatever comes instead of one is none."""
        assert not signed(OPERATOR.public, b"message", signature)

    def test_fingerprints(self) -> None:
        """Groups of four digits of SHA-256."""
        assert fingerprint(b"").startswith("e3b0 c442 98fc 1c14 ")
        assert grouped("012345") == "0123 45"
        assert len(fingerprint(b"x").split()) == 16


class TestSignedList:
    """Who takes part, as the operator says."""

    @given(lists())
    def test_comes_back(self, listed: SignedList) -> None:
        """What was signed is what is read."""
        assert parse_list(*spoken(listed), OPERATOR.public) == listed

    @given(lists(), st.data())
    def test_a_changed_list_is_refused(self, listed: SignedList, data: st.DataObject) -> None:
        """The signature covers every field."""
        document, signature = spoken(listed)
        field = data.draw(st.sampled_from(sorted(document)))
        other = data.draw(
            st.one_of(st.none(), st.integers(), st.text(), st.dictionaries(IDS, HEX, max_size=2))
        )
        if other == document[field]:
            return
        with pytest.raises(EnrolmentError):
            parse_list(document | {field: other}, signature, OPERATOR.public)

    def test_another_operator(self) -> None:
        """Cannot sign for the pinned one, even if it says so."""
        other = Identity.generate("coordinator")
        document, signature = spoken(LISTED, by=other)
        with pytest.raises(EnrolmentError, match="did not sign"):
            parse_list(document, signature, OPERATOR.public)
        with pytest.raises(EnrolmentError, match="did not sign"):
            parse_list(*spoken(LISTED), other.public)

    @pytest.mark.parametrize("document", [None, [], "x", {}, {"version": 1}])
    def test_something_else(self, document: object) -> None:
        """Is no list."""
        with pytest.raises(EnrolmentError, match="no list"):
            parse_list(document, "00" * 64, OPERATOR.public)

    def test_a_key_that_was_given_up(self) -> None:
        """Cannot be a member's again, though the operator signs it."""
        old, new = (Identity.generate("a") for _ in range(2))
        statement = sign_rotation("a", old, new, 1)
        listed = SignedList(4, {"a": old.public}, {"a": 4}, {}, OPERATOR.public, (statement,))
        with pytest.raises(EnrolmentError, match="given up is in use again"):
            parse_list(*spoken(listed), OPERATOR.public)

    def test_a_forged_rotation(self) -> None:
        """One that the old key did not sign is refused."""
        old, new = (Identity.generate("a") for _ in range(2))
        statement = replace(sign_rotation("a", old, new, 1), by_old=bytes(64))
        listed = SignedList(4, {"a": new.public}, {"a": 4}, {}, OPERATOR.public, (statement,))
        with pytest.raises(EnrolmentError, match="not signed with its old key"):
            parse_list(*spoken(listed), OPERATOR.public)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"version": True}, "no version"),
            ({"version": -1}, "no version"),
            ({"version": 2**53}, "no version"),
            ({"added": {"a": 1}}, "contradicts"),
            ({"added": {"a": 1, "b": 4}}, "versions"),
            ({"added": {"a": 1, "b": 0}}, "versions"),
            ({"revoked": {"a": 1}}, "contradicts"),
            ({"revoked": {"../": 1}}, "ids of merchants"),
            ({"members": {"a": "01" * 32, "b": "01" * 32}}, "one key twice"),
            ({"members": {"a": "01", "b": "02" * 32}}, "64 hexadecimal"),
            ({"members": []}, "ids of merchants"),
            ({"witness": "03" * 32}, "did not sign"),
            ({"rotations": None}, "'rotations' is no list"),
            ({"rotations": [{}]}, "expected a rotation"),
        ],
        ids=str,
    )
    def test_what_contradicts_itself(self, change: dict[str, Any], words: str) -> None:
        """Is refused whoever signed it."""
        document, signature = spoken(LISTED)
        with pytest.raises(EnrolmentError, match=words):
            parse_list(document | change, signature, OPERATOR.public)


class TestDifference:
    """What a newer list says that the pinned one does not."""

    def test_is_named(self) -> None:
        """Added, removed and changed."""
        old = Members({"a": b"\1" * 32, "b": b"\3" * 32, "c": b"\4" * 32}, OPERATOR.public)
        found = difference(old, 2, LISTED)
        assert (found.added, set(found.removed)) == ({}, {"c"})
        assert found.changed == {"b": (b"\3" * 32, b"\2" * 32)}
        assert bool(found)
        later = difference(Members({}, OPERATOR.public), 0, LISTED)
        assert later.added == LISTED.members

    def test_a_key_that_its_owner_replaced(self) -> None:
        """Is told apart from one that nothing proves."""
        old, new, other = (Identity.generate("a") for _ in range(3))
        statement = sign_rotation("a", old, new, 1)
        listed = SignedList(
            4, {"a": new.public}, {"a": 4}, {}, OPERATOR.public, rotations=(statement,)
        )
        again = parse_list(*spoken(listed), OPERATOR.public)
        assert again == listed
        found = difference(Members({"a": old.public}, OPERATOR.public), 3, again)
        assert (found.changed, found.rotated) == ({}, {"a": (old.public, new.public)})
        assert bool(found)
        found = difference(Members({"a": other.public}, OPERATOR.public), 3, again)
        assert (set(found.changed), found.rotated) == ({"a"}, {})
        assert again.pinned().keys_of("a") == (old.public, new.public)

    def test_the_same(self) -> None:
        """Nothing."""
        assert not difference(LISTED.pinned(), 3, LISTED)

    def test_a_lower_version(self) -> None:
        """Is the past, even if nothing in it differs."""
        with pytest.raises(EnrolmentError, match=r"version 3, older than the pinned 4"):
            difference(LISTED.pinned(), 4, LISTED)

    def test_two_lists_of_one_version(self) -> None:
        """Show an operator that says different things to different merchants."""
        with pytest.raises(EnrolmentError, match="same version 3"):
            difference(Members({"a": b"\1" * 32}, OPERATOR.public), 3, LISTED)

    def test_another_witness(self) -> None:
        """Is never followed."""
        with pytest.raises(EnrolmentError, match="another witness"):
            difference(Members(LISTED.members, b"\7" * 32), 1, LISTED)
