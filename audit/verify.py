"""`verify`: everything that evidence can show, with a finding for whatever does not fit."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from audit.codes import Flaw, Notebook
from audit.crosscheck import check_code, check_known, check_planned, check_run, runs_of
from audit.findings import Audit, AuditedRun, Spending
from audit.published import Published, check_end, check_published, read_published
from audit.reading import (
    MerchantFiles,
    ServerFiles,
    find_evidence,
    read_contracts,
    read_merchant,
    read_server,
)
from audit.replay import Replay, replay
from audit.runs import (
    RECORD,
    RunRecord,
    check_prefix,
    check_sessions,
    check_sums,
    read_record,
)
from audit.spending import check_reservations, epsilon_of, opinions_of, spending_of
from audit.witness import (
    Anchor,
    check_anchors,
    check_clock,
    check_expiries,
    check_log,
    check_log_complete,
    check_own,
    check_witnessed,
)
from common import statements
from common.chain import Seen
from common.contract import Contract
from common.evidence import COORDINATOR, Evidence
from common.identity import Members
from common.rotation import WITNESS


def verify(paths: Sequence[Path], anchors: Sequence[Anchor] = ()) -> Audit:
    """Check all evidence at, or below, some paths, by itself and against each other.

    Args:
        paths: Evidence (a zip file or a folder), or folders that hold several at any depth.
        anchors: Heads of ledgers that the auditor knows from earlier.

    Raises:
        EvidenceError: A path is not there, or no evidence is.
    """
    notes = Notebook()
    found = find_evidence(paths, notes)
    case = _Case(
        notes=notes,
        contracts=read_contracts(found, notes),
        merchants=_newest_merchants(found, notes),
        servers=_servers(found, notes),
    )
    _check_members(case)
    _check_anchors(case, anchors)
    spending = [_merchant(case, merchant) for merchant in case.merchants]
    runs = _runs(case)
    for merchant in case.merchants:
        check_known(merchant, case.recorded, case.told_at, notes)
    if not case.servers and any(m.book.runs for m in case.merchants):
        told = "no coordinator's evidence: nothing can be held against it, or replayed"
        notes.add("no-evidence-of-server", "evidence", told)
    heads = {merchant.evidence.path: str(_head(merchant)) for merchant in case.merchants}
    return Audit(
        evidence=tuple(_described(one, heads.get(one.path)) for one in found),
        findings=tuple(dict.fromkeys(notes.findings)),
        spending=tuple(spending),
        runs=tuple(runs),
        checks=dict(notes.checks),
    )


@dataclass
class _Case:
    """All that was read."""

    notes: Notebook
    contracts: Mapping[str, Contract]
    merchants: Sequence[MerchantFiles]  # one a merchant, the newest
    servers: Sequence[ServerFiles]  # the newest first
    recorded: set[str] = field(default_factory=set)  # runs that a coordinator tells of

    @property
    def told_at(self) -> float | None:
        """Return when the newest coordinator's evidence was made."""
        return self.servers[0].evidence.made_at if self.servers else None

    def log_of(self, merchant: str) -> Sequence[Seen]:
        """Return what all of the witness's logs say of a merchant."""
        found = (seen for server in self.servers for seen in server.log.get(merchant, ()))
        return tuple(dict.fromkeys(found))

    def newest_log_of(self, merchant: str) -> Sequence[Seen]:
        """Return what the newest witness log says of a merchant."""
        return self.servers[0].log.get(merchant, ()) if self.servers else ()


def _described(evidence: Evidence, head: str | None) -> dict[str, Any]:
    described: dict[str, Any] = {
        "name": evidence.name,
        "kind": evidence.kind,
        "made_at": evidence.made_at,
        "hansa": evidence.hansa,
        "code": evidence.code,
        "key": evidence.key.hex(),
        "files": {n: hashlib.sha256(c).hexdigest() for n, c in sorted(evidence.files.items())},
    }
    return described if head is None else {**described, "head": head}


def _head(merchant: MerchantFiles) -> Anchor:
    last = merchant.entries[-1]
    return Anchor(merchant.evidence.key, last.seq, last.link)


def _newest_merchants(found: Iterable[Evidence], notes: Notebook) -> list[MerchantFiles]:
    """Return each merchant's longest ledger; an older one must be how it begins."""
    newest: dict[str, MerchantFiles] = {}
    for evidence in found:
        if evidence.kind != "merchant":
            continue
        one = read_merchant(evidence, notes)
        if one is None or not one.entries:
            continue
        other = newest.setdefault(one.name, one)
        older, newer = sorted((one, other), key=lambda m: (len(m.entries), m.evidence.made_at))
        newest[one.name] = newer
        if older is not newer:
            check = _head(older)
            told = "two evidences of one merchant hold different ledgers"
            same = newer.entries[check.seq - 1].link == check.link
            notes.check(same, "forked", one.name, told)
            shrunk = len(older.entries) < len(newer.entries)
            shrunk &= older.evidence.made_at > newer.evidence.made_at
            told = (
                f"an earlier evidence holds {len(newer.entries)} entries, a later one "
                f"{len(older.entries)}: the ledger was put back from a copy, or shortened"
            )
            notes.check(not shrunk, "rolled-back", one.name, told)
    return [newest[name] for name in sorted(newest)]


def _servers(found: Iterable[Evidence], notes: Notebook) -> list[ServerFiles]:
    read = [read_server(evidence, notes) for evidence in found if evidence.kind == "server"]
    servers = [server for server in read if server is not None]
    for server in servers:
        for seen in server.log.values():
            check_clock(seen, COORDINATOR, notes)
    return sorted(servers, key=lambda server: -server.evidence.made_at)


def _check_members(case: _Case) -> None:
    """Check that everybody pinned the same members and the same witness."""
    parties: list[MerchantFiles | ServerFiles] = [*case.merchants, *case.servers]
    pinned: list[tuple[str, Members]] = [(p.evidence.name, p.members) for p in parties]
    case.notes.count("lists of members", len(pinned))
    if not pinned:
        return
    newer = {(one.merchant, one.old): one.new for _, members in pinned for one in members.rotations}
    lists = [_of_today(members, newer) for _, members in pinned]
    common = max(lists, key=lists.count)
    named = zip(pinned, lists, strict=True)
    others = sorted({name for (name, _), members in named if members != common})
    told = f"other members, or another witness, than most pinned: {', '.join(others[:20])}"
    case.notes.check(not others, "members-differ", "members.toml", told)


def _of_today(members: Members, newer: Mapping[tuple[str, bytes], bytes]) -> dict[str, bytes]:
    """Return owner -> key after all rotations that anybody's list proves."""
    return {
        owner: _latest(owner, key, newer)
        for owner, key in [*members.keys.items(), (WITNESS, members.witness)]
    }


def _latest(owner: str, key: bytes, newer: Mapping[tuple[str, bytes], bytes]) -> bytes:
    for _ in newer:  # lists of liars may go round in circles
        key = newer.get((owner, key), key)
    return key


def _check_anchors(case: _Case, anchors: Sequence[Anchor]) -> None:
    known = {key for merchant in case.merchants for key in merchant.keys}
    for anchor in anchors:
        told = f"no ledger here has the key of '{anchor}'"
        case.notes.check(anchor.key in known, "anchor-unknown", "anchors", told)
    for merchant in case.merchants:
        check_anchors(anchors, merchant.keys, merchant.entries, merchant.name, case.notes)


def _merchant(case: _Case, merchant: MerchantFiles) -> Spending:
    """Check one merchant's ledger and return what it spent."""
    notes, name, book = case.notes, merchant.name, merchant.book
    log = case.log_of(name)
    check_own(merchant.entries, merchant.seen, name, notes)
    check_witnessed(book, merchant.seen, name, notes)
    period = merchant.policy.refresh_days
    check_expiries(book, [*merchant.seen, *log], period, name, notes)
    check_log(merchant.entries, log, merchant.evidence.made_at, name, notes)
    if case.told_at is not None:
        known = [*merchant.seen, *log]
        check_log_complete(known, case.newest_log_of(name), case.told_at, name, notes)
    told = (book.opening.get("unit"), book.opening.get("relation"))
    notes.check(
        told == (statements.UNIT, statements.RELATION),
        "unit-differs",
        f"{name}, entry 1",
        "the ledger's unit of privacy, or its neighbouring relation, is not the auditor's",
    )
    check_reservations(book, merchant.policy, name, notes)
    check_planned(merchant, case.contracts, notes)
    return spending_of(name, book, merchant.policy)


def _runs(case: _Case) -> list[AuditedRun]:
    """Check every run, once, in the newest evidence that tells of it."""
    newest: dict[str, tuple[ServerFiles, Mapping[str, bytes]]] = {}
    for server in case.servers:
        for run, files in server.runs.items():
            if run not in newest:
                newest[run] = server, files
                continue
            older, newer = files.get(RECORD, b""), newest[run][1].get(RECORD, b"")
            check_prefix(older, newer, f"run {run}", case.notes)
    found = [_run(case, run, *newest[run]) for run in sorted(newest)]
    for run in {r for merchant in case.merchants for r in merchant.book.runs} - {*newest}:
        check_code(None, dict(runs_of(case.merchants, run)), f"run {run}", case.notes)
    return [run for run in found if run is not None]


def _run(
    case: _Case, run: str, server: ServerFiles, files: Mapping[str, bytes]
) -> AuditedRun | None:
    where, notes = f"run {run}", case.notes
    case.recorded.add(run)
    try:
        record = read_record(run, files)
    except Flaw as flaw:
        notes.add(flaw.code, where, str(flaw))
        return None
    enrolled = {*record.merchants} <= {*server.members.keys}
    notes.check(enrolled, "not-enrolled", where, "a merchant of the run is not in members.toml")
    check_sessions(record, server.members, where, notes)
    check_sums(record, where, notes)
    replayed = replay(record.contract, record.first, record.sums)
    check_end(record, replayed, where, notes)
    published = _published(record, files, where, notes)
    if published is not None:
        signed = published.bundle.signer in server.members.witnesses
        told = "the bundle is signed with a key that is not this coordinator's"
        notes.check(signed, "bundle-differs", where, told)
        check_published(record, replayed, published, where, notes)
    check_code(record, dict(runs_of(case.merchants, run)), where, notes)
    bundle = any(name.startswith("bundle/") for name in files)
    told = "a bundle was published, and the record does not tell that the run came to its end"
    notes.check(not bundle or record.end is not None, "bundle-differs", where, told)
    matched = check_run(record, case.merchants, notes, published=bundle)
    return _audited(record, replayed, published, matched, notes)


def _published(
    record: RunRecord, files: Mapping[str, bytes], where: str, notes: Notebook
) -> Published | None:
    try:
        published = read_published(files)
    except Flaw as flaw:
        notes.add(flaw.code, where, str(flaw))
        return None
    told = "the run came to its end, and the evidence holds no bundle of it"
    notes.check(published is not None or record.end is None, "bundle-missing", where, told)
    return published


def _audited(
    record: RunRecord,
    replayed: Replay,
    published: Published | None,
    matched: Sequence[str],
    notes: Notebook,
) -> AuditedRun:
    contract, delta = record.contract, record.contract.privacy.delta
    events = [one.event for one in record.sums]
    where = f"run {record.run}"
    differs = any(f.code == "replay-differs" and f.where.startswith(where) for f in notes.findings)
    checkable = record.end is not None and published is not None
    documents = {} if published is None else published.documents
    return AuditedRun(
        run=record.run,
        contract=contract.model_dump(mode="json"),
        contract_sha256=contract.sha256,
        began_at=float(record.start["at"]),
        merchants=record.merchants,
        finished=record.end is not None,
        privacy=dict(documents.get("privacy.json", {})),
        recomputed=epsilon_of(events, delta),
        opinions=opinions_of(events, delta),
        replayed=False if differs else (True if checkable else None),
        fewest=record.fewest,
        matched=tuple(matched),
    )
