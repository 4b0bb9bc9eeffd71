"""The report of an audit: one JSON document, the page and the registry entry made from it.

The document (`hansa/audit-report/1`, schema in `docs/audit-report.schema.json`) holds everything
that the page shows. Evidence is a stranger's: every text in it is made harmless here, long lists
are cut with the number of what was left out, an epsilon that is not finite is "unbounded".
"""

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from audit.filing import filing_of
from audit.findings import Audit
from audit.hazards import hazards
from audit.person import several_merchants
from audit.plain import MAX_NAME, listed, moment, words
from audit.records import records
from audit.report_parts import (
    MOST,
    checks_part,
    empirical_part,
    evidence_part,
    finding_part,
    merchant_part,
    run_part,
    spent_most_first,
)
from audit.threats import threats
from audit.verdict import counts, own_findings, verdict
from common import statements
from common.errors import HansaError
from common.versions import code_sha256, hansa_version

FORMAT: Final = "hansa/audit-report/1"
_ORDER = {"fail": 0, "warning": 1, "note": 2}

Document = dict[str, Any]


def report_document(
    audit: Audit,
    empirical: Mapping[str, Any] | None,
    filed: Mapping[str, Any],
    made_at: float | None = None,
) -> Document:
    """Return an audit's report as a JSON document.

    Args:
        audit: What was found in the evidence.
        empirical: What `hansa audit empirical --json` wrote, if it was run.
        filed: Facts that only people know, as `read_filing` returns them.
        made_at: Seconds since 1970; now if it is not given.

    Raises:
        HansaError: A filed field is not known.
    """
    tried = empirical_part(empirical)
    merchants = [merchant_part(entry) for entry in spent_most_first(audit.spending)]
    findings = sorted(
        (*audit.findings, *own_findings(tried, merchants)),
        key=lambda finding: _ORDER.get(finding.severity, 0),
    )
    code = code_sha256()
    document: Document = {
        "format": FORMAT,
        "made_at": moment(time.time() if made_at is None else made_at),
        "hansa": words(hansa_version(), MAX_NAME),
        "code": code,
        "unit": statements.UNIT,
        "relation": statements.RELATION,
        "filing": filing_of(filed),
        "counts": counts(findings),
        **listed("findings", map(finding_part, findings), MOST),
        **listed("evidence", (evidence_part(item, code) for item in audit.evidence), MOST),
        **listed("merchants", merchants, MOST),
        **listed("runs", map(run_part, audit.runs), MOST),
        "checks": checks_part(audit.checks),
        "empirical": tried,
        "assumptions": [*statements.ASSUMPTIONS, *statements.MASKED_ASSUMPTIONS],
        "not_protected": list(statements.NOT_PROTECTED),
        "limits": list(statements.AUDIT_LIMITS),
    }
    document["verdict"] = verdict(document)
    document["person"] = _person(document)
    document["threats"] = threats(document)
    document["hazards"] = hazards(document)
    document["records"] = records(document)
    return document


def write_report(document: Document, folder: Path) -> tuple[Path, ...]:
    """Write `report.html`, `report.json` and `opendp-registry.yaml` into a folder.

    All three are complete in temporary files before the first is put in its place, so that a
    reader finds old files or new ones, never a part.

    Raises:
        HansaError: A file cannot be written.
    """
    from audit.registry import registry_yaml
    from audit.report_page import report_html

    texts = {
        "report.html": report_html(document),
        "report.json": json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "opendp-registry.yaml": registry_yaml(document),
    }
    parts = {folder / name: folder / f".{name}.{os.getpid()}.part" for name in texts}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, part in parts.items():
            _write_synced(part, texts[path.name])
        for path, part in parts.items():
            os.replace(part, path)
    except OSError as error:
        raise HansaError(f"{folder}: the report cannot be written ({error.strerror})") from error
    finally:
        for part in parts.values():
            with contextlib.suppress(OSError):  # what went wrong was told already
                part.unlink(missing_ok=True)
    return tuple(parts)


def _write_synced(path: Path, text: str) -> None:
    with path.open("wb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def _person(document: Document) -> Document:
    """Tell what a person has who is a customer of several merchants, at the worst ledger."""
    worst = next((m for m in document["merchants"] if m["mu"]), None)
    modes = {run["mode"] for run in document["runs"]}
    return {
        "merchant": None if worst is None else worst["merchant"],
        "delta": None if worst is None else worst["delta"],
        "rows": [] if worst is None else several_merchants(worst["mu"], worst["delta"]),
        "shared": "distributed" in modes,
        "independent": "local" in modes,
    }
