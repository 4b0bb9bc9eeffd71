"""`hansa merchant init, enrol, members, rotate`: a merchant's keys, and whom it trusts."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from clients.enrolling import Offer
    from common.enrolment import Difference


@dataclass(frozen=True)
class NewMerchant:
    """What `hansa merchant init` was told."""

    folders: tuple[Path, ...]
    merchant: str | None
    data: Path | None
    epsilon: float
    delta: float


def merchant_init(asked: NewMerchant) -> None:
    """Make keys and a merchant.toml in one or several folders.

    Raises:
        PolicyError: A merchant.toml breaks a rule, or one id was given for several folders.
        IdentityError: A key cannot be used or written.
    """
    from clients.preparing import Wishes, prepare
    from common.enrolment import fingerprint
    from common.errors import PolicyError

    if len(asked.folders) > 1 and (asked.merchant or asked.data):
        raise PolicyError("--id and --data are for one folder at a time")
    wishes = Wishes(asked.merchant, asked.data, asked.epsilon, asked.delta)
    for folder in asked.folders:
        keys, made = prepare(folder, wishes)
        what = f"made {', '.join(made)}" if made else "all was there"
        typer.echo(f"{folder}: {keys.identity.merchant}, {what}")
        typer.echo(f"  key {fingerprint(keys.identity.public)}")
        if "merchant.toml" in made:
            typer.echo(f"  next: fill in {folder / 'merchant.toml'}")


def merchant_enrol(
    tokens: tuple[str, ...], folder: Path | None, inside: Path | None, *, yes: bool
) -> None:
    """Show what each token invites to, ask, use it, and pin.

    Raises:
        EnrolmentError: A token cannot be used.
        IdentityError: A folder is not ready for it.
        UnreachableError: The operator does not answer, or somebody else does.
    """
    from clients.enrolling import enrol, see_offer
    from common.enrolment import parse_token
    from common.errors import EnrolmentError

    if folder is not None and (inside is not None or len(tokens) > 1):
        raise EnrolmentError("--folder is for one token, and not together with --in")
    parsed = [parse_token(_token_text(token)) for token in tokens]
    for token in parsed:
        own = folder or (inside or Path()) / token.merchant
        offer = see_offer(token, own)
        _show_offer(offer)
        if not yes:
            typer.confirm("are they the same, and do you agree to this contract?", abort=True)
        enrolment = enrol(offer, own)
        typer.echo(f"{own}: enrolled as {token.merchant}, list {enrolment.members_version}")
    typer.echo("next: hansa merchant check, then hansa merchant join")


def _token_text(given: str) -> str:
    """Return a token, or what the file holds that was named instead."""
    from common.enrolment import PREFIX
    from common.errors import EnrolmentError

    if given.startswith(PREFIX):
        return given
    try:
        return Path(given).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        raise EnrolmentError(
            f"{given[:80]}: is neither a token ({PREFIX}...) nor a file that holds one"
        ) from None


def _show_offer(offer: "Offer") -> None:
    from common.enrolment import fingerprint, grouped
    from common.plan import planned_epsilon
    from common.statements import epsilon_text
    from simulations.wording import counted, plain

    token, contract = offer.token, offer.contract
    name = plain(contract.federation.name, 80)
    typer.echo(f"{token.url} invites {token.merchant} to '{name}'")
    typer.echo(f"operator     {fingerprint(bytes.fromhex(token.operator))}")
    typer.echo(f"authority    {grouped(token.ca)}")
    typer.echo(f"contract     {grouped(token.contract)}")
    typer.echo(
        f"  epsilon {epsilon_text(planned_epsilon(contract))} a run, "
        f"{counted(len(contract.features), 'feature')}, "
        f"{counted(len(contract.segments.names), 'segment')}"
    )
    typer.echo(f"members      {len(offer.listed.members):,} so far")
    typer.echo("compare these with what the operator told you by another way")


def merchant_members(folder: Path, *, accept: bool) -> None:
    """Show what the operator's list says that the pinned one does not; pin it if asked to.

    Raises:
        EnrolmentError: The list cannot follow the pinned one, or the operator refuses.
    """
    from clients.enrolling import fetch_members, pin_members
    from clients.places import Places
    from common.service_lock import restart

    update = fetch_members(folder)
    pinned = update.enrolment.members_version
    typer.echo(
        f"the operator's list has version {update.listed.version} and "
        f"{len(update.listed.members):,} members, you pinned version {pinned}"
    )
    show_difference(update.difference)
    if update.listed.version == pinned:
        return
    if accept:
        pin_members(update)
        typer.echo(f"{folder / 'members.toml'}: pinned")
        if restart(Places.of(folder).run, "worker"):
            typer.echo("your worker starts anew with it")
    else:
        typer.echo(f"pin it with: hansa merchant members {folder} --accept")


def show_difference(found: "Difference") -> None:
    """Print who was added, removed, or has another key, with fingerprints."""
    from common.enrolment import fingerprint

    for name, key in found.added.items():
        typer.echo(f"  added    {name}  key {fingerprint(key)}")
    for name, key in found.removed.items():
        typer.echo(f"  removed  {name}  key {fingerprint(key)}")
    for name, (before, after) in found.rotated.items():
        typer.echo(f"  rotated  {name}  key {fingerprint(before)}\n    to key {fingerprint(after)}")
        typer.echo("    both keys signed that")
    if found.operator is not None:
        before, after = found.operator
        typer.echo(
            f"  rotated  the operator  key {fingerprint(before)}\n    to key {fingerprint(after)}"
        )
        typer.echo("    both keys signed that")
    for name, (before, after) in found.changed.items():
        typer.echo(f"  CHANGED  {name}  key {fingerprint(before)}\n    to key {fingerprint(after)}")
    if found.changed:
        typer.echo("a changed key may be somebody else's: ask that merchant before you accept it")


def merchant_rotate(folder: Path) -> None:
    """Replace the node's key.

    Raises:
        HansaError: The operator does not answer or refuses; the old key stays.
    """
    from clients.enrolling import rotate_node_key
    from clients.places import Places
    from common.enrolment import fingerprint
    from common.service_lock import restart

    typer.echo(f"{folder / 'node.key'}: replaced, {fingerprint(rotate_node_key(folder))}")
    if restart(Places.of(folder).run, "node"):
        typer.echo("your node starts anew with it")
