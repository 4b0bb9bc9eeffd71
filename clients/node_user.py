"""A node that runs as a user of its own, who can reach the socket and nothing of value."""

import os
import subprocess
from pathlib import Path

from clients.merchant import Merchant
from clients.places import Places
from clients.worker_socket import user_id
from common.child_process import tethered
from common.errors import PolicyError

_TEST = "/usr/bin/test"


def prepare_for(user: str, places: Places, merchant: Merchant) -> None:
    """Give a node's user what it needs, and check that it can reach nothing else.

    Raises:
        PolicyError: This process is not root, there is no such user, or the user can read what
            it must not, or cannot read what it must; the message says what to do.
    """
    if os.geteuid() != 0:
        raise PolicyError(
            f"{places.merchant}: node.user is '{user}'; only root can start a process as another "
            "user: join as root, or take node.user out"
        )
    number = user_id(user)
    places.run.mkdir(mode=0o711, parents=True, exist_ok=True)
    places.run.chmod(0o711)  # to pass through to the socket, not to look around
    os.close(os.open(places.node_state, os.O_WRONLY | os.O_CREAT, 0o600))
    for path in (places.node_state, places.node_key):
        os.chown(path, number, -1)
    for path in _forbidden(places, merchant):
        if path.exists() and _may_read(user, path):
            raise PolicyError(
                f"{path}: the user '{user}' (node.user) can read it, and must not: chmod o-r"
            )
    for path in (places.node_key, places.enrolment, Path(os.path.realpath(tethered(())[0]))):
        if not _may_read(user, path):
            raise PolicyError(
                f"{path}: the user '{user}' (node.user) cannot read it; let others pass through "
                f"the folders above it: chmod o+x"
            )


def _forbidden(places: Places, merchant: Merchant) -> list[Path]:
    """Return the files that are for the worker alone."""
    found = [merchant.merchant.key, merchant.ledger.path, merchant.merchant.session]
    if merchant.data.path is not None:
        found.append(merchant.data.path)
    else:
        found.append(places.merchant)  # the database's password is in it
    return found


def _may_read(user: str, path: Path) -> bool:
    """Ask the kernel: permissions of files, folders and access lists, whatever there is."""
    command = tethered([_TEST, "-r", str(path)], user=user)
    return subprocess.run(command, check=False, capture_output=True).returncode == 0  # noqa: S603
