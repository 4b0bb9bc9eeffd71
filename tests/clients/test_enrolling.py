"""A merchant enrols over real TLS on loopback, with honest and with dishonest operators."""

import json
import ssl
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from clients import enrolling
from clients.enrolling import (
    enrol,
    fetch_members,
    pin_members,
    rotate_node_key,
    see_offer,
)
from clients.operator_link import Operator, fetch_authority
from clients.pinned import read_enrolment
from clients.preparing import NODE_KEY, Wishes, prepare, read_keys
from common.contract import Contract, contract_toml, read_contract
from common.enrolment import PATH, Token, contract_statement
from common.errors import (
    ContractError,
    EnrolmentError,
    HansaError,
    IdentityError,
    PolicyError,
    UnreachableError,
)
from common.identity import Identity, Members, read_members, write_members
from server.certificates import (
    SERVER_DAYS,
    announce_next,
    issue,
    make_tls,
    read_pair,
    renew,
    switch,
    trusted,
)
from server.rotation import rotate_operator
from simulations.datasets import load
from tests.enrolment_world import (
    World,
    free_port,
    gateway,
    make_world,
    merchant_folder,
    opened,
    serving,
    tls_server,
)

PINNED = ("contract.toml", "members.toml", "enrolment.json")


@pytest.fixture(scope="session")
def agreed() -> Contract:
    """Give a contract."""
    return load("synthetic", preset="smoke", merchants=3).contract


@pytest.fixture
def world(tmp_path: Path, agreed: Contract) -> Iterator[World]:
    """Run an operator's gateway."""
    with gateway(make_world(tmp_path / "operator", agreed)) as running:
        yield running


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """Make a merchant's folder."""
    return merchant_folder(tmp_path / "shop")


def enrolled(world: World, folder: Path) -> Path:
    """Enrol a merchant's folder, which is made where there is none."""
    if not folder.exists():
        merchant_folder(folder)
    enrol(see_offer(world.token(folder.name), folder), folder, world.clock)
    return folder


def nothing_pinned(folder: Path) -> bool:
    """Tell whether a folder holds nothing of an operator, and nothing half-written."""
    return {path.name for path in folder.iterdir()} == {"identity.key", "node.key", "merchant.toml"}


class Dishonest:
    """A server of one's own, that answers what a test says and keeps what it was sent."""

    def __init__(self, authority: str, answer: Callable[[str, bytes], Response]) -> None:
        self.heard: list[tuple[str, bytes]] = []
        self._authority = authority
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope, receive)
        question, body = request.url.path.removeprefix(f"{PATH}/"), await request.body()
        self.heard.append((question, body))
        ca = PlainTextResponse(self._authority)
        response = ca if question == "ca" else self._answer(question, body)
        await response(scope, receive, send)


def bent(world: World, bend: Callable[[dict[str, Any]], None]) -> Dishonest:
    """Return a server with the operator's own certificate whose answers are bent on the way."""

    def answer(question: str, body: bytes) -> Response:
        found = world.desk.answer(question, body)
        bend(found)
        return JSONResponse(found)

    return Dishonest(trusted(world.settings.tls), answer)


class TestEnrolling:
    """Keys stay, pins come."""

    def test_what_is_pinned(self, world: World, shop: Path) -> None:
        """Operator, authority, contract and members; no secret."""
        token = world.token("shop")
        enrol(see_offer(token, shop), shop, world.clock)
        found = read_enrolment(shop)
        assert found.operator_key == world.operator
        assert (found.url, found.merchant) == (world.settings.url, "shop")
        assert found.ca_pem == trusted(world.settings.tls)
        assert (found.contract, found.members_version) == (world.contract.sha256, 1)
        assert read_contract(shop / "contract.toml") == world.contract
        members = read_members(shop / "members.toml")
        assert members == Members({"shop": read_keys(shop).identity.public}, world.operator)
        for path in shop.iterdir():
            assert token.secret not in path.read_text()

    def test_no_private_key_is_sent(self, tmp_path: Path, agreed: Contract, shop: Path) -> None:
        """Not a byte of either key is in a request."""
        world = make_world(tmp_path / "operator", agreed)
        server = bent(world, lambda _answer: None)
        from cryptography.hazmat.primitives.serialization import load_ssh_private_key

        node = load_ssh_private_key((shop / NODE_KEY).read_bytes(), None)
        scalar = node.private_numbers().private_value  # type: ignore[union-attr]
        with serving(tls_server(server, world.settings.port, world.settings.tls)):
            enrolled(world, shop)
        assert [question for question, _ in server.heard] == ["ca", "offer", "enrol"]
        said = b"".join(body for _, body in server.heard).decode()
        assert (shop / "identity.key").read_text().strip() not in said
        assert "PRIVATE" not in said
        sent = json.loads(server.heard[-1][1])
        der = ssl.PEM_cert_to_DER_cert(sent["node"].replace("PUBLIC KEY", "CERTIFICATE"))
        assert f"{scalar:096x}" not in der.hex()
        assert set(sent) == {"secret", "merchant", "identity", "node", "proof"}

    def test_the_worker_accepts_what_was_pinned(self, world: World, shop: Path) -> None:
        """The files are those that a run reads."""
        from clients.enrolment import enrolment
        from clients.merchant import read_merchant

        enrolled(world, shop)
        identity, members = enrolment(read_merchant(shop / "merchant.toml"), shop)
        assert members.keys == {"shop": identity.public}

    def test_a_second_time(self, world: World, shop: Path) -> None:
        """What is pinned is not replaced by another token."""
        enrolled(world, shop)
        before = {name: (shop / name).read_bytes() for name in PINNED}
        world.registry.revoke("shop")
        with pytest.raises(IdentityError, match="is enrolled already"):
            see_offer(world.token("shop"), shop)
        assert before == {name: (shop / name).read_bytes() for name in PINNED}

    def test_a_lost_answer(self, world: World, shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same token works again from the same folder, and from no other."""
        token = world.token("shop")
        offer = see_offer(token, shop)

        def full(_contents: dict[Path, bytes]) -> None:
            raise IdentityError("no space")

        with monkeypatch.context() as patched:
            patched.setattr(enrolling, "pin", full)
            with pytest.raises(IdentityError):
                enrol(offer, shop)
        assert nothing_pinned(shop)
        with pytest.raises(EnrolmentError, match="was used already"):
            enrol(offer, merchant_folder(shop.parent / "elsewhere" / "shop"))
        assert enrol(offer, shop).members_version == 1

    @pytest.mark.parametrize("number", range(3))
    def test_a_full_disk(
        self, world: World, shop: Path, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        """Pins nothing, whichever file is the first that cannot be moved."""
        offer = see_offer(world.token("shop"), shop)
        moved: list[Path] = []
        honest = Path.replace

        def failing(self: Path, target: Path) -> Path:
            if len(moved) == number and target.parent == shop:
                raise OSError(28, "No space left on device")
            moved.extend([target] if target.parent == shop else [])
            return honest(self, target)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "replace", failing)
            with pytest.raises(IdentityError, match="cannot be written"):
                enrol(offer, shop)
        assert nothing_pinned(shop)
        enrol(offer, shop)


class TestTheFolder:
    """It must be ready, and fit the token; nothing is sent before."""

    def test_no_folder(self, world: World, tmp_path: Path) -> None:
        """What to do is told."""
        with pytest.raises(IdentityError, match="run hansa merchant init"):
            see_offer(world.token("x"), tmp_path / "x")

    def test_another_id(self, world: World, shop: Path) -> None:
        """A token for somebody else is not used here."""
        with pytest.raises(IdentityError, match=r"merchant\.id is 'shop', the token is for 'x'"):
            see_offer(world.token("x"), shop)

    def test_another_contract(self, world: World, shop: Path) -> None:
        """One that was pinned by hand is not replaced."""
        other = world.contract.revised(privacy={"epsilon": 0.5})
        (shop / "contract.toml").write_text(contract_toml(other))
        with pytest.raises(ContractError, match="another contract than the token's"):
            see_offer(world.token("shop"), shop)

    def test_the_same_contract(self, world: World, shop: Path) -> None:
        """One that was pinned by hand stays, with its remarks."""
        text = "# read on Monday\n" + contract_toml(world.contract)
        (shop / "contract.toml").write_text(text)
        enrolled(world, shop)
        assert (shop / "contract.toml").read_text() == text

    @pytest.mark.parametrize("witness", [True, False])
    def test_a_list_made_by_hand(self, world: World, shop: Path, witness: bool) -> None:
        """With another key of a member, or another witness, it is not replaced."""
        own = read_keys(shop).identity.public
        members = Members({"shop": own}, b"\2" * 32)
        if witness:
            members = Members({"shop": b"\1" * 32}, world.operator)
        write_members(members, shop / "members.toml")
        with pytest.raises(EnrolmentError, match="another"):
            enrolled(world, shop)
        assert read_members(shop / "members.toml") == members
        assert not (shop / "enrolment.json").exists()

    @pytest.mark.parametrize("name", ["identity.key", "node.key"])
    def test_a_key_that_is_missing(self, world: World, shop: Path, name: str) -> None:
        """Is told."""
        (shop / name).unlink()
        with pytest.raises(IdentityError, match=name):
            see_offer(world.token("shop"), shop)


class TestSomebodyInBetween:
    """Gets nothing but a refusal."""

    @pytest.fixture
    def evil(self, tmp_path: Path) -> Path:
        """Make certificates for the same name, of another authority."""
        make_tls(tmp_path / "evil", "shops", [])
        return tmp_path / "evil"

    def test_with_its_own_authority(
        self, tmp_path: Path, agreed: Contract, shop: Path, evil: Path
    ) -> None:
        """The secret is not sent: the authority is not the token's."""
        world = make_world(tmp_path / "operator", agreed)
        server = Dishonest((evil / "ca.crt").read_text(), lambda *_: JSONResponse({}))
        with (
            serving(tls_server(server, world.settings.port, evil)),
            pytest.raises(UnreachableError, match="another certificate authority than your token"),
        ):
            see_offer(world.token("shop"), shop)
        assert [question for question, _ in server.heard] == ["ca"]
        assert nothing_pinned(shop)

    def test_that_shows_the_right_authority(
        self, tmp_path: Path, agreed: Contract, shop: Path, evil: Path
    ) -> None:
        """But has no certificate of it: nothing is sent either."""
        world = make_world(tmp_path / "operator", agreed)
        server = Dishonest(trusted(world.settings.tls), lambda *_: JSONResponse({}))
        with (
            serving(tls_server(server, world.settings.port, evil)),
            pytest.raises(UnreachableError, match="of another authority than the one you pinned"),
        ):
            see_offer(world.token("shop"), shop)
        assert [question for question, _ in server.heard] == ["ca"]

    def test_later(self, tmp_path: Path, agreed: Contract, shop: Path, evil: Path) -> None:
        """Hears nothing from a merchant that is enrolled."""
        world = make_world(tmp_path / "operator", agreed)
        with gateway(world):
            enrolled(world, shop)
        server = Dishonest((evil / "ca.crt").read_text(), lambda *_: JSONResponse({}))
        with serving(tls_server(server, world.settings.port, evil)):
            for question in (fetch_members, rotate_node_key):
                with pytest.raises(UnreachableError, match="Nothing was sent"):
                    question(shop)
        assert server.heard == []

    def test_an_expired_certificate(self, tmp_path: Path, agreed: Contract, shop: Path) -> None:
        """Is refused, with the reason and whose part it is."""
        world = make_world(tmp_path / "operator", agreed)
        tls = world.settings.tls
        then = datetime.now(UTC) - timedelta(days=SERVER_DAYS + 1)
        old = issue(read_pair(tls, "ca"), [], then)
        (tls / "server.crt").write_bytes(old.pem)
        (tls / "server.key").write_bytes(old.key_pem)
        with (
            gateway(world),
            pytest.raises(UnreachableError, match=r"ran out .*server rotate --tls"),
        ):
            see_offer(world.token("shop"), shop)

    def test_a_certificate_of_the_future(
        self, tmp_path: Path, agreed: Contract, shop: Path
    ) -> None:
        """Means that the merchant's clock is slow, by more than a day."""
        world = make_world(tmp_path / "operator", agreed)
        tls = world.settings.tls
        later = issue(read_pair(tls, "ca"), [], datetime.now(UTC) + timedelta(days=3))
        (tls / "server.crt").write_bytes(later.pem)
        (tls / "server.key").write_bytes(later.key_pem)
        with gateway(world), pytest.raises(UnreachableError, match="your clock is slow"):
            see_offer(world.token("shop"), shop)

    def test_a_certificate_for_another_name(
        self, tmp_path: Path, agreed: Contract, shop: Path
    ) -> None:
        """Is told with its remedy."""
        world = make_world(tmp_path / "operator", agreed)
        url = f"https://127.0.0.2:{world.settings.port}"
        app = bent(world, lambda _answer: None)
        server = tls_server(app, world.settings.port, world.settings.tls)
        server.host = "127.0.0.2"
        with (
            serving(server),
            pytest.raises(UnreachableError, match=r"not for this name: .*server\.toml"),
        ):
            see_offer(replace(world.token("shop"), url=url), shop)

    def test_nobody_there(self, tmp_path: Path) -> None:
        """Is told."""
        del tmp_path
        with pytest.raises(UnreachableError, match="is the address right"):
            fetch_authority(f"https://127.0.0.1:{free_port()}", "0" * 64)

    @pytest.mark.parametrize(
        "answer",
        [
            Response(b"<html>", 200),
            Response(b"[]", 200),
            Response(b"", 502),
            Response(b"{" * 100_000, 200),
            JSONResponse({"error": "\x1b[31m" + "x" * 1000}, 503),
            JSONResponse({"nonsense": 1}, 404),
        ],
        ids=["html", "list", "502", "deep", "503", "404"],
    )
    def test_another_server(self, tmp_path: Path, agreed: Contract, answer: Response) -> None:
        """Is told in one line that a terminal can show."""
        world = make_world(tmp_path / "operator", agreed)
        server = Dishonest(trusted(world.settings.tls), lambda *_: answer)
        link = Operator(world.settings.url, trusted(world.settings.tls))
        with (
            serving(tls_server(server, world.settings.port, world.settings.tls)),
            pytest.raises(UnreachableError) as refusal,
        ):
            link.ask("members", {})
        assert str(refusal.value).isprintable()
        assert len(str(refusal.value)) < 600

    @pytest.mark.parametrize("text", ["", "no certificate", "x" * 100_000])
    def test_no_authority(self, tmp_path: Path, agreed: Contract, text: str) -> None:
        """Something else instead of a certificate is told."""
        world = make_world(tmp_path / "operator", agreed)
        server = Dishonest(text, lambda *_: JSONResponse({}))
        with (
            serving(tls_server(server, world.settings.port, world.settings.tls)),
            pytest.raises(UnreachableError),
        ):
            fetch_authority(world.settings.url, "0" * 64)


class TestADishonestOperator:
    """Cannot show one thing and pin another."""

    def refused(
        self, world: World, shop: Path, bend: Callable[[dict[str, Any]], None], words: str
    ) -> None:
        """Check that a bent answer is refused, at the offer and at the enrolment."""
        token = world.token("shop")
        server = bent(world, bend)
        honest = replace(world, settings=world.settings)
        with (
            serving(tls_server(server, world.settings.port, world.settings.tls)),
            pytest.raises(EnrolmentError, match=words),
        ):
            see_offer(token, shop)
        with gateway(honest):
            offer = see_offer(token, shop)
        with (
            serving(tls_server(server, world.settings.port, world.settings.tls)),
            pytest.raises(EnrolmentError, match=words),
        ):
            enrol(offer, shop)
        assert nothing_pinned(shop)

    @pytest.fixture
    def silent(self, tmp_path: Path, agreed: Contract) -> World:
        """Make an operator that does not run yet."""
        return make_world(tmp_path / "operator", agreed)

    def test_another_contract(self, silent: World, shop: Path) -> None:
        """Even one that it signed."""
        other = silent.contract.revised(privacy={"epsilon": 90.0})
        signature = silent.desk.identity.sign(contract_statement(other.sha256)).hex()

        def bend(answer: dict[str, Any]) -> None:
            answer |= {"contract": contract_toml(other), "contract_signature": signature}

        self.refused(silent, shop, bend, "another one than your token names")

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"contract": 3}, "no contract"),
            ({"contract": "= nonsense"}, "not valid TOML"),
            ({"contract_signature": "00" * 64}, "did not sign the contract"),
            ({"list": None}, "no list"),
            ({"signature": "00" * 64}, "did not sign the list"),
        ],
        ids=str,
    )
    def test_something_else(
        self, silent: World, shop: Path, change: dict[str, Any], words: str
    ) -> None:
        """Is told, and nothing is pinned."""
        self.refused(silent, shop, lambda answer: answer.update(change), words)

    def test_another_operator(self, tmp_path: Path, agreed: Contract, shop: Path) -> None:
        """One that the token does not name has no word in it."""
        world = make_world(tmp_path / "operator", agreed)
        with gateway(world):
            token = replace(world.token("shop"), operator="ab" * 32)
            with pytest.raises(EnrolmentError, match="did not sign the contract"):
                see_offer(token, shop)

    def test_a_list_without_me(self, silent: World, shop: Path) -> None:
        """Is not pinned, though it is signed."""
        token = silent.token("shop")
        empty = silent.registry.state().signed_list()

        def bend(answer: dict[str, Any]) -> None:
            signature = silent.desk.identity.sign(empty.canonical()).hex()
            answer |= {"list": empty.document(), "signature": signature}

        with (
            serving(tls_server(bent(silent, bend), silent.settings.port, silent.settings.tls)),
            pytest.raises(EnrolmentError, match="does not hold your key"),
        ):
            enrol(see_offer(token, shop), shop)
        assert nothing_pinned(shop)


class TestMembers:
    """The list changes; what is pinned changes when the merchant says so."""

    def test_an_addition(self, world: World, shop: Path) -> None:
        """Is shown, then pinned."""
        enrolled(world, shop)
        other = enrolled(world, shop.parent / "other")
        update = fetch_members(shop, world.clock)
        key = read_keys(other).identity.public
        assert update.difference.added == {"other": key}
        assert set(read_members(shop / "members.toml").keys) == {"shop"}
        pin_members(update)
        assert set(read_members(shop / "members.toml").keys) == {"shop", "other"}
        assert read_enrolment(shop).members_version == 2
        assert not fetch_members(shop, world.clock).difference

    def test_a_changed_key(self, world: World, shop: Path) -> None:
        """Is named with both keys."""
        enrolled(world, shop)
        enrolled(world, shop.parent / "other")
        pin_members(fetch_members(shop, world.clock))
        world.registry.revoke("other")
        enrolled(world, shop.parent / "again" / "other")
        keys = [read_keys(shop.parent / where / "other").identity.public for where in ("", "again")]
        assert fetch_members(shop, world.clock).difference.changed == {"other": tuple(keys)}

    def test_a_lower_version(self, tmp_path: Path, agreed: Contract, shop: Path) -> None:
        """An operator that went back to a copy of its registry is told so."""
        world = make_world(tmp_path / "operator", agreed)
        old: list[dict[str, Any]] = []
        with gateway(world):
            enrolled(world, shop)
            old.append(world.desk._listed(world.registry.state()))
            enrolled(world, shop.parent / "other")
            pin_members(fetch_members(shop, world.clock))

        def bend(answer: dict[str, Any]) -> None:
            answer |= {name: old[0][name] for name in ("list", "signature")}

        with (
            serving(tls_server(bent(world, bend), world.settings.port, world.settings.tls)),
            pytest.raises(EnrolmentError, match="version 1, older than the pinned 2"),
        ):
            fetch_members(shop, world.clock)

    def test_a_new_key_of_the_operator(self, tmp_path: Path, agreed: Contract, shop: Path) -> None:
        """Is shown, pinned when accepted, and followed over several changes at once."""
        world = make_world(tmp_path / "operator", agreed)
        with gateway(world):
            enrolled(world, shop)
        keys = [world.operator]
        for _ in range(2):
            rotate_operator(world.settings.folder, world.registry.rekey_operator)
            again, nodes = opened(world.settings.folder, world.clock), world.nodes
            desk = replace(again.desk, register=nodes.register, unregister=nodes.unregister)
            world = replace(again, nodes=nodes, desk=desk)
            keys.append(world.operator)
        with gateway(world):
            update = fetch_members(shop, world.clock)
            assert update.difference.operator == (keys[0], keys[2])
            assert not update.difference.changed
            assert read_enrolment(shop).operator_key == keys[0]
            rotate_node_key(shop, world.clock)  # who did not accept it is still heard
            pin_members(update)
            assert read_enrolment(shop).operator_key == keys[2]
            assert read_members(shop / "members.toml").witnesses == tuple(keys)
            assert not fetch_members(shop, world.clock).difference
            other = enrolled(world, shop.parent / "other")
            assert read_members(other / "members.toml").witnesses == tuple(keys)

    def test_a_key_that_the_old_one_did_not_sign(
        self, tmp_path: Path, agreed: Contract, shop: Path
    ) -> None:
        """Is nobody's the merchant knows: the list is refused, and nothing is pinned."""
        world, stranger = make_world(tmp_path / "operator", agreed), Identity.generate("x")
        with gateway(world):
            enrolled(world, shop)

        def bend(answer: dict[str, Any]) -> None:
            listed = replace(world.registry.state().signed_list(), witness=stranger.public)
            answer["list"] = listed.document()
            answer["signature"] = stranger.sign(listed.canonical()).hex()

        before = (shop / "members.toml").read_bytes()
        with (
            serving(tls_server(bent(world, bend), world.settings.port, world.settings.tls)),
            pytest.raises(EnrolmentError, match="did not sign the list"),
        ):
            fetch_members(shop, world.clock)
        assert (shop / "members.toml").read_bytes() == before

    def test_a_revoked_merchant(self, world: World, shop: Path) -> None:
        """Is refused."""
        enrolled(world, shop)
        world.registry.revoke("shop")
        for question in (fetch_members, rotate_node_key):
            with pytest.raises(EnrolmentError, match="the operator refused: this request is not"):
                question(shop, world.clock)

    def test_a_clock_that_is_off_by_a_day(self, world: World, shop: Path) -> None:
        """Is told."""
        enrolled(world, shop)
        with pytest.raises(EnrolmentError, match="86400 s behind the operator's clock"):
            fetch_members(shop, lambda: world.clock() - 86400)

    def test_before_enrolling(self, shop: Path) -> None:
        """What to do is told."""
        with pytest.raises(IdentityError, match="not enrolled yet"):
            fetch_members(shop)

    @pytest.mark.parametrize(
        "text", ["", "[]", "{}", "\xff", '{"format": 2}', "[" * 50_000], ids=range(6)
    )
    def test_a_broken_file(self, world: World, shop: Path, text: str) -> None:
        """Is told."""
        enrolled(world, shop)
        (shop / "enrolment.json").write_text(text, encoding="latin-1")
        with pytest.raises(IdentityError, match=r"enrolment\.json: "):
            read_enrolment(shop)

    @pytest.mark.parametrize("change", [{"format": 2}, {"url": "http://x:1"}, {"more": 1}], ids=str)
    def test_a_changed_file(self, world: World, shop: Path, change: dict[str, Any]) -> None:
        """Is told."""
        enrolled(world, shop)
        path = shop / "enrolment.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(IdentityError, match="does not hold what an enrolment holds"):
            read_enrolment(shop)


class TestRotating:
    """New keys, on both sides."""

    def test_a_node_key(self, world: World, shop: Path) -> None:
        """The operator's list of nodes follows."""
        enrolled(world, shop)
        before = (shop / NODE_KEY).read_bytes()
        node = rotate_node_key(shop, world.clock)
        assert (shop / NODE_KEY).read_bytes() != before
        assert read_keys(shop).node == node
        assert world.registry.nodes() == {world.nodes.ids[node]: "shop"}
        assert (shop / NODE_KEY).stat().st_mode & 0o777 == 0o600
        assert not (shop / "node.key.next").exists()

    def test_a_lost_answer(self, world: World, shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The second try ends with the key that the operator has."""
        enrolled(world, shop)
        before = (shop / NODE_KEY).read_bytes()

        def lost(*_arguments: object) -> None:
            raise UnreachableError("lost")

        with monkeypatch.context() as patched:
            patched.setattr(enrolling, "_update", lost)
            with pytest.raises(UnreachableError):
                rotate_node_key(shop, world.clock)
        assert (shop / NODE_KEY).read_bytes() == before
        world.clock.at += 1
        node = rotate_node_key(shop, world.clock)
        assert world.registry.nodes() == {world.nodes.ids[node]: "shop"}
        assert len(world.nodes.ids) == 2

    def test_a_renewed_certificate(self, tmp_path: Path, agreed: Contract, shop: Path) -> None:
        """Is accepted without a word."""
        world = make_world(tmp_path / "operator", agreed)
        with gateway(world):
            enrolled(world, shop)
        renew(world.settings.tls, world.settings.hosts)
        with gateway(world):
            fetch_members(shop, world.clock)

    def test_a_new_authority(self, tmp_path: Path, agreed: Contract, shop: Path) -> None:
        """Who heard of it goes over; who did not is told that it is another one."""
        world = make_world(tmp_path / "operator", agreed)
        other = shop.parent / "other"
        with gateway(world):
            enrolled(world, shop)
            enrolled(world, other)
            announce_next(world.settings.tls, "next")
            fetch_members(shop, world.clock)
        assert read_enrolment(shop).ca_pem.count("BEGIN CERTIFICATE") == 2
        switch(world.settings.tls, world.settings.hosts)
        with gateway(world):
            fetch_members(shop, world.clock)
            with pytest.raises(UnreachableError, match="another authority than the one you pinned"):
                fetch_members(other, world.clock)
        assert read_enrolment(shop).ca_pem == (world.settings.tls / "ca.crt").read_text()

    def test_an_authority_that_the_operator_did_not_sign(
        self, tmp_path: Path, agreed: Contract, shop: Path
    ) -> None:
        """Is never pinned, though it comes over the pinned connection."""
        world = make_world(tmp_path / "operator", agreed)
        make_tls(tmp_path / "evil", "shops", [])
        with gateway(world):
            enrolled(world, shop)
        before = read_enrolment(shop)

        def bend(answer: dict[str, Any]) -> None:
            answer["next_ca_pem"] = (tmp_path / "evil" / "ca.crt").read_text()

        with (
            serving(tls_server(bent(world, bend), world.settings.port, world.settings.tls)),
            pytest.raises(EnrolmentError, match="did not sign its authority"),
        ):
            fetch_members(shop, world.clock)
        assert read_enrolment(shop) == before


class TestPreparing:
    """`hansa merchant init`."""

    def test_a_new_folder(self, tmp_path: Path) -> None:
        """Holds two keys for the merchant alone, and a file to fill in."""
        folder = tmp_path / "a" / "shop-1"
        keys, made = prepare(folder, Wishes(None, Path("x.parquet"), 0.5, 1e-6))
        assert made == ["merchant.toml", "identity.key", "node.key"]
        for name in ("identity.key", "node.key"):
            assert (folder / name).stat().st_mode & 0o777 == 0o600
        again = read_keys(folder)
        assert (again.identity.public, again.node) == (keys.identity.public, keys.node)
        from clients.merchant import read_merchant

        merchant = read_merchant(folder / "merchant.toml")
        assert (merchant.policy.epsilon, merchant.policy.delta) == (0.5, 1e-6)
        assert merchant.data.path == Path.cwd() / "x.parquet"

    def test_flower_reads_the_node_key(self, shop: Path) -> None:
        """It is what `flower-supernode` wants."""
        from cryptography.hazmat.primitives.serialization import load_ssh_private_key
        from flwr.supercore.primitives.asymmetric import public_key_to_bytes, uses_nist_ec_curve

        key = load_ssh_private_key((shop / NODE_KEY).read_bytes(), None).public_key()
        assert uses_nist_ec_curve(key)  # type: ignore[arg-type]
        assert public_key_to_bytes(key) == read_keys(shop).node  # type: ignore[arg-type]

    def test_what_is_there(self, shop: Path) -> None:
        """Is never changed."""
        before = {path: path.read_bytes() for path in shop.iterdir()}
        assert prepare(shop, Wishes("shop", None, 9.0, 1e-3))[1] == []
        assert before == {path: path.read_bytes() for path in shop.iterdir()}

    def test_another_id(self, shop: Path) -> None:
        """Than the file's is refused."""
        with pytest.raises(PolicyError, match=r"merchant\.id: is 'shop', not the --id given"):
            prepare(shop, Wishes("other", None, 1.0, 1e-5))

    @pytest.mark.parametrize(
        ("wishes", "words"),
        [
            (Wishes("a b", None, 1.0, 1e-5), r"merchant\.id"),
            (Wishes(None, None, -1.0, 1e-5), r"policy\.epsilon"),
            (Wishes(None, None, 1.0, 0.5), r"policy\.delta"),
            (Wishes(None, Path("x.xlsx"), 1.0, 1e-5), r"\.csv or \.parquet"),
        ],
        ids=str,
    )
    def test_what_cannot_be(self, tmp_path: Path, wishes: Wishes, words: str) -> None:
        """Is refused, and leaves nothing."""
        with pytest.raises(PolicyError, match=words):
            prepare(tmp_path / "shop", wishes)
        assert list(tmp_path.iterdir()) == []

    def test_a_name_that_is_no_id(self, tmp_path: Path) -> None:
        """Of the folder asks for --id."""
        with pytest.raises(PolicyError, match=r"merchant\.id"):
            prepare(tmp_path / "my shop", Wishes(None, None, 1.0, 1e-5))
        prepare(tmp_path / "my shop", Wishes("mine", None, 1.0, 1e-5))

    def test_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Leaves no half of anything; the second try works."""
        import os

        links = []
        honest = os.link

        def failing(source: Path, target: Path) -> None:
            if len(links) == 2:
                raise OSError(28, "No space left on device")
            links.append(target)
            honest(source, target)

        with monkeypatch.context() as patched:
            patched.setattr("common.files.os.link", failing)
            with pytest.raises(IdentityError, match="cannot be written"):
                prepare(tmp_path / "shop", Wishes(None, None, 1.0, 1e-5))
        assert list(tmp_path.iterdir()) == []
        prepare(tmp_path / "shop", Wishes(None, None, 1.0, 1e-5))

    @pytest.mark.parametrize("name", ["identity.key", "node.key"])
    def test_a_key_that_others_can_read(self, shop: Path, name: str) -> None:
        """Is refused."""
        (shop / name).chmod(0o644)
        with pytest.raises(IdentityError, match="chmod 600"):
            read_keys(shop)

    def test_another_kind_of_key(self, shop: Path) -> None:
        """Is refused: Flower takes no Ed25519 key."""
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        text = Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
        for content, words in ((text, "no key on the curve"), (b"x", "no private key")):
            (shop / NODE_KEY).write_bytes(content)
            with pytest.raises(IdentityError, match=words):
                read_keys(shop)


def test_every_refusal_is_for_people(world: World, shop: Path) -> None:
    """None is a bare error of a library."""
    token: Token = world.token("shop")
    for changed in (
        replace(token, secret="0" * 64),
        replace(token, contract="0" * 64),
        replace(token, ca="0" * 64),
        replace(token, url=f"https://localhost:{free_port()}"),
    ):
        with pytest.raises(HansaError) as refusal:
            see_offer(changed, shop)
        assert token.secret not in str(refusal.value)
