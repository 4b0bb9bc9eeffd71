"""What ledgers in tests need: a witness that all of them pin, and short ways to read them."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from clients.worker import Worker
from common.budget import Budget, Charge
from common.chain import NO_LINK, Head, body_bytes, link_after, signed_head
from common.identity import Identity
from common.ledger import Ledger
from common.wire import Advertise
from server.archive import Archive, RunRecord
from server.witness import Witness

COORDINATOR = Identity.generate("coordinator")  # countersigns for every ledger of these tests


def ledger_at(path: Path, identity: Identity, budget: Budget) -> Ledger:
    """Open a ledger that pins the tests' coordinator."""
    return Ledger(path, budget, identity, COORDINATOR.public)


def key_of(ledger: Ledger) -> bytes:
    """Return the public key that signs a ledger."""
    return bytes.fromhex(ledger.entries()[0].document["key"])


@cache
def _folder() -> Path:
    """Make a folder that is gone with this process.

    What lies in it needs to outlive no power cut: where there is a disk in memory it is there.
    """
    memory = Path("/dev/shm")  # noqa: S108
    folder = tempfile.mkdtemp(prefix="hansa-tests-", dir=memory if memory.is_dir() else None)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@cache
def witness() -> Witness:
    """Return the witness of these tests; it remembers the heads of all of them."""
    return Witness(_folder() / "witness.sqlite", COORDINATOR)


def new_record() -> RunRecord:
    """Return the record of a run that nobody reads."""
    return RunRecord(Path(tempfile.mkdtemp(dir=_folder())) / "run")


def archive_at(folder: Path) -> Archive:
    """Return the folder of the tests' coordinator."""
    return Archive(folder, COORDINATOR, witness())


def latest(ledger: Ledger) -> bytes:
    """Return what the witness saw last of a ledger, countersigned; or nothing."""
    return witness().latest(key_of(ledger))


def seen(ledger: Ledger, head: bytes) -> bytes:
    """Let the witness see a ledger's head; return what it countersigned."""
    refused = witness().countersign({"shop": (key_of(ledger), Head.from_bytes(head))})
    assert refused == {}
    return latest(ledger)


def reserved(worker: Worker, run: str = "run") -> bytes:
    """Let a merchant of plain sums reserve a run; return the countersignature that it needs."""
    message = Advertise(run, worker.contract.sha256, 0, latest(worker.ledger))
    return seen(worker.ledger, worker.advertise(message).head)


def still_head(identity: Identity) -> Head:
    """Return the head of a ledger of one entry, for a merchant that keeps none and never pays."""
    link = link_after(NO_LINK, body_bytes({"kind": "open"}))
    signature = identity.sign(signed_head(identity.public, 1, link))
    return Head(1, link, signature, 1, ())


def entries_of(ledger: Ledger, kind: str) -> list[dict[str, Any]]:
    """Return the entries of one kind, in order."""
    found = [entry.document for entry in ledger.entries()]
    return [document for document in found if document["kind"] == kind]


def charges_of(ledger: Ledger, run: str | None = None) -> dict[tuple[str, int, int], Charge]:
    """Return (stage, round, attempt) -> charge of the releases of one run, in order.

    Without a run: of the only one that there may be.
    """
    runs = ledger.account().runs
    if run is None:
        assert len(runs) <= 1, "say of which run"
        run = next(iter(runs), "")
    return runs[run].released if run in runs else {}
