"""`hansa server init, invite, members, revoke, rotate`: who takes part, with which keys."""

import re
import shutil
import time
from collections.abc import Container
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from common.contract import Contract
    from common.enrolment import Token
    from common.identity import Identity
    from common.rotation import Rotation
    from server.settings import Settings

_LOOPBACK = {"127.0.0.1", "localhost", "::1"}


@dataclass(frozen=True)
class NewServer:
    """What `hansa server init` was told."""

    folder: Path
    contract: Path | None
    hosts: tuple[str, ...]
    bind: str | None
    port: int
    superlink_port: int
    metrics_port: int
    database: str | None


def server_init(asked: NewServer) -> None:
    """Make a federation's folder, or nothing.

    Raises:
        SettingsError: There is one already, or something cannot be written.
        ContractError: The contract cannot be used, or what it starts from does not lie beside it.
    """
    from common.enrolment import fingerprint, grouped
    from common.start import read_start, start_path
    from server.certificates import authority_sha256
    from server.settings import checked_settings

    folder = asked.folder
    contract = _contract(asked)
    own = folder / "contract.toml"
    start = read_start(asked.contract or own, contract)
    if start is not None and start_path(own).exists():
        read_start(own, contract)  # another one there is not overwritten
    settings = checked_settings(_document(asked), folder)
    _refuse_what_is_there(settings)
    operator = _make(settings, contract, start)
    typer.echo(f"{folder}: made for '{contract.federation.name}', to be served at {settings.url}")
    typer.echo(f"operator     {fingerprint(operator.public)}")
    typer.echo(f"authority    {grouped(authority_sha256(settings.tls))}")
    typer.echo(f"contract     {grouped(contract.sha256)}")
    typer.echo(
        "tell merchants these by another way than the token's: they are shown them when they enrol"
    )
    typer.echo(
        f"keys stay in {folder}: whoever has server/identity.key or tls/ca.key is the operator"
    )
    typer.echo(f"next: hansa server start {folder}, hansa server invite {folder} NAME...")


def _contract(asked: NewServer) -> "Contract":
    from common.contract import read_contract
    from common.errors import SettingsError

    own = asked.folder / "contract.toml"
    if asked.contract is None:
        if not own.exists():
            raise SettingsError(f"{own}: there is none; name the contract with --contract FILE")
        return read_contract(own)
    contract = read_contract(asked.contract)
    if own.exists() and read_contract(own).sha256 != contract.sha256:
        raise SettingsError(f"{own}: is another contract than {asked.contract}; move it away")
    return contract


def _document(asked: NewServer) -> dict[str, object]:
    from server.settings import EVERYWHERE

    host, *names = asked.hosts or ("127.0.0.1",)
    bind = asked.bind or ("127.0.0.1" if {host, *names} <= _LOOPBACK else EVERYWHERE)
    return {
        "host": host,
        "names": tuple(names),
        "bind": bind,
        "port": asked.port,
        "superlink_port": asked.superlink_port,
        "metrics_port": asked.metrics_port,
        "database": asked.database or "",
    }


def _refuse_what_is_there(settings: "Settings") -> None:
    from common.errors import SettingsError
    from server.registry import NAME as REGISTRY
    from server.settings import NAME

    for name in (NAME, "tls", REGISTRY, "contract.sig"):
        if (settings.folder / name).exists():
            raise SettingsError(
                f"{settings.folder / name}: is there already; a federation is not overwritten"
            )


def _make(settings: "Settings", contract: "Contract", start: bytes | None) -> "Identity":
    """Write everything; what was made is taken away again if something cannot be."""
    from common.errors import SettingsError

    folder, new = settings.folder, not settings.folder.exists()
    before = set() if new else set(folder.iterdir())
    listed = folder / "members.toml"
    older = listed.read_bytes() if listed.is_file() else None
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return _fill(settings, contract, start)
    except BaseException as error:
        for made in set(folder.iterdir()) - before if folder.exists() else ():
            shutil.rmtree(made) if made.is_dir() else made.unlink()
        if older is not None:
            listed.write_bytes(older)
        if new:
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise SettingsError(f"{folder}: cannot be written ({error.strerror})") from None
        raise


def _fill(settings: "Settings", contract: "Contract", start: bytes | None) -> "Identity":
    import secrets

    from common.contract import contract_toml
    from common.enrolment import contract_statement
    from common.files import write_atomically, write_new
    from common.identity import read_identity
    from common.start import START
    from server.archive import COORDINATOR, make_archive
    from server.certificates import make_tls
    from server.registry import Registry
    from server.settings import write_settings

    folder, key = settings.folder, settings.archive / "identity.key"
    identity = read_identity(COORDINATOR, key) if key.exists() else make_archive(settings.archive)
    if not (folder / "contract.toml").exists():
        write_atomically(folder / "contract.toml", contract_toml(contract).encode())
    if start is not None:
        write_atomically(folder / START, start)
    signature = identity.sign(contract_statement(contract.sha256)).hex()
    write_new(folder / "contract.sig", f"{signature}\n".encode())
    make_tls(settings.tls, contract.federation.name, settings.hosts)
    for name in ("superlink", "run", "logs"):
        (folder / name).mkdir(mode=0o700, exist_ok=True)
    secret = folder / "superlink" / "superexec.secret"
    if not secret.exists():
        write_new(secret, secrets.token_bytes(32), 0o600)
    Registry.create(folder, identity.public, _keep_older_list(folder))
    write_settings(settings)
    return identity


def _keep_older_list(folder: Path) -> "tuple[Rotation, ...]":
    """Move a list of members away that was written by hand: those merchants enrol anew.

    Returns:
        How the operator's key of today came after earlier ones.
    """
    from common.identity import read_members
    from common.rotation import WITNESS

    listed = folder / "members.toml"
    if not listed.exists():
        return ()
    older = read_members(listed)
    if older.keys:
        kept = folder / "members.before.toml"
        kept.write_bytes(listed.read_bytes())
        typer.echo(f"{kept}: the list of members that was there; its merchants enrol anew")
    return tuple(one for one in older.rotations if one.merchant == WITNESS)


def server_invite(folder: Path, names: tuple[str, ...], out: Path | None, hours: float) -> None:
    """Make tokens.

    Raises:
        EnrolmentError: A name is no id, comes twice, or is enrolled already; no token is made.
        SettingsError: The federation cannot be used, or a file cannot be written.
    """
    from common.enrolment import Token
    from server.certificates import authority_sha256
    from server.enrolling import signed_contract
    from server.registry import Registry
    from server.settings import read_settings

    settings, registry = read_settings(folder), Registry(folder)
    state = registry.state()
    _check_names(names, state.members)
    contract = signed_contract(settings, state.operator)[0].sha256
    authority, now = authority_sha256(settings.tls), time.time()
    until = _moment(now + hours * 3600)
    for name in names:
        secret = registry.invite(name, hours, now)
        operator = state.operator.hex()
        token = Token(settings.url, authority, operator, contract, name, secret)
        if out is None:
            typer.echo(f"{name}: {token.text()}")
        else:
            _write_token(out / f"{name}.token", token)
            typer.echo(f"{out / f'{name}.token'}: for {name}")
    typer.echo(f"good once, until {until}; give each to its merchant alone", err=True)


def _check_names(names: tuple[str, ...], enrolled: Container[str]) -> None:
    from common.errors import EnrolmentError
    from common.identity import MERCHANT_ID

    for name in names:
        if not re.fullmatch(MERCHANT_ID, name):
            raise EnrolmentError(f"'{name[:64]}' is no merchant id: letters, digits, . _ -")
        if name in enrolled:
            raise EnrolmentError(f"'{name}' is enrolled already; for other keys, revoke it first")
    if len(set(names)) != len(names):
        raise EnrolmentError("a name is given twice")


def _write_token(path: Path, token: "Token") -> None:
    from common.errors import SettingsError
    from common.files import write_atomically

    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(path, token.text().encode() + b"\n", 0o600)
    except OSError as error:
        raise SettingsError(f"{path}: cannot be written ({error.strerror})") from None


def server_members(folder: Path) -> None:
    """Show the registry, and what will need care: certificates that run out."""
    from common.enrolment import fingerprint
    from server.certificates import expiry_warnings
    from server.registry import Registry
    from server.settings import read_settings

    settings, registry = read_settings(folder), Registry(folder)
    state = registry.state()
    typer.echo(f"list of members, version {state.version}: {len(state.members):,} enrolled")
    for name, member in state.members.items():
        since = f"since version {member.added}, {_moment(member.at)}"
        typer.echo(f"  {name}  {since}\n    key {fingerprint(member.identity)}")
    for name, version in state.revoked.items():
        typer.echo(f"  {name}  revoked in version {version}")
    for invitation in registry.invitations(time.time()):
        typer.echo(f"  {invitation.merchant}  invited, until {_moment(invitation.expires_at)}")
    for warning in expiry_warnings(settings.tls):
        typer.echo(warning, err=True)


def server_revoke(folder: Path, name: str) -> None:
    """Take a merchant off the list, then its node out of the SuperLink.

    Raises:
        EnrolmentError: It is not enrolled.
    """
    from common.errors import SuperLinkError
    from server.flower_control import unregister_node
    from server.registry import Registry
    from server.settings import read_settings

    settings, registry = read_settings(folder), Registry(folder)
    member = registry.revoke(name)
    typer.echo(f"{name}: off the list, which is now version {registry.version}")
    try:
        unregister_node(settings, member.node)
    except SuperLinkError as error:
        typer.echo(f"its node is refused as soon as the server runs again: {error}", err=True)
    else:
        typer.echo("its node is refused from now on")


def server_rotate(folder: Path, *, tls: bool, ca: bool, identity: bool, anyway: bool) -> None:
    """Replace the server's certificate or the identity, announce an authority, or switch to it.

    Raises:
        SettingsError: Not exactly one was asked for, or merchants were not told yet.
        ServiceError: The identity cannot be replaced now.
    """
    from common.errors import SettingsError
    from hansa.commands.rotation import operator_identity
    from server.certificates import renew
    from server.settings import read_settings

    if tls + ca + identity != 1:
        raise SettingsError("name what to replace: --tls or --ca or --identity")
    if identity:
        operator_identity(folder)
        return
    settings = read_settings(folder)
    if tls:
        renew(settings.tls, settings.hosts)
        typer.echo(f"{settings.tls / 'server.crt'}: a new certificate, of the same authority")
    elif not (settings.tls / "next").exists():
        _announce(settings)
        return
    else:
        _switch(settings, anyway)
    typer.echo(f"next: hansa server stop {folder}, then hansa server start {folder}")


def _announce(settings: "Settings") -> None:
    from common.contract import read_contract
    from common.enrolment import grouped
    from server.certificates import announce_next, announced, pem_sha256

    name = read_contract(settings.folder / "contract.toml").federation.name
    announce_next(settings.tls, name)
    later = pem_sha256(announced(settings.tls)[1])
    typer.echo(f"next authority  {grouped(later)}")
    typer.echo(
        "merchants learn of it, signed by the operator, when they join or look at the list of "
        "members; when all did, run the same command again to switch"
    )


def _switch(settings: "Settings", anyway: bool) -> None:
    from common.errors import SettingsError
    from server.certificates import announced, pem_sha256, switch
    from server.registry import Registry

    untold = Registry(settings.folder).untold(pem_sha256(announced(settings.tls)[1]))
    if untold and not anyway:
        raise SettingsError(
            f"{', '.join(untold)}: did not hear of the next authority yet and would refuse it; "
            "they run hansa merchant members, or you say --anyway and they enrol anew"
        )
    switch(settings.tls, settings.hosts)
    typer.echo(f"{settings.tls / 'ca.crt'}: the authority that was announced, now in use")


def _moment(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")
