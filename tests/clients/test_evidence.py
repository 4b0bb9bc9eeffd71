"""Tests of a merchant's evidence: all of the ledger, and nothing of a customer."""

import json
import sqlite3
from pathlib import Path

import pytest

from clients.evidence import head_line, open_books, write_books
from clients.joining import open_worker
from common.budget import Occasion
from common.contract import Contract, contract_toml, read_contract
from common.errors import ContractError, IdentityError, LedgerError
from common.evidence import read_evidence
from common.identity import Identity, Members, read_identity, write_identity, write_members
from common.ledger import whole_run
from common.ledger_entries import checked_entries
from common.plan import plan_of
from server.witness import Witness

ROWS = "customer_id,spend,age,visits,member,plan,segment\n1,1234.5,37,2,1,basic,low\n"


@pytest.fixture
def folder(contract: Contract, tmp_path: Path) -> Path:
    """Give the folder of a merchant with a ledger of one run that broke off."""
    folder = tmp_path / "secret-place"
    folder.mkdir()
    (folder / "contract.toml").write_text("# our secret remark\n" + contract_toml(contract))
    (folder / "table.csv").write_text(ROWS)
    (folder / "session.sealed").write_text("the session")
    (folder / "merchant.toml").write_text(
        '[merchant]\nid = "shop"\n[data]\nkind = "customers"\npath = "table.csv"\n'
        "[policy]\nepsilon = 2.0\ndelta = 1e-5\n"
    )
    identity, coordinator = Identity.generate("shop"), Identity.generate("coordinator")
    write_identity(identity, folder / "identity.key")
    members = folder / "members.toml"
    write_members(Members({"shop": identity.public}, coordinator.public), members)
    members.write_text("# telephone of the boss: 12345\n" + members.read_text())
    witness = Witness(folder / "witness.sqlite", coordinator)
    _break_off(folder, witness)
    return folder


def _break_off(folder: Path, witness: Witness) -> None:
    """Reserve for a run, let it be witnessed, and release its first sum only."""
    worker = open_worker(folder / "merchant.toml").worker
    ledger, contract = worker.ledger, worker.contract
    plan, key = plan_of(contract), ledger.identity.public
    charges = plan.charges(1)
    head = ledger.reserve(whole_run("run", contract.sha256), charges, plan.last(10))
    assert witness.countersign({"shop": (key, head)}) == {}
    census = Occasion("run", "census", 0, 0, contract.sha256)
    ledger.release(census, charges[0], "0" * 64, countersigned=witness.latest(key))
    ledger.close()


def evidence_of(folder: Path, out: Path) -> dict[str, bytes]:
    """Write a merchant's evidence and read its files back."""
    books, identity = open_books(folder / "merchant.toml")
    write_books(books, identity, out)
    return read_evidence(out).files


def test_holds_what_the_format_says(folder: Path, tmp_path: Path) -> None:
    """Just these files."""
    files = evidence_of(folder, tmp_path / "e.zip")
    contract = read_contract(folder / "contract.toml")
    assert set(files) == {
        "ledger.jsonl",
        "witness.jsonl",
        "members.toml",
        "policy.json",
        f"contracts/{contract.sha256}.toml",
    }
    assert json.loads(files["policy.json"]) == {
        "epsilon": 2.0,
        "delta": 1e-5,
        "epsilon_towards_server": None,
        "refresh_days": None,
        "purposes": {},
        "min_cohort": 3,
    }
    (seen,) = map(json.loads, files["witness.jsonl"].splitlines())
    assert json.loads(seen["body"])["seq"] == 2


def test_entries_are_the_ledgers_own(folder: Path, tmp_path: Path) -> None:
    """Byte for byte, so that links and signatures can be checked."""
    files = evidence_of(folder, tmp_path / "e")
    lines = [json.loads(line) for line in files["ledger.jsonl"].splitlines()]
    rows = [
        (
            line["seq"],
            line["body"].encode(),
            bytes.fromhex(line["link"]),
            bytes.fromhex(line["signature"]),
        )
        for line in lines
    ]
    public = read_identity("shop", folder / "identity.key").public
    entries = checked_entries(rows, public, "evidence")
    assert [entry.document["kind"] for entry in entries] == ["open", "reserve", "release"]


def test_the_merchant_signed_it(folder: Path, tmp_path: Path) -> None:
    """With the key that is enrolled."""
    evidence_of(folder, tmp_path / "e.zip")
    evidence = read_evidence(tmp_path / "e.zip")
    assert (evidence.kind, evidence.name) == ("merchant", "shop")
    assert evidence.key == read_identity("shop", folder / "identity.key").public


def test_holds_no_customer_no_path_no_secret(folder: Path, tmp_path: Path) -> None:
    """Nor anybody's comments; also not the private key in bytes."""
    files = evidence_of(folder, tmp_path / "e")
    key = (folder / "identity.key").read_text().strip()
    text = b"\n".join([*files.values(), *(name.encode() for name in files)])
    text += (tmp_path / "e" / "evidence.json").read_bytes()
    for secret in ("1234.5", "table.csv", "customer_id", "the session", key, "secret", "12345",
                   "session", str(tmp_path), ".sqlite", "identity.key"):  # fmt: skip
        assert secret.encode() not in text, secret
    assert bytes.fromhex(key) not in text


def test_a_contract_that_the_ledger_does_not_speak_of_stays_out(
    folder: Path, tmp_path: Path
) -> None:
    """The earlier one, which it does speak of, can be added."""
    earlier = folder / "earlier.toml"
    (folder / "contract.toml").rename(earlier)
    old = read_contract(earlier)
    new = old.revised(training={"rounds": 5})
    (folder / "contract.toml").write_text(contract_toml(new))
    books, _ = open_books(folder / "merchant.toml")
    assert books.missing == {old.sha256}
    assert not any(name.startswith("contracts/") for name in books.files())
    books, _ = open_books(folder / "merchant.toml", [earlier])
    assert books.missing == set()
    assert [n for n in books.files() if n.startswith("contracts/")] == [
        f"contracts/{old.sha256}.toml"
    ]
    with pytest.raises(ContractError, match="no such contract"):
        open_books(folder / "merchant.toml", [folder / "none.toml"])


def test_nothing_is_written_to_the_ledger(folder: Path, tmp_path: Path) -> None:
    """Its bytes stay."""
    before = (folder / "ledger.sqlite").read_bytes()
    evidence_of(folder, tmp_path / "e.zip")
    assert (folder / "ledger.sqlite").read_bytes() == before


def test_the_anchor_names_the_last_entry(folder: Path) -> None:
    """Key, number and link."""
    books, identity = open_books(folder / "merchant.toml")
    last = books.ledger.entries[-1]
    line = head_line(identity, books.ledger.entries)
    assert line == f"hansa head {identity.public.hex()} 3 {last.link.hex()}"


def test_without_a_ledger_there_is_nothing_to_show(folder: Path) -> None:
    """The message says when it begins."""
    (folder / "ledger.sqlite").unlink()
    with pytest.raises(LedgerError, match="begins with the first run"):
        open_books(folder / "merchant.toml")


def test_a_changed_ledger_is_no_evidence(folder: Path) -> None:
    """The entry is named."""
    with sqlite3.connect(folder / "ledger.sqlite") as file:
        file.execute("DROP TRIGGER entry_no_update")
        file.execute(
            "UPDATE entry SET body = CAST(replace(body, 'census', 'update') AS BLOB) WHERE seq = 2"
        )
    file.close()
    with pytest.raises(LedgerError, match="entry 2 was changed"):
        open_books(folder / "merchant.toml")


def test_a_file_that_is_no_ledger(folder: Path) -> None:
    """Is told as such."""
    (folder / "ledger.sqlite").write_text("not a database at all, " * 50)
    with pytest.raises(LedgerError, match="cannot be read as a ledger"):
        open_books(folder / "merchant.toml")


def test_another_key_signs_nothing(folder: Path) -> None:
    """Who is not enrolled makes no evidence."""
    (folder / "identity.key").unlink()
    write_identity(Identity.generate("shop"), folder / "identity.key")
    with pytest.raises(IdentityError, match="not enrolled"):
        open_books(folder / "merchant.toml")
