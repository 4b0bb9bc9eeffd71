"""Who sees what of a federation, and what stands against it, for the runs of a report."""

from collections.abc import Mapping
from typing import Any

from audit.plain import Measure, shown_epsilon, size

Report = Mapping[str, Any]


def threats(report: Report) -> list[dict[str, str]]:
    """Return who may look or interfere, what they see, and what holds towards them."""
    rows = (
        (
            "Anybody who has the model and the published figures",
            "The bundle of every run",
            "The epsilon of the runs; all releases of a merchant together cost at most "
            f"{_most(report['merchants'], 'lifetime')} at the merchants of this report.",
        ),
        (
            "Another merchant",
            "The model of every round, and its own share of the noise",
            _peer(report),
        ),
        ("The coordinator, curious", _sums(report), _curious(report)),
        (
            "The coordinator, dishonest",
            "It may ask again, skip rounds, invent runs, choose parameters, show different things",
            "Each answer is charged before it is computed and given once; the contract and the "
            "merchant's own cap hold; noise is never taken from a message.",
        ),
        (
            "The coordinator with a third or more of a sum's merchants",
            "Single messages of the others",
            _broken(report),
        ),
        (
            "A merchant that sends nonsense",
            "Nothing more than any merchant",
            "Nothing: it can spoil the model. It learns nothing by it.",
        ),
        (
            "A merchant that forgets its charges",
            "Nothing; it would release more than its cap",
            "Hash chain, signatures, and the witness that countersigned its ledger's head; this "
            "audit holds them against each other.",
        ),
        (
            "Somebody at a merchant's own computer",
            "Rows, ledger, assignments",
            "Nothing in Hansa: the operating system's access control, and the owner's.",
        ),
    )
    return [{"who": who, "sees": sees, "protection": protection} for who, sees, protection in rows]


def _most(places: list[Mapping[str, Any]], name: str) -> str:
    values: list[Measure] = [place[name] for place in places if place[name] is not None]
    return "epsilon " + shown_epsilon(max(values, key=size)) if values else "an unknown epsilon"


def _plain(report: Report) -> list[Mapping[str, Any]]:
    return [run for run in report["runs"] if run["masked"] is False]


def _shared(report: Report) -> bool:
    return any(run["mode"] != "local" for run in report["runs"])


def _peer(report: Report) -> str:
    if not _shared(report) and report["runs"]:
        return "The epsilon of the runs: every merchant's own noise is enough (mode local)."
    return (
        "The epsilon of the runs less the noise of those who collude, who know their own share: "
        "see the table of colluders of each run."
    )


def _sums(report: Report) -> str:
    if not report["runs"]:
        return "Masked messages, or single ones where sums are not masked: no run is told of here"
    if _plain(report):
        return "Single messages of every merchant, in runs that were not masked"
    fewest = [run["fewest"] for run in report["runs"] if run["fewest"] is not None]
    least = f"at least {min(fewest):,} merchants" if fewest else "several merchants"
    return f"Masked messages, and sums over {least}"


def _curious(report: Report) -> str:
    plain = _plain(report)
    if not report["runs"]:
        return (
            "Not known here: no coordinator's evidence tells whether sums were masked. Where they "
            "were not, the figures of this report do not hold towards it."
        )
    if plain:
        return (
            f"{len(plain):,} of {len(report['runs']):,} runs were not masked: of one of them alone "
            f"{_most(plain, 'claimed_towards_server')} holds towards the coordinator, and what "
            "several cost composes. The other figures of this report hold towards those who see "
            "sums only."
        )
    return (
        "Secure aggregation: the epsilon of the runs holds towards it too, while fewer than a "
        "third of the merchants of a sum collude with it."
    )


def _broken(report: Report) -> str:
    if not _shared(report) and report["runs"]:
        return "Mode local: the epsilon of the runs holds all the same."
    return (
        "Secure aggregation promises nothing then. What is left is each message's own share of "
        "the noise: a much larger epsilon."
    )
