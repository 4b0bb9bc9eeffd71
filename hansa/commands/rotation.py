"""Rotation of identity keys: a merchant's, and the operator's."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from common.rotation import Rotation


def merchant_identity(folder: Path) -> None:
    """Give a merchant a new identity key; its ledger, with all that was spent, goes on.

    Raises:
        HansaError: The merchant takes part right now, a file cannot be used, or the operator
            refuses.
    """
    from clients.pinned import NAME
    from clients.rotation import rotate_identity, tell_operator

    _check_still(folder, "hansa merchant leave")
    enrolled = (folder / NAME).is_file()
    rotation = rotate_identity(folder, tell_operator(folder) if enrolled else _tell_nobody)
    _show(rotation, folder / "identity.key")
    typer.echo("what was spent before still counts, and every audit can follow the change")
    if not enrolled:
        typer.echo(
            f"next: give {folder / 'members.toml'} to the operator and to the other merchants; "
            "nobody knows the new key yet, and the old one is worth nothing any more"
        )


def _tell_nobody(_rotation: "Rotation") -> None:
    """Leave it to people, where no operator was pinned."""


def operator_identity(folder: Path) -> None:
    """Give the operator, who is the witness too, a new identity key.

    Raises:
        HansaError: The federation runs right now, or a file cannot be used.
    """
    from server.registry import NAME, Registry
    from server.rotation import KEY, rotate_operator

    _check_still(folder, "hansa server stop")
    if not (folder / NAME).is_file():
        _show(rotate_operator(folder), folder / KEY)
        typer.echo(
            f"next: give {folder / 'members.toml'} to every merchant, which proves the change"
        )
        return
    _show(rotate_operator(folder, Registry(folder).rekey_operator), folder / KEY)
    typer.echo(
        f"next: hansa server start {folder}; every merchant follows with hansa merchant members "
        "--accept, and takes part in nothing until then. Tokens that were not used are void: "
        "invite again"
    )


def _check_still(folder: Path, stop: str) -> None:
    """Raise a `ServiceError` where processes with the old key run."""
    from common.errors import ServiceError
    from common.service_lock import is_locked

    if (folder / "run").is_dir() and is_locked(folder / "run"):
        raise ServiceError(
            f"{folder}: processes run here, and they have the old key; first: {stop} {folder}"
        )


def _show(rotation: "Rotation", key: Path) -> None:
    from common.enrolment import fingerprint

    typer.echo(f"{key}: replaced; the old key is kept beside it, for nothing but evidence")
    typer.echo(f"  old key {fingerprint(rotation.old)}")
    typer.echo(f"  new key {fingerprint(rotation.new)}")
