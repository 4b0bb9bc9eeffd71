"""What the operator answers, without HTTP."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from clients.preparing import Keys, read_keys
from common.contract import Contract, contract_toml, parse_contract
from common.enrolment import (
    authority_statement,
    contract_statement,
    members_statement,
    parse_list,
    rotate_statement,
    signed,
)
from common.errors import EnrolmentError, HansaError, SettingsError, SuperLinkError, WireError
from common.identity import Identity
from common.rotation import WITNESS, sign_rotation
from server.certificates import announce_next
from server.enrolling import open_desk
from simulations.datasets import load
from tests.enrolment_world import World, make_world, merchant_folder


@pytest.fixture(scope="session")
def agreed() -> Contract:
    """Give a contract."""
    return load("synthetic", preset="smoke", merchants=3).contract


@pytest.fixture
def world(tmp_path: Path, agreed: Contract) -> World:
    """Make an operator."""
    return make_world(tmp_path / "operator", agreed)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, agreed: Contract) -> World:
    """Make one operator for all examples of a test."""
    return make_world(tmp_path_factory.mktemp("shared") / "operator", agreed)


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    """Make a merchant called `shop`."""
    return read_keys(merchant_folder(tmp_path / "shop"))


def say(world: World, question: str, fields: object) -> dict[str, Any]:
    """Ask as the gateway does; what comes back went through JSON."""
    answer = world.desk.answer(question, json.dumps(fields).encode())
    found: dict[str, Any] = json.loads(json.dumps(answer))
    return found


def members_request(world: World, keys: Keys, at: float, merchant: str = "shop") -> dict[str, Any]:
    """Return a member's request for the list."""
    statement = members_statement(world.operator, merchant, int(at))
    signature = keys.identity.sign(statement).hex()
    return {"merchant": merchant, "at": int(at), "signature": signature}


def rotate_request(world: World, keys: Keys, node: bytes, at: float) -> dict[str, Any]:
    """Return a member's request for another node key."""
    statement = rotate_statement(world.operator, "shop", node, int(at))
    signature = keys.identity.sign(statement).hex()
    return {"merchant": "shop", "node": node.decode(), "at": int(at), "signature": signature}


def public_pem(curve: ec.EllipticCurve | None = None) -> bytes:
    """Return a new public key."""
    return spki(ec.generate_private_key(curve or ec.SECP384R1()).public_key())


def spki(key: ec.EllipticCurvePublicKey | Ed25519PublicKey) -> bytes:
    """Return a public key as PEM."""
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


class TestEnrolling:
    """A token, two public keys and a proof."""

    def test_a_good_request(self, world: World, keys: Keys) -> None:
        """Gets contract and list, signed; the node is let in."""
        answer = say(world, "enrol", world.request(world.token("shop"), keys))
        listed = parse_list(answer["list"], answer["signature"], world.operator)
        assert listed.members == {"shop": keys.identity.public}
        import tomllib

        contract = parse_contract(tomllib.loads(answer["contract"]), source="answer")
        assert contract == world.contract
        statement = contract_statement(contract.sha256)
        assert signed(world.operator, statement, answer["contract_signature"])
        assert list(world.nodes.ids) == [keys.node]
        assert world.registry.nodes() == {world.nodes.ids[keys.node]: "shop"}

    def test_an_offer(self, world: World, keys: Keys) -> None:
        """Shows the same and uses nothing."""
        token = world.token("shop")
        for _ in range(2):
            answer = say(world, "offer", {"secret": token.secret, "merchant": "shop"})
            assert parse_list(answer["list"], answer["signature"], world.operator).version == 0
        say(world, "enrol", world.request(token, keys))
        with pytest.raises(EnrolmentError, match="was used already"):
            say(world, "offer", {"secret": token.secret, "merchant": "shop"})

    def test_a_token_used_twice(self, world: World, keys: Keys, tmp_path: Path) -> None:
        """Is refused to whoever comes second."""
        token = world.token("shop")
        say(world, "enrol", world.request(token, keys))
        thief = read_keys(merchant_folder(tmp_path / "thief" / "shop"))
        with pytest.raises(EnrolmentError, match="was used already"):
            say(world, "enrol", world.request(token, thief))
        assert list(world.nodes.ids) == [keys.node]

    def test_an_expired_token(self, world: World, keys: Keys) -> None:
        """Is refused."""
        token = world.token("shop", hours=1)
        world.clock.at += 3600
        with pytest.raises(EnrolmentError, match="too old"):
            say(world, "enrol", world.request(token, keys))

    def test_another_merchants_token(self, world: World, keys: Keys) -> None:
        """Is refused."""
        token = world.token("other")
        with pytest.raises(EnrolmentError, match="another merchant's"):
            say(world, "offer", {"secret": token.secret, "merchant": "shop"})
        assert world.nodes.ids == {}

    @pytest.mark.parametrize("field", ["identity", "node", "merchant", "secret"])
    def test_a_proof_of_something_else(self, world: World, keys: Keys, field: str) -> None:
        """Nobody can put another key, id or token beside a proof that it saw."""
        token, other = world.token("shop"), world.token("other")
        value = {
            "identity": Identity.generate("x").public.hex(),
            "node": public_pem().decode(),
            "merchant": "other",
            "secret": other.secret,
        }[field]
        with pytest.raises(EnrolmentError, match="proof does not fit"):
            say(world, "enrol", world.request(token, keys, **{field: value}))
        assert world.nodes.ids == {}

    def test_a_proof_for_another_operator(
        self, world: World, keys: Keys, tmp_path: Path, agreed: Contract
    ) -> None:
        """Is worth nothing here: an operator cannot pass it on."""
        evil = make_world(tmp_path / "evil", agreed)
        token = world.token("shop")
        with pytest.raises(EnrolmentError, match="proof does not fit"):
            say(world, "enrol", evil.request(token, keys))

    def test_a_superlink_that_is_down(self, world: World, keys: Keys) -> None:
        """Is said; the token stays unused."""
        token, world.nodes.down = world.token("shop"), True
        with pytest.raises(SuperLinkError):
            say(world, "enrol", world.request(token, keys))
        world.nodes.down = False
        assert say(world, "enrol", world.request(token, keys))["list"]["version"] == 1

    @pytest.mark.parametrize(
        "node",
        [
            "",
            "ssh-ed25519 AAAA",
            public_pem(ec.SECP256R1()).decode(),
            spki(Identity.generate("x").key.public_key()).decode(),
            "-----BEGIN PUBLIC KEY-----\n" + "A" * 100_000,
            "ü",
        ],
        ids=["empty", "ssh", "p256", "ed25519", "huge", "letters"],
    )  # fmt: skip
    def test_a_node_key_that_is_none(self, world: World, keys: Keys, node: str) -> None:
        """Is refused before anything is looked up."""
        with pytest.raises(WireError, match="field 'node'"):
            say(world, "enrol", world.request(world.token("shop"), keys, node=node))


class TestMembers:
    """The list, for members only."""

    @pytest.fixture(autouse=True)
    def _enrolled(self, world: World, keys: Keys) -> None:
        say(world, "enrol", world.request(world.token("shop"), keys))

    def test_a_member(self, world: World, keys: Keys) -> None:
        """Gets it, signed, with the authority that signs the server."""
        answer = say(world, "members", members_request(world, keys, world.clock()))
        assert parse_list(answer["list"], answer["signature"], world.operator).version == 1
        statement = authority_statement(answer["ca_pem"], answer["next_ca_pem"])
        assert signed(world.operator, statement, answer["ca_signature"])
        assert answer["next_ca_pem"] == ""
        assert "contract" not in answer

    @pytest.mark.parametrize(("apart", "word"), [(301, "behind"), (-301, "ahead"), (86400, "")])
    def test_an_old_request(self, world: World, keys: Keys, apart: int, word: str) -> None:
        """Is refused: it may be a replay; the difference of the clocks is told to its signer."""
        request = members_request(world, keys, world.clock() - apart)
        with pytest.raises(EnrolmentError, match=rf"{abs(apart)} s {word}.*set your clock"):
            say(world, "members", request)

    def test_a_stranger(self, world: World) -> None:
        """Learns nothing, not even who is a member."""
        stranger = Keys(Identity.generate("shop"), b"")
        told = set()
        for merchant in ("shop", "nobody"):
            with pytest.raises(EnrolmentError) as refusal:
                say(world, "members", members_request(world, stranger, world.clock(), merchant))
            told.add(str(refusal.value))
        assert len(told) == 1

    def test_a_revoked_merchant(self, world: World, keys: Keys) -> None:
        """Is a stranger from now on."""
        world.registry.revoke("shop")
        for question, request in (
            ("members", members_request(world, keys, world.clock())),
            ("rotate", rotate_request(world, keys, public_pem(), world.clock())),
        ):
            with pytest.raises(EnrolmentError, match="not signed by the identity of a member"):
                say(world, question, request)

    def test_a_signature_for_another_question(self, world: World, keys: Keys) -> None:
        """Does not fit."""
        asked = members_request(world, keys, world.clock())
        node = public_pem().decode()
        with pytest.raises(EnrolmentError, match="not signed"):
            say(world, "rotate", asked | {"node": node})

    def test_an_announced_authority(self, world: World, keys: Keys) -> None:
        """Is in the answer, and who heard of it is remembered."""
        announce_next(world.settings.tls, "next")
        answer = say(world, "members", members_request(world, keys, world.clock()))
        assert answer["next_ca_pem"].startswith("-----BEGIN CERTIFICATE-----")
        from server.certificates import pem_sha256

        assert world.registry.untold(pem_sha256(answer["next_ca_pem"])) == []


class TestRotating:
    """Another node key."""

    @pytest.fixture(autouse=True)
    def _enrolled(self, world: World, keys: Keys) -> None:
        say(world, "enrol", world.request(world.token("shop"), keys))

    def test_a_new_key(self, world: World, keys: Keys) -> None:
        """Is let in, the old one no longer."""
        old, node = world.nodes.ids[keys.node], public_pem()
        say(world, "rotate", rotate_request(world, keys, node, world.clock()))
        assert world.registry.nodes() == {world.nodes.ids[node]: "shop"}
        assert world.nodes.gone == [old]

    def test_a_replayed_request(self, world: World, keys: Keys) -> None:
        """Cannot bring an older key back."""
        first = rotate_request(world, keys, public_pem(), world.clock())
        say(world, "rotate", first)
        say(world, "rotate", rotate_request(world, keys, public_pem(), world.clock() + 1))
        with pytest.raises(EnrolmentError, match="older than one that was answered"):
            say(world, "rotate", first)

    def test_a_superlink_that_is_down(self, world: World, keys: Keys) -> None:
        """Leaves the old key in."""
        before, world.nodes.down = world.registry.nodes(), True
        with pytest.raises(SuperLinkError):
            say(world, "rotate", rotate_request(world, keys, public_pem(), world.clock()))
        assert world.registry.nodes() == before


class TestIdentity:
    """Another identity key."""

    @pytest.fixture(autouse=True)
    def _enrolled(self, world: World, keys: Keys) -> None:
        say(world, "enrol", world.request(world.token("shop"), keys))

    def test_a_new_key(self, world: World, keys: Keys) -> None:
        """Speaks for the merchant from now on, and the old one no longer."""
        new = replace(keys, identity=Identity.generate("shop"))
        statement = sign_rotation("shop", keys.identity, new.identity, 1)
        for _ in range(2):
            answer = say(world, "identity", {"rotation": statement.document})
            listed = parse_list(answer["list"], answer["signature"], world.operator)
            assert (listed.version, listed.members) == (2, {"shop": new.identity.public})
            assert listed.rotations == (statement,)
        say(world, "members", members_request(world, new, world.clock()))
        with pytest.raises(EnrolmentError, match="not signed"):
            say(world, "members", members_request(world, keys, world.clock()))
        assert world.desk.witness.rotations() == (statement,)

    def test_a_stranger(self, world: World, keys: Keys) -> None:
        """Cannot put its key in the place of a member's."""
        thief, new = Identity.generate("shop"), Identity.generate("shop")
        unsigned = replace(sign_rotation("shop", thief, new, 1), old=keys.identity.public)
        for statement, words in (
            (sign_rotation("shop", thief, new, 1), "another key than its old"),
            (unsigned, "not signed with its old key"),
            (sign_rotation(WITNESS, thief, new, 1), "operator's own key"),
            (sign_rotation("nobody", thief, new, 1), "another key than its old"),
        ):
            with pytest.raises(EnrolmentError, match=words):
                say(world, "identity", {"rotation": statement.document})
        assert world.registry.version == 1

    @pytest.mark.parametrize("rotation", [{}, {"merchant": "shop"}], ids=str)
    def test_something_else(self, world: World, rotation: dict[str, str]) -> None:
        """Is told."""
        with pytest.raises(EnrolmentError, match="expected a rotation"):
            say(world, "identity", {"rotation": rotation})
        with pytest.raises(WireError, match="expected an object"):
            say(world, "identity", {"rotation": 3})


class TestRequests:
    """What comes from outside."""

    @pytest.mark.parametrize("question", ["offer", "enrol", "members", "rotate"])
    @pytest.mark.parametrize(
        "body",
        [b"", b"[]", b"null", b"{", b"\xff", b'{"merchant": 1}', b"[" * 50_000, b'"x"', b"1e999"],
        ids=["none", "list", "null", "cut", "bytes", "number", "deep", "text", "infinite"],
    )
    def test_malformed(self, world: World, question: str, body: bytes) -> None:
        """Is told in one sentence."""
        with pytest.raises(WireError, match="expected a JSON object"):
            world.desk.answer(question, body)

    @pytest.mark.parametrize("question", ["", "ca", "revoke", "__class__"])
    def test_unknown_questions(self, world: World, question: str) -> None:
        """Have no answer."""
        with pytest.raises(WireError, match="no question"):
            world.desk.answer(question, b"{}")

    @given(st.data())
    @hypothesis_settings(max_examples=60)
    def test_any_json(self, shared: World, data: st.DataObject) -> None:
        """Never ends in anything but a refusal."""
        scalar = st.one_of(
            st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=70)
        )
        names = ("secret", "merchant", "identity", "node", "proof", "at", "signature")
        fields = data.draw(
            st.fixed_dictionaries({}, optional=dict.fromkeys(names, scalar)), label="fields"
        )
        question = data.draw(st.sampled_from(["offer", "enrol", "members", "rotate"]))
        with pytest.raises((WireError, EnrolmentError)):
            shared.desk.answer(question, json.dumps(fields).encode())

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"at": -1}, "seconds since 1970"),
            ({"at": 2**60}, "seconds since 1970"),
            ({"at": True}, "expected a number"),
            ({"at": 1.5}, "expected a number"),
            ({"merchant": "../../x"}, "no merchant id"),
            ({"merchant": "a\nb"}, "no merchant id"),
            ({"more": 1}, "expected a JSON object"),
        ],
        ids=str,
    )
    def test_fields(self, world: World, keys: Keys, change: dict[str, Any], words: str) -> None:
        """Are exactly those of the protocol."""
        with pytest.raises(WireError, match=words):
            say(world, "members", members_request(world, keys, world.clock()) | change)


class TestOpening:
    """The operator's folder must fit together."""

    def test_a_changed_contract(self, world: World, agreed: Contract) -> None:
        """Is not served: the operator did not sign it."""
        other = agreed.revised(privacy={"epsilon": 50.0})
        (world.settings.folder / "contract.toml").write_text(contract_toml(other))
        with pytest.raises(SettingsError, match=r"contract\.sig: does not sign"):
            open_desk(world.settings)

    def test_remarks_do_not_count(self, world: World) -> None:
        """What is signed is what the contract says, not how it is written."""
        path = world.settings.folder / "contract.toml"
        path.write_text("# agreed in spring\n" + path.read_text())
        assert open_desk(world.settings).contract == contract_toml(world.contract)

    def test_another_identity(self, world: World) -> None:
        """Does not fit contract and registry."""
        from server.archive import make_archive

        (world.settings.archive / "identity.key").unlink()
        make_archive(world.settings.archive)
        with pytest.raises(SettingsError, match="does not sign"):
            open_desk(world.settings)

    @pytest.mark.parametrize(
        "missing", ["contract.toml", "contract.sig", "registry.sqlite", "server/identity.key"]
    )
    def test_a_missing_file(self, world: World, missing: str) -> None:
        """Is named."""
        (world.settings.folder / missing).unlink()
        with pytest.raises(HansaError, match=missing):
            open_desk(world.settings)
