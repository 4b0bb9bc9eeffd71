"""A merchant's ledger -> evidence that an auditor can read. Docs: docs/evidence.md.

What goes in is listed here, file by file. Contracts and members are written anew from what was
read, so that nobody's comments or paths go with them; tables, private keys and the session of a
secure sum are never opened.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.enrolment import budget_of, enrolment, pinned
from clients.merchant import Merchant, read_merchant
from common.chain import Entry
from common.contract import Contract, contract_toml, read_contract
from common.errors import LedgerError
from common.evidence import write_evidence
from common.identity import Identity, Members, members_toml
from common.ledger_entries import StoredLedger, read_ledger
from common.versions import code_sha256, hansa_version

MERCHANT = "merchant"


@dataclass(frozen=True)
class Books:
    """What a merchant's evidence is made of."""

    ledger: StoredLedger
    members: Members
    contracts: tuple[Contract, ...]  # that the merchant still has
    min_cohort: int

    @property
    def spoken_of(self) -> set[str]:
        """Return the hashes of all contracts that the ledger speaks of."""
        documents = (entry.document for entry in self.ledger.entries)
        return {str(found["contract"]) for found in documents if found.get("contract")}

    @property
    def missing(self) -> set[str]:
        """Return the hashes of contracts that an auditor would have to do without."""
        return self.spoken_of - {contract.sha256 for contract in self.contracts}

    def files(self) -> dict[str, bytes]:
        """Return the files of the evidence by name."""
        stored, spoken_of = self.ledger, self.spoken_of
        policy = {**stored.account.budget.document, "min_cohort": self.min_cohort}
        found = {
            "ledger.jsonl": _lines([_line_of(entry) for entry in stored.entries]),
            "witness.jsonl": _lines(
                [
                    {"body": seen.body.decode(), "signature": seen.signature.hex()}
                    for seen in stored.countersignatures
                ]
            ),
            "members.toml": members_toml(self.members).encode(),
            "policy.json": json.dumps(policy, indent=2, sort_keys=True).encode() + b"\n",
        }
        for contract in self.contracts:
            if contract.sha256 in spoken_of:
                found[f"contracts/{contract.sha256}.toml"] = contract_toml(contract).encode()
        return found


def write_books(books: Books, identity: Identity, out: Path) -> None:
    """Write a merchant's evidence, signed with its identity.

    Args:
        books: What goes in.
        identity: The merchant's.
        out: A zip file if the name ends in .zip, else a folder.

    Raises:
        EvidenceError: Something else is there, or it cannot be written.
    """
    write_evidence(
        out,
        MERCHANT,
        identity.merchant,
        books.files(),
        identity.key,
        time.time(),
        hansa_version(),
        code_sha256(),
    )


def open_books(path: Path, earlier: Sequence[Path] = ()) -> tuple[Books, Identity]:
    """Read what a merchant's evidence is made of; nothing is written.

    Args:
        path: The `merchant.toml`.
        earlier: Files of earlier contracts, beside the pinned one.

    Raises:
        HansaError: A file of the merchant cannot be used.
        LedgerError: There is no ledger yet, or it was changed.
    """
    path = path.absolute()
    merchant = read_merchant(path)
    identity, members = enrolment(merchant, path.parent)
    stored = stored_ledger(merchant, identity)
    files = [pinned(path.parent, "contract.toml"), *earlier]
    contracts = tuple(read_contract(file) for file in files if file.is_file() or file in earlier)
    return Books(stored, members, contracts, merchant.policy.min_cohort), identity


def stored_ledger(merchant: Merchant, identity: Identity) -> StoredLedger:
    """Return what a merchant's ledger holds, checked.

    Raises:
        LedgerError: There is none yet, or it was changed.
    """
    if not merchant.ledger.path.exists():
        raise LedgerError(
            f"{merchant.ledger.path}: there is no ledger yet; it begins with the first run"
        )
    return read_ledger(merchant.ledger.path, budget_of(merchant), identity.public)


def head_line(identity: Identity, entries: Sequence[Entry]) -> str:
    """Return the line that anchors a ledger: key, number and link of its last entry."""
    last = entries[-1]
    return f"hansa head {identity.public.hex()} {last.seq} {last.link.hex()}"


def _line_of(entry: Entry) -> dict[str, Any]:
    return {
        "seq": entry.seq,
        "body": entry.body.decode(),
        "link": entry.link.hex(),
        "signature": entry.signature.hex(),
    }


def _lines(documents: Sequence[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(document).encode() + b"\n" for document in documents)
