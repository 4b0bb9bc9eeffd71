"""Records of processing under GDPR and PIPL: what was filed, beside what the evidence says."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from audit.filing import FIELDS, Field
from audit.plain import shown_epsilon

Report = Mapping[str, Any]

MOST_FEATURES = 40
_TITLES = {
    "controller.name": "controller",
    "controller.kind": "kind of organisation",
    "controller.joint": "joint controllers",
    "controller.officer": "data protection officer",
    "controller.representative": "representative in the Union",
    "processing.people": "categories of people",
    "processing.data": "categories of data",
    "processing.third_countries": "transfers to third countries",
    "pipl.handler": "personal information handler",
    "pipl.sensitive": "sensitive information",
    "pipl.purpose": "purpose and method",
    "pipl.abroad": "providing abroad",
}


@dataclass(frozen=True)
class Record:
    """One record of processing."""

    key: str
    title: str
    laws: str  # how the names of its laws begin
    sections: tuple[str, ...]  # of the filing


RECORDS: Final = (
    Record(
        "gdpr",
        "GDPR: record of processing and impact assessment",
        "GDPR",
        ("controller", "processing", "assessment", "incident"),
    ),
    Record(
        "pipl",
        "PIPL: impact assessment and record of handling",
        "PIPL",
        ("pipl", "processing", "incident"),
    ),
)


def records(report: Report) -> list[dict[str, Any]]:
    """Return each record with its fields; what nobody filed has no text."""
    return [
        {"key": record.key, "title": record.title, "fields": _fields(record, report)}
        for record in RECORDS
    ]


def _fields(record: Record, report: Report) -> list[dict[str, Any]]:
    return [
        {
            "field": f"{field.section}.{field.name}",
            "title": _title(field),
            "asks": field.asks,
            "laws": [law for law in field.laws if _belongs(law, record)],
            "filed": report["filing"].get(field.section, {}).get(field.name, ""),
            "evidence": _KNOWN.get(f"{field.section}.{field.name}", _nothing)(report),
        }
        for field in FIELDS
        if _asked(field, record)
    ]


def _title(field: Field) -> str:
    told = field.name.replace("_", " ")
    by_section = f"{field.section} {told}" if field.section in {"assessment", "incident"} else told
    title = _TITLES.get(f"{field.section}.{field.name}", by_section)
    return title[:1].upper() + title[1:]


def _belongs(law: str, record: Record) -> bool:
    return law.startswith(record.laws) or (record.key == "gdpr" and law.startswith("EDPB"))


def _asked(field: Field, record: Record) -> bool:
    if field.section not in record.sections:
        return False
    if record.key == "pipl" and field.section != "pipl":
        return any(_belongs(law, record) for law in field.laws)
    return not field.laws or any(_belongs(law, record) for law in field.laws)


def _nothing(_: Report) -> str:
    return ""


def _data(report: Report) -> str:
    names = list(dict.fromkeys(name for run in report["runs"] for name in run["features"] if name))
    if not names:
        return ""
    more = f" and {len(names) - MOST_FEATURES:,} more" if len(names) > MOST_FEATURES else ""
    return f"Features of the contract: {', '.join(names[:MOST_FEATURES])}{more}."


def _security(report: Report) -> str:
    lifetimes = [m["lifetime"] for m in report["merchants"]]
    if not lifetimes:
        return ""
    masked = [run["masked"] for run in report["runs"]]
    sums = "Secure aggregation of all sums. " if masked and all(masked) else ""
    return (
        "Rows stay with the merchant. Differential privacy with noise added before anything "
        f"leaves: lifetime epsilon at most {shown_epsilon(lifetimes[0])} at the merchant that used "
        f"most of its cap. {sums}Signed, chained ledgers with caps set by each merchant."
    )


def _recipients(report: Report) -> str:
    merchants = {name for run in report["runs"] for name in run["merchants"]}
    if not merchants:
        return ""
    return f"The coordinator and {len(merchants):,} merchants take part in the runs of this report."


def _measures(report: Report) -> str:
    absent = sum(row["status"] == "absent" for row in report["hazards"])
    return (
        f"This audit: {absent:,} of {len(report['hazards']):,} known hazards were tested and not "
        f"found; {report['counts']['fail']:,} findings fail it."
    )


def _anonymity(report: Report) -> str:
    tried = report["empirical"]
    if tried is None or tried["lower_bound"] is None:
        return ""
    return (
        "Likelihood that a customer's presence can be inferred, by attack: empirical epsilon of at "
        f"least {shown_epsilon(tried['lower_bound'])} where at most "
        f"{shown_epsilon(tried['claimed_epsilon'])} is claimed. The judgement is yours."
    )


def _decisions(_: Report) -> str:
    return "Hansa computes segments; it takes no decision and sends no message to a customer."


_KNOWN: dict[str, Callable[[Report], str]] = {
    "processing.data": _data,
    "processing.security": _security,
    "processing.recipients": _recipients,
    "processing.automated_decisions": _decisions,
    "assessment.measures": _measures,
    "assessment.anonymity": _anonymity,
    "pipl.measures": _measures,
}
