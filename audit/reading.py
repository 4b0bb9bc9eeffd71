"""From paths to evidence whose files were read: what cannot be read becomes a finding."""

import os
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath

from audit import fields
from audit.codes import Flaw, Notebook
from audit.ledger import Reign, check_chain, read_document, read_entries, reigns
from audit.rules import Book, read_book
from audit.spending import Policy
from audit.witness import read_countersignatures, read_witness_log
from common.chain import Entry, Seen
from common.contract import Contract, parse_contract
from common.errors import ContractError, EvidenceError, IdentityError
from common.evidence import COORDINATOR, INDEX, Evidence, read_evidence
from common.identity import Members, read_members

_POLICY: fields.Fields = {**fields.POLICY, "min_cohort": fields.whole}


@dataclass(frozen=True)
class MerchantFiles:
    """A merchant's evidence, read; its chain holds."""

    evidence: Evidence
    members: Members
    policy: Policy
    entries: Sequence[Entry]
    book: Book
    seen: Sequence[Seen]  # what the witness countersigned, as the merchant has it
    reigns: Sequence[Reign]  # which key signed from which entry on

    @property
    def name(self) -> str:
        """Return the merchant's id."""
        return self.evidence.name

    @property
    def keys(self) -> tuple[bytes, ...]:
        """Return the keys of the ledger, oldest first."""
        return tuple(reign.key for reign in self.reigns)

    def key_after(self, seq: int) -> bytes:
        """Return the key that was the merchant's when an entry was the last one."""
        return next(reign.key for reign in reversed(self.reigns) if reign.first <= seq + 1)


@dataclass(frozen=True)
class ServerFiles:
    """A coordinator's evidence, read as far as all runs share it."""

    evidence: Evidence
    members: Members
    log: Mapping[str, Sequence[Seen]]  # merchant -> heads that were countersigned
    runs: Mapping[str, Mapping[str, bytes]]  # run -> files below its folder


def find_evidence(paths: Iterable[Path], notes: Notebook) -> list[Evidence]:
    """Read all evidence at, or at any depth below, some paths.

    Raises:
        EvidenceError: A path is not there, or there is no evidence at all.
    """
    places: list[Path] = []
    for path in paths:
        if not path.exists():
            raise EvidenceError(f"{path}: there is no such file or folder")
        places += [place for place in _places(path, notes) if place not in places]
    if not places:
        raise EvidenceError(f"{', '.join(map(str, paths))}: no evidence was found there")
    found = [_read(place, notes) for place in places]
    return [evidence for evidence in found if evidence is not None]


def _places(path: Path, notes: Notebook) -> Iterator[Path]:
    if not path.is_dir() or (path / INDEX).exists():
        yield path
        return
    for parent, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if INDEX in names:
            folders.clear()
            yield Path(parent)
            continue
        for name in sorted(names):
            if name.endswith(".zip") and not name.startswith("."):
                yield from _zip_place(Path(parent) / name, notes)


def _zip_place(path: Path, notes: Notebook) -> Iterator[Path]:
    """Yield a zip file that was found in a folder, unless it was never meant as evidence."""
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            meant = INDEX in archive.namelist()
    except (OSError, zipfile.BadZipFile, ValueError):
        meant = True
    if meant:
        yield path
    else:
        notes.add("not-evidence", str(path), f"a zip file without {INDEX}; it was passed over")


def _read(path: Path, notes: Notebook) -> Evidence | None:
    try:
        evidence = read_evidence(path)
    except EvidenceError as error:
        notes.add("evidence-invalid", str(path), str(error))
        return None
    notes.count("evidence signatures")
    notes.count("files of evidence", len(evidence.files))
    return evidence


def read_merchant(evidence: Evidence, notes: Notebook) -> MerchantFiles | None:
    """Read a merchant's evidence; None, and findings, where its ledger cannot be relied on."""
    where = evidence.name
    try:
        members = _members(evidence)
        _check_enrolled(evidence, members.keys.get(evidence.name), notes)
        policy = _policy(evidence)
        entries = read_entries(_file(evidence, "ledger.jsonl"))
        notes.count("ledger entries", len(entries))
        broken = check_chain(entries, evidence.key)
        if broken is not None:
            notes.add(broken.code, f"{where}, entry {broken.seq}", broken.message)
            return None
        documents = [read_document(entry) for entry in entries]
        notes.check(bool(entries), "open-rule", where, "the ledger has no entry at all")
        book = read_book(documents, where, notes)
        found = reigns(entries, evidence.key)
        keys = [reign.key for reign in found]
        seen = read_countersignatures(_file(evidence, "witness.jsonl"), members, keys)
    except Flaw as flaw:
        notes.add(flaw.code, where, str(flaw))
        return None
    _check_owner(evidence, book, keys[0], notes)
    missing = [key.hex()[:16] for key in members.keys_of(evidence.name) if key not in keys]
    told = f"members.toml tells of a rotation that the ledger does not; it lacks {missing}"
    notes.check(not missing or not entries, "rekey-missing", where, told)
    _tell_rotations(members, notes)
    return MerchantFiles(evidence, members, policy, entries, book, seen, found)


def _tell_rotations(members: Members, notes: Notebook) -> None:
    """Say which keys the witness had before; `read_members` checked both signatures of each."""
    for before, after in pairwise(members.witnesses):
        told = f"the witness's key {before.hex()[:16]} was rotated to {after.hex()[:16]}"
        notes.add("key-rotated", COORDINATOR, f"{told}, signed by both keys")


def _check_owner(evidence: Evidence, book: Book, first: bytes, notes: Notebook) -> None:
    opening = book.opening
    told = opening.get("merchant"), opening.get("key")
    notes.check(
        told == (evidence.name, first.hex()) or opening.get("kind") != "open",
        "ledger-foreign",
        f"{evidence.name}, entry 1",
        "the ledger was opened by another merchant, or with another key, than the evidence's",
    )


def _check_enrolled(evidence: Evidence, key: bytes | None, notes: Notebook) -> None:
    notes.check(
        key == evidence.key,
        "not-enrolled",
        evidence.name,
        f"'{evidence.name}' did not sign this evidence with the key that members.toml names",
    )


def read_server(evidence: Evidence, notes: Notebook) -> ServerFiles | None:
    """Read a coordinator's evidence; None, and findings, where it cannot be relied on."""
    try:
        members = _members(evidence)
        _check_enrolled(evidence, members.witness or None, notes)
        raw = _file(evidence, "witness.jsonl")
        logged = read_witness_log(raw, members)
    except Flaw as flaw:
        notes.add(flaw.code, COORDINATOR, str(flaw))
        return None
    _tell_rotations(members, notes)
    log: dict[str, list[Seen]] = {}
    for one in logged:
        log.setdefault(one.merchant, []).append(one.seen)
    return ServerFiles(evidence, members, log, _runs(evidence))


def _runs(evidence: Evidence) -> dict[str, dict[str, bytes]]:
    runs: dict[str, dict[str, bytes]] = {}
    for name, content in evidence.files.items():
        parts = PurePosixPath(name).parts
        if parts[0] == "runs" and len(parts) > 2:
            runs.setdefault(parts[1], {})["/".join(parts[2:])] = content
    return runs


def _file(evidence: Evidence, name: str) -> bytes:
    if name not in evidence.files:
        raise Flaw("evidence-incomplete", f"{name} is missing from the evidence")
    return evidence.files[name]


def _members(evidence: Evidence) -> Members:
    raw = _file(evidence, "members.toml")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "members.toml"
        path.write_bytes(raw)
        try:
            return read_members(path)
        except IdentityError as error:
            told = str(error).replace(str(path), "members.toml")
            raise Flaw("evidence-incomplete", told) from None


def _policy(evidence: Evidence) -> Policy:
    raw = _file(evidence, "policy.json")
    document = fields.an_object(raw, "evidence-incomplete", "policy.json")
    wrong = fields.wrong_fields(document, _POLICY)
    if wrong:
        raise Flaw("evidence-incomplete", f"policy.json: field '{wrong[0][:40]}' is wrong")
    return Policy.of({name: document[name] for name in fields.POLICY})


def contract_of(raw: bytes, name: str) -> Contract:
    """Read a contract's file.

    Raises:
        Flaw: It is no contract.
    """
    try:
        return parse_contract(tomllib.loads(raw.decode()), source=name)
    except (ContractError, ValueError, RecursionError) as error:
        raise Flaw("contract-differs", f"{name}: cannot be read ({error})") from None


def read_contracts(evidence: Iterable[Evidence], notes: Notebook) -> dict[str, Contract]:
    """Return all contracts by hash; a file that is named after another hash is a finding."""
    found: dict[str, Contract] = {}
    for one in evidence:
        for name, raw in sorted(one.files.items()):
            parts = PurePosixPath(name).parts
            named = parts[1].removesuffix(".toml") if parts[0] == "contracts" else ""
            if named or (parts[0] == "runs" and parts[2:] == ("contract.toml",)):
                _add_contract(found, f"{one.name}, {name}", raw, named, notes)
    return found


def _add_contract(
    found: dict[str, Contract], where: str, raw: bytes, named: str, notes: Notebook
) -> None:
    try:
        contract = contract_of(raw, where)
    except Flaw as flaw:
        notes.add(flaw.code, where, str(flaw))
        return
    notes.count("contracts")
    told = f"holds the contract {contract.sha256}"
    if notes.check(named in {"", contract.sha256}, "contract-differs", where, told):
        found[contract.sha256] = contract
