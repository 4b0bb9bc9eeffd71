"""The coordinator's record of a run against each merchant's ledger, in both directions.

What the coordinator counted, a merchant must have written down before; what a merchant wrote
down, the coordinator must have asked for. Neither side can hide a sum without the other's help.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from audit.codes import Notebook
from audit.reading import MerchantFiles
from audit.rules import Charge, LedgerRun, Occasion, Release
from audit.runs import RecordedSum, RunRecord, Session, release_of
from common.chain import is_signed
from common.contract import Contract
from common.plan import PROFILE
from common.session import Advert, threshold


def check_planned(
    merchant: MerchantFiles, contracts: Mapping[str, Contract], notes: Notebook
) -> None:
    """Check that a ledger released only what its contracts plan."""
    missing = set()
    for run in merchant.book.runs.values():
        contract = contracts.get(run.contract)
        if contract is None:
            missing.add(run.contract)
            continue
        for occasion, release in run.releases.items():
            notes.count("releases held against a contract")
            notes.check(
                _is_planned(contract, occasion, release.charge),
                "release-not-planned",
                f"{merchant.name}, entry {release.seq}",
                f"contract {run.contract[:16]} plans no such release: {_told(occasion)}",
            )
        if contract.aggregation.secure:
            _check_masked(merchant.name, run, contract, notes)
    for sha256 in sorted(missing):
        told = f"contract {sha256} is in no evidence: its releases cannot be held against it"
        notes.add("contract-missing", merchant.name, told)


def _check_masked(name: str, run: LedgerRun, contract: Contract, notes: Notebook) -> None:
    """Check that what a contract wants masked was, and was unmasked over enough merchants only."""
    fewest = contract.min_survivors
    for roster, members in run.joined.items():
        told = (
            f"joined session {roster[:16]} of {members} merchants, the contract asks for {fewest}"
        )
        notes.check(members >= fewest, "below-threshold", f"{name}, run {run.run}", told)
    for occasion, release in run.releases.items():
        notes.check(
            bool(release.step),
            "step-not-joined",
            f"{name}, entry {release.seq}",
            "was released in no session of secure sums, so without a mask; the contract's sums are "
            "secure",
        )
        members, opened = run.joined.get(release.roster, 0), run.survivors.get(occasion)
        needed = max(fewest, threshold(members))
        notes.check(
            opened is None or needed <= opened,
            "below-threshold",
            f"{name}, run {run.run}, {_told(occasion)}",
            f"helped to open a sum of {opened} merchants, {needed} are needed",
        )


def _is_planned(contract: Contract, occasion: Occasion, charge: Charge) -> bool:
    release = release_of(contract, occasion[0], occasion[1])
    if release is None:
        return False
    towards_server = release.towards_server(contract.exposed_contributors)
    return (charge.event, charge.towards_server) == (release.event, towards_server)


def check_code(
    record: RunRecord | None, runs: Mapping[str, LedgerRun], where: str, notes: Notebook
) -> None:
    """Warn where parties of one run ran different code."""
    told = {name: str(run.reserve["code"]) for name, run in runs.items()}
    if record is not None:
        told["the coordinator"] = str(record.start["code"])
    if len(set(told.values())) > 1:
        common = max(told.values(), key=list(told.values()).count)
        others = sorted(name for name, code in told.items() if code != common)
        notes.add("code-differs", where, f"other code than most ran at: {', '.join(others[:10])}")


def check_run(
    record: RunRecord, merchants: Sequence[MerchantFiles], notes: Notebook, *, published: bool
) -> list[str]:
    """Hold a run's record against every ledger that is there; return the merchants' ids."""
    where = f"run {record.run}"
    there = [merchant for merchant in merchants if merchant.name in record.merchants]
    missing = sorted({*record.merchants} - {merchant.name for merchant in there})
    if missing:
        told = ", ".join(missing[:20]) + (f" and {len(missing) - 20} more" * (len(missing) > 20))
        notes.add("no-evidence-of-merchant", where, f"nothing can be held against: {told}")
    matched = []
    for merchant in there:
        known = record.run in merchant.book.runs
        if merchant.evidence.made_at < record.start["at"] and not known:
            told = "was made before the run began; ask for newer evidence"
            notes.add("evidence-older", f"{merchant.name}, {where}", told)
            continue
        _check_merchant(record, merchant, notes, published=published)
        matched.append(merchant.name)
    return matched


def _check_merchant(
    record: RunRecord, merchant: MerchantFiles, notes: Notebook, *, published: bool
) -> None:
    where = f"{merchant.name}, run {record.run}"
    run = merchant.book.runs.get(record.run)
    counted = [one for one in record.sums if merchant.name in (one.merchants or ())]
    if run is None:
        told = f"is counted in {len(counted)} sums of a run that its ledger does not know"
        notes.check(not counted, "release-without-event", where, told)
        return
    notes.check(
        run.contract == record.contract.sha256,
        "release-differs",
        where,
        "the ledger reserved for the run under another contract than the coordinator's",
    )
    for one in counted:
        notes.count("sums held against a ledger")
        place = f"{where}, {_told(one.occasion)}"
        release = run.releases.get(one.occasion)
        told = "the coordinator counts it in a sum; the ledger has no release for that"
        if notes.check(release is not None, "release-without-event", place, told) and release:
            _check_release(record, one, merchant.name, release, place, notes)
            _check_counts(record, one, run, release, place, notes)
    for one in record.sums:  # the parts that are in no sum were shown the same model, too
        release = run.releases.get(one.occasion)
        if release is not None and one not in counted:
            place = f"{where}, {_told(one.occasion)}"
            _check_release(record, one, merchant.name, release, place, notes)
    _check_asked(record, merchant.name, run, where, notes, published=published)
    _check_adverts(record, merchant, run, where, notes)


def _check_release(
    record: RunRecord, one: RecordedSum, name: str, release: Release, place: str, notes: Notebook
) -> None:
    """Check that both sides tell the same of a sum."""
    roster = _roster(record.sessions, release)
    secure = record.contract.aggregation.secure
    tests = {
        "event": release.charge.event == one.event,
        "stage": release.charge.stage == one.stage,
        "model": release.parameters == one.parameters,
        "session": not secure or (roster is not None and name in roster.names),
    }
    wrong = [what for what, same in tests.items() if not same]
    told = f"ledger and coordinator tell another {', '.join(wrong)}"
    notes.check(not wrong, "release-differs", place, told)


def _roster(sessions: Iterable[Session], release: Release) -> Session | None:
    found = (session for session in sessions if session.roster.hash.hex() == release.roster)
    return next(found, None)


def _check_counts(  # one sum from both sides
    record: RunRecord,
    one: RecordedSum,
    run: LedgerRun,
    release: Release,
    place: str,
    notes: Notebook,
) -> None:
    """Check that a sum holds no more merchants, of a merchant's session, than it confirmed."""
    confirmed, session = run.survivors.get(one.occasion), _roster(record.sessions, release)
    if confirmed is None or session is None:
        return
    notes.count("survivors held against a ledger")
    counted = len(session.names.intersection(one.merchants or ()))
    told = f"the coordinator counts {counted} merchants, this one confirmed {confirmed}"
    overstated = max(counted, one.fewest or 0) > confirmed
    notes.check(not overstated, "survivors-overstated", place, told)
    notes.check(overstated or counted == confirmed, "survivors-understated", place, told)


def _check_asked(  # a run from one merchant's side
    record: RunRecord,
    name: str,
    run: LedgerRun,
    where: str,
    notes: Notebook,
    *,
    published: bool,
) -> None:
    """Check that the coordinator recorded asking for everything that was released.

    Of a run that published nothing, the last one may be missing: a sum is recorded after it was
    asked for. The profile comes after the line that tells the final model.
    """
    asked = {one.occasion for one in record.sums if name in one.asked}
    unknown = [occasion for occasion in run.releases if occasion not in asked]
    last = list(run.releases)[-1:]
    stopped = not published and (record.end is None or [o[0] for o in last] == [PROFILE])
    if stopped and len(unknown) == 1 and unknown == last:
        told = f"the record ends before {_told(last[0])}, which the merchant released"
        notes.add("record-ends-early", where, told)
        return
    for occasion in unknown:
        told = "the merchant released it; the coordinator did not record asking for it"
        notes.add("unknown-to-server", f"{where}, {_told(occasion)}", told)


def _check_adverts(
    record: RunRecord, merchant: MerchantFiles, run: LedgerRun, where: str, notes: Notebook
) -> None:
    """Check that each of a merchant's adverts is bound to its ledger, with the reservation."""
    links = {entry.link: entry.seq for entry in merchant.entries[run.seq - 1 :]}
    for session in record.sessions:
        for advert in session.roster.adverts:
            if advert.merchant == merchant.name:
                place = f"{where}, session {session.number}"
                notes.count("adverts held against a ledger")
                told = (
                    "the advert is bound to an entry that the ledger does not hold, or to one "
                    "before the reservation"
                )
                if notes.check(advert.head in links, "advert-head-unknown", place, told):
                    told = "the advert is signed with another key than the ledger had by then"
                    signers = _signers(merchant, advert, session)
                    fits = not signers or merchant.key_after(links[advert.head]) in signers
                    notes.check(fits, "key-given-up", place, told)


def _signers(merchant: MerchantFiles, advert: Advert, session: Session) -> list[bytes]:
    """Return which of a merchant's keys signed an advert."""
    signed = advert.signed(session.roster.context)
    return [key for key in merchant.keys if is_signed(key, signed, advert.signature)]


def check_known(
    merchant: MerchantFiles, known: Iterable[str], server: float | None, notes: Notebook
) -> None:
    """Warn of runs with releases that no coordinator's evidence tells of."""
    if server is None:
        return
    for run in set(merchant.book.runs) - {*known}:
        held = merchant.book.runs[run]
        later = held.latest[1] > server
        where = f"{merchant.name}, run {run}"
        if held.releases and later:
            told = "the coordinator's evidence was made before it, or says so; ask for a newer one"
            notes.add("evidence-older", where, told)
        elif held.releases:
            told = "the ledger has releases for it, the coordinator's evidence has no such run"
            notes.add("run-unknown-to-server", where, told)


def _told(occasion: Occasion) -> str:
    return f"{occasion[0]} of round {occasion[1]}, attempt {occasion[2]}"


def runs_of(merchants: Iterable[MerchantFiles], run: str) -> Iterator[tuple[str, LedgerRun]]:
    """Yield each merchant's side of a run."""
    for merchant in merchants:
        if run in merchant.book.runs:
            yield merchant.name, merchant.book.runs[run]
