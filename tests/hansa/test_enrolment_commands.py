"""`hansa server init, invite, members, revoke, rotate`; `hansa merchant init, enrol, members`."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from clients.pinned import read_enrolment
from clients.preparing import read_keys
from common.contract import Contract, contract_toml, read_contract
from common.enrolment import fingerprint, grouped, parse_token
from common.errors import (
    ContractError,
    EnrolmentError,
    HansaError,
    IdentityError,
    PolicyError,
    SettingsError,
)
from common.identity import Members, read_members, write_members
from common.network import network_of
from common.start import read_start, starting_from
from server.archive import make_archive, open_archive
from server.certificates import authority_sha256
from server.readiness import check_ready
from server.registry import Registry
from server.settings import read_settings
from simulations.datasets import load
from tests.enrolment_world import World, free_port, gateway, opened

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # typer imports old names of click
    from hansa.cli import app

MADE = {
    "contract.sig",
    "contract.toml",
    "logs",
    "members.toml",
    "registry.sqlite",
    "run",
    "server",
    "server.toml",
    "superlink",
    "tls",
}


def hansa(*arguments: object, answer: str | None = None, code: int = 0) -> Result:
    """Run a command in this process; an error that `main` would tell is raised."""
    done = CliRunner().invoke(app, [*map(str, arguments)], input=answer, env={"COLUMNS": "100"})
    if isinstance(done.exception, HansaError):
        raise done.exception
    assert done.exit_code == code, done.output
    return done


@pytest.fixture(scope="session")
def agreed() -> Contract:
    """Give a contract."""
    return load("synthetic", preset="smoke", merchants=3).contract


@pytest.fixture
def contract(tmp_path: Path, agreed: Contract) -> Path:
    """Write the contract."""
    path = tmp_path / "agreed.toml"
    path.write_text(contract_toml(agreed))
    return path


@pytest.fixture
def operator(tmp_path: Path, contract: Path) -> Path:
    """Make a federation with the command, on free ports."""
    folder = tmp_path / "operator"
    hansa("server", "init", folder, "--contract", contract, *ports())
    return folder


@pytest.fixture
def world(operator: Path) -> Iterator[World]:
    """Serve its gateway."""
    with gateway(opened(operator)) as running:
        yield running


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """Make a merchant's folder with the command."""
    hansa("merchant", "init", tmp_path / "shops" / "shop")
    return tmp_path / "shops" / "shop"


def ports() -> list[object]:
    """Return options for three ports that are free."""
    names = ("--port", "--superlink-port", "--metrics-port")
    return [part for name in names for part in (name, free_port())]


def enrolled(operator: Path, folder: Path) -> str:
    """Invite and enrol a merchant with the commands; return what was printed."""
    hansa("server", "invite", operator, folder.name, "--out", operator.parent / "tokens")
    token = operator.parent / "tokens" / f"{folder.name}.token"
    return hansa("merchant", "enrol", token, "--folder", folder, "--yes").output


class TestServerInit:
    """A federation from a contract."""

    def test_what_is_made(self, operator: Path, agreed: Contract) -> None:
        """All that a federation needs; private files are the operator's alone."""
        assert {path.name for path in operator.iterdir()} == MADE
        assert read_contract(operator / "contract.toml") == agreed
        identity = open_archive(operator / "server").identity
        assert read_members(operator / "members.toml") == Members({}, identity.public)
        for path in operator.rglob("*"):
            if path.suffix in {".key", ".secret"}:
                assert path.stat().st_mode & 0o077 == 0
        assert len((operator / "superlink" / "superexec.secret").read_bytes()) == 32
        opened(operator)  # the contract's signature fits

    def test_what_is_told(self, tmp_path: Path, contract: Path, agreed: Contract) -> None:
        """Fingerprints to be compared, and nothing private."""
        folder = tmp_path / "operator"
        text = hansa("server", "init", folder, "--contract", contract).output
        assert fingerprint(open_archive(folder / "server").identity.public) in text
        assert grouped(authority_sha256(folder / "tls")) in text
        assert grouped(agreed.sha256) in text
        assert (folder / "server" / "identity.key").read_text().strip() not in text

    def test_a_second_time(self, operator: Path, contract: Path) -> None:
        """Is refused, and changes nothing."""
        before = {path: path.read_bytes() for path in operator.rglob("*") if path.is_file()}
        with pytest.raises(SettingsError, match="a federation is not overwritten"):
            hansa("server", "init", operator, "--contract", contract)
        assert before == {path: path.read_bytes() for path in operator.rglob("*") if path.is_file()}

    @pytest.mark.parametrize("name", ["server.toml", "tls", "registry.sqlite", "contract.sig"])
    def test_a_part_of_a_federation(self, tmp_path: Path, contract: Path, name: str) -> None:
        """Is not overwritten either."""
        (tmp_path / "operator").mkdir()
        (tmp_path / "operator" / name).write_text("precious")
        with pytest.raises(SettingsError, match=rf"{name}: is there already"):
            hansa("server", "init", tmp_path / "operator", "--contract", contract)
        assert (tmp_path / "operator" / name).read_text() == "precious"

    def test_an_identity_that_is_there(self, tmp_path: Path, contract: Path) -> None:
        """Is kept: merchants' ledgers name it."""
        identity = make_archive(tmp_path / "operator" / "server")
        hansa("server", "init", tmp_path / "operator", "--contract", contract)
        assert Registry(tmp_path / "operator").state().operator == identity.public

    def test_a_contract_that_is_there(self, tmp_path: Path, agreed: Contract) -> None:
        """Is used, and stays as it is written."""
        folder = tmp_path / "operator"
        folder.mkdir()
        text = "# agreed in spring\n" + contract_toml(agreed)
        (folder / "contract.toml").write_text(text)
        hansa("server", "init", folder)
        assert (folder / "contract.toml").read_text() == text
        opened(folder)

    def test_another_contract_that_is_there(
        self, tmp_path: Path, contract: Path, agreed: Contract
    ) -> None:
        """Is not replaced."""
        folder = tmp_path / "operator"
        folder.mkdir()
        other = contract_toml(agreed.revised(privacy={"epsilon": 2.0}))
        (folder / "contract.toml").write_text(other)
        with pytest.raises(SettingsError, match="is another contract than"):
            hansa("server", "init", folder, "--contract", contract)
        assert {path.name for path in folder.iterdir()} == {"contract.toml"}

    def test_no_contract(self, tmp_path: Path) -> None:
        """What to do is told, and nothing is made."""
        with pytest.raises(SettingsError, match="--contract FILE"):
            hansa("server", "init", tmp_path / "operator")
        (tmp_path / "bad.toml").write_text("format = 7")
        with pytest.raises(ContractError):
            hansa("server", "init", tmp_path / "operator", "--contract", tmp_path / "bad.toml")
        assert not (tmp_path / "operator").exists()

    def test_a_list_made_by_hand(self, tmp_path: Path, contract: Path) -> None:
        """Is kept beside: those merchants enrol anew."""
        folder = tmp_path / "operator"
        identity = make_archive(folder / "server")
        older = Members({"shop": b"\1" * 32}, identity.public)
        write_members(older, folder / "members.toml")
        text = hansa("server", "init", folder, "--contract", contract).output
        assert "members.before.toml" in text
        assert read_members(folder / "members.before.toml") == older
        assert read_members(folder / "members.toml").keys == {}

    @pytest.mark.parametrize("at", range(1, 9, 2))
    def test_a_full_disk(
        self, tmp_path: Path, contract: Path, monkeypatch: pytest.MonkeyPatch, at: int
    ) -> None:
        """Leaves nothing half-made; what was there stays."""
        import os

        folder, done = tmp_path / "operator", []
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
        honest = os.fsync

        def failing(handle: int) -> None:
            done.append(handle)
            if len(done) > at:
                raise OSError(28, "No space left on device")
            honest(handle)

        with monkeypatch.context() as patched:
            patched.setattr("os.fsync", failing)
            with pytest.raises(HansaError, match=r"cannot be written|cannot be made"):
                hansa("server", "init", folder, "--contract", contract)
        assert {path.name for path in folder.iterdir()} == {"notes.txt"}
        hansa("server", "init", folder, "--contract", contract)

    def test_settings(self, tmp_path: Path, contract: Path) -> None:
        """Options end in `server.toml`; a name of another machine opens the gateway to others."""
        folder = tmp_path / "operator"
        hansa(
            "server", "init", folder, "--contract", contract, "--host", "hansa.example.org",
            "--host", "10.0.0.7", "--port", 443, "--database", "postgresql+psycopg://x@db/y",
        )  # fmt: skip
        settings = read_settings(folder)
        assert (settings.url, settings.names) == ("https://hansa.example.org:443", ("10.0.0.7",))
        assert settings.bind == "0.0.0.0"  # noqa: S104
        assert settings.store_url == "postgresql+psycopg://x@db/y"
        one = tmp_path / "one"
        hansa("server", "init", one, "--contract", contract, "--bind", "127.0.0.9")
        assert read_settings(one).bind == "127.0.0.9"

    def test_ports_that_collide(self, tmp_path: Path, contract: Path) -> None:
        """Are refused before anything is made."""
        with pytest.raises(SettingsError, match="must differ"):
            hansa("server", "init", tmp_path / "o", "--contract", contract, "--port", 8444)
        assert not (tmp_path / "o").exists()


class TestServerInitStart:
    """`hansa server init` with a contract that names parameters to start from."""

    @pytest.fixture
    def warm(self, tmp_path: Path, agreed: Contract) -> Path:
        """Write a contract and what it starts from."""
        content = bytes(8 * network_of(agreed).size)
        path = tmp_path / "warm.toml"
        path.write_text(contract_toml(starting_from(agreed, content)))
        path.with_suffix(".start").write_bytes(content)
        return path

    def test_it_is_copied(self, tmp_path: Path, warm: Path) -> None:
        """Beside the contract, where the coordinator looks."""
        hansa("server", "init", tmp_path / "o", "--contract", warm, *ports())
        assert {path.name for path in (tmp_path / "o").iterdir()} == {*MADE, "contract.start"}
        contract = read_contract(tmp_path / "o" / "contract.toml")
        assert read_start(tmp_path / "o" / "contract.toml", contract) is not None

    @pytest.mark.parametrize("what", ["missing", "another"])
    def test_it_is_not_what_the_contract_names(self, tmp_path: Path, warm: Path, what: str) -> None:
        """Nothing is made, and nothing is signed."""
        start = warm.with_suffix(".start")
        if what == "missing":
            start.unlink()
        else:
            start.write_bytes(b"\1" + start.read_bytes()[1:])
        with pytest.raises(ContractError, match=r"warm\.start: "):
            hansa("server", "init", tmp_path / "o", "--contract", warm, *ports())
        assert not (tmp_path / "o").exists()

    def test_another_one_that_is_there(self, tmp_path: Path, warm: Path) -> None:
        """Is not overwritten, and not used."""
        folder = tmp_path / "o"
        folder.mkdir()
        (folder / "contract.start").write_bytes(b"mine")
        with pytest.raises(ContractError, match=r"contract\.start: "):
            hansa("server", "init", folder, "--contract", warm, *ports())
        assert [path.name for path in folder.iterdir()] == ["contract.start"]

    def test_services_do_not_start_without(self, tmp_path: Path, warm: Path) -> None:
        """Told when services start, not when merchants wait for a run."""
        folder = tmp_path / "o"
        hansa("server", "init", folder, "--contract", warm, *ports())
        (folder / "contract.start").unlink()
        with pytest.raises(ContractError, match=r"contract\.start: is missing"):
            check_ready(folder, read_settings(folder))


class TestInvite:
    """Tokens, one a merchant."""

    def test_files(self, operator: Path, tmp_path: Path) -> None:
        """Each is for its merchant, and nobody else can read it."""
        out = tmp_path / "tokens"
        text = hansa("server", "invite", operator, "a", "b", "--out", out).output
        for name in ("a", "b"):
            path = out / f"{name}.token"
            token = parse_token(path.read_text())
            assert token.merchant == name
            assert path.stat().st_mode & 0o777 == 0o600
            assert token.secret not in text
            assert path.read_text().strip() not in text

    def test_on_the_screen(self, operator: Path, agreed: Contract) -> None:
        """One line a merchant."""
        (line,) = hansa("server", "invite", operator, "a").stdout.splitlines()
        token = parse_token(line.removeprefix("a: "))
        assert token.contract == agreed.sha256
        assert token.url == read_settings(operator).url

    @pytest.mark.parametrize(
        ("names", "words"), [(["a", "b c"], "no merchant id"), (["a", "a"], "given twice")]
    )
    def test_bad_names(self, operator: Path, names: list[str], words: str) -> None:
        """No token is made, for the others neither."""
        with pytest.raises(EnrolmentError, match=words):
            hansa("server", "invite", operator, *names)
        assert Registry(operator).invitations(0.0) == []

    def test_a_changed_contract(self, operator: Path, agreed: Contract) -> None:
        """Nobody is invited to what the operator did not sign."""
        other = contract_toml(agreed.revised(privacy={"epsilon": 2.0}))
        (operator / "contract.toml").write_text(other)
        with pytest.raises(SettingsError, match="does not sign"):
            hansa("server", "invite", operator, "a")


class TestMerchantInit:
    """Keys and a file."""

    def test_several(self, tmp_path: Path) -> None:
        """One line each, with the key's fingerprint; a second time nothing is made."""
        folders = [tmp_path / "a", tmp_path / "b"]
        text = hansa("merchant", "init", *folders).output
        for folder in folders:
            assert fingerprint(read_keys(folder).identity.public) in text
            assert (folder / "identity.key").read_text().strip() not in text
        assert hansa("merchant", "init", *folders).output.count("all was there") == 2

    def test_one_id_for_several(self, tmp_path: Path) -> None:
        """Is refused."""
        with pytest.raises(PolicyError, match="one folder at a time"):
            hansa("merchant", "init", tmp_path / "a", tmp_path / "b", "--id", "x")


class TestEnrol:
    """What a merchant sees, and what it agrees to."""

    def test_what_is_shown(
        self, world: World, operator: Path, shop: Path, agreed: Contract
    ) -> None:
        """The same fingerprints that the operator was told, and what the contract costs."""
        text = enrolled(operator, shop)
        for part in (
            fingerprint(world.operator),
            grouped(authority_sha256(operator / "tls")),
            grouped(agreed.sha256),
            f"'{agreed.federation.name}'",
            "epsilon 1 a run, 12 features",
            "0 so far",
            "compare these with what the operator told you by another way",
        ):
            assert part in text
        assert read_enrolment(shop).merchant == "shop"

    def test_saying_no(self, world: World, operator: Path, shop: Path) -> None:
        """Pins nothing and leaves the token as good as it was."""
        text = hansa("server", "invite", operator, "shop").stdout.removeprefix("shop: ")
        done = hansa("merchant", "enrol", text, "--folder", shop, answer="n\n", code=1)
        assert "do you agree" in done.output
        assert not (shop / "enrolment.json").exists()
        assert world.nodes.ids == {}
        hansa("merchant", "enrol", text, "--folder", shop, answer="y\n")

    def test_several(self, world: World, operator: Path, tmp_path: Path) -> None:
        """Tokens find their folders by their ids."""
        shops, tokens = tmp_path / "shops", tmp_path / "tokens"
        hansa("merchant", "init", shops / "a", shops / "b")
        hansa("server", "invite", operator, "a", "b", "--out", tokens)
        hansa("merchant", "enrol", *sorted(tokens.iterdir()), "--in", shops, "--yes")
        assert set(world.registry.added_at()) == {"a", "b"}

    def test_the_folder_beside(
        self, world: World, operator: Path, shop: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without an option it is the one called like the token's id."""
        monkeypatch.chdir(shop.parent)
        text = hansa("server", "invite", operator, "shop").stdout.removeprefix("shop: ")
        hansa("merchant", "enrol", text.strip(), "--yes")
        assert read_enrolment(shop).url == world.settings.url

    def test_a_strange_name(self, tmp_path: Path, agreed: Contract, shop: Path) -> None:
        """Of a federation cannot change what the terminal shows."""
        path = tmp_path / "strange.toml"
        name = "\x1b[2Jgood\u202e"
        path.write_text(contract_toml(agreed.revised(federation={"name": name})))
        folder = tmp_path / "strange"
        hansa("server", "init", folder, "--contract", path, *ports())
        with gateway(opened(folder)):
            text = enrolled(folder, shop)
        assert "\x1b" not in text
        assert "\u202e" not in text

    @pytest.mark.parametrize("text", ["nonsense", "hansa1-nonsense", "missing.token"])
    def test_no_token(self, text: str) -> None:
        """Is told."""
        with pytest.raises(EnrolmentError):
            hansa("merchant", "enrol", text)

    def test_options_that_contradict(self, tmp_path: Path) -> None:
        """Are refused."""
        with pytest.raises(EnrolmentError, match="--folder is for one token"):
            hansa("merchant", "enrol", "a", "b", "--folder", tmp_path)


class TestMembers:
    """Both sides look at the list."""

    def test_the_operator(self, world: World, operator: Path, shop: Path) -> None:
        """Sees who is enrolled, invited and revoked."""
        enrolled(operator, shop)
        hansa("server", "invite", operator, "later")
        text = hansa("server", "members", operator).output
        assert "version 1: 1 enrolled" in text
        assert fingerprint(read_keys(shop).identity.public) in text
        assert "later  invited, until" in text
        done = hansa("server", "revoke", operator, "shop")
        assert "shop: off the list, which is now version 2" in done.output
        assert "as soon as the server runs again" in done.output  # no SuperLink runs here
        assert "shop  revoked in version 2" in hansa("server", "members", operator).output
        assert world.registry.version == 2
        with pytest.raises(EnrolmentError, match="is not enrolled"):
            hansa("server", "revoke", operator, "shop")

    def test_a_merchant(self, world: World, operator: Path, shop: Path) -> None:
        """Sees what is new, and pins it when it says so."""
        enrolled(operator, shop)
        other = shop.parent / "other"
        hansa("merchant", "init", other)
        enrolled(operator, other)
        key = fingerprint(read_keys(other).identity.public)
        text = hansa("merchant", "members", shop).output
        assert f"added    other  key {key}" in text
        assert "--accept" in text
        assert set(read_members(shop / "members.toml").keys) == {"shop"}
        assert "pinned" in hansa("merchant", "members", shop, "--accept").output
        assert read_enrolment(shop).members_version == world.registry.version

    def test_a_changed_key(self, world: World, operator: Path, shop: Path) -> None:
        """Is shouted, with both keys, before and when it is accepted."""
        enrolled(operator, shop)
        other, again = shop.parent / "other", shop.parent / "again" / "other"
        hansa("merchant", "init", other, again)
        enrolled(operator, other)
        hansa("merchant", "members", shop, "--accept")
        hansa("server", "revoke", operator, "other")
        assert "removed  other" in hansa("merchant", "members", shop).output
        enrolled(operator, again)
        for options in ((), ("--accept",)):
            text = hansa("merchant", "members", shop, *options).output
            assert "CHANGED  other" in text
            assert "ask that merchant before you accept it" in text
        assert world.registry.version == 4

    def test_a_new_node_key(self, world: World, operator: Path, shop: Path) -> None:
        """Is known to the operator, and told with its fingerprint."""
        enrolled(operator, shop)
        text = hansa("merchant", "rotate", shop).output
        node = read_keys(shop).node
        assert fingerprint(node) in text
        assert list(world.registry.nodes()) == [world.nodes.ids[node]]

    def test_a_new_identity_key(self, world: World, operator: Path, shop: Path) -> None:
        """Is told to the others with the proof, and works from then on."""
        enrolled(operator, shop)
        other = shop.parent / "other"
        hansa("merchant", "init", other)
        enrolled(operator, other)
        old = read_keys(shop).identity.public
        hansa("merchant", "rotate", shop, "--identity")
        new = read_keys(shop).identity.public
        assert world.registry.added_at() == {"shop": 3, "other": 2}
        text = hansa("merchant", "members", other, "--accept").output
        assert "CHANGED" not in text
        assert f"rotated  shop  key {fingerprint(old)}" in text
        assert "both keys signed that" in text
        for folder in (shop, other):
            hansa("merchant", "members", folder, "--accept")
            assert read_members(folder / "members.toml").keys_of("shop") == (old, new)
        hansa("merchant", "rotate", shop)

    def test_somebody_who_is_not_enrolled(self, shop: Path) -> None:
        """Is told what to do."""
        for command in ("members", "rotate"):
            with pytest.raises(IdentityError, match="ask the operator for a token"):
                hansa("merchant", command, shop)


class TestRotate:
    """The operator's certificates."""

    def test_the_servers(self, operator: Path) -> None:
        """A new certificate of the same authority."""
        before, server = authority_sha256(operator / "tls"), (operator / "tls" / "server.crt")
        old = server.read_bytes()
        text = hansa("server", "rotate", operator, "--tls").output
        assert "hansa server stop" in text
        assert server.read_bytes() != old
        assert authority_sha256(operator / "tls") == before

    def test_the_authority(self, world: World, operator: Path, shop: Path) -> None:
        """Is announced first, and used when all heard of it, or when the operator insists."""
        enrolled(operator, shop)
        before = authority_sha256(operator / "tls")
        assert "next authority" in hansa("server", "rotate", operator, "--ca").output
        assert authority_sha256(operator / "tls") == before
        with pytest.raises(SettingsError, match="shop: did not hear"):
            hansa("server", "rotate", operator, "--ca")
        hansa("merchant", "members", shop)
        hansa("server", "rotate", operator, "--ca")
        assert authority_sha256(operator / "tls") != before
        hansa("server", "rotate", operator, "--ca")
        assert "in use" in hansa("server", "rotate", operator, "--ca", "--anyway").output
        assert world.registry.version == 1

    @pytest.mark.parametrize("options", [(), ("--tls", "--ca"), ("--ca", "--identity")], ids=str)
    def test_what(self, operator: Path, options: tuple[str, ...]) -> None:
        """Must be said."""
        with pytest.raises(SettingsError, match="--tls or --ca"):
            hansa("server", "rotate", operator, *options)


@pytest.mark.parametrize("command", [("invite", "x"), ("members",), ("revoke", "x"), ("rotate",)])
def test_a_folder_that_is_none(tmp_path: Path, command: tuple[str, ...]) -> None:
    """What to do is told."""
    words = "--tls or --ca" if command[0] == "rotate" else "hansa server init"
    with pytest.raises(HansaError, match=words):
        hansa("server", command[0], tmp_path, *command[1:])
