"""Known ways in which private learning goes wrong, and how each was looked for in this audit.

A hazard is "absent" only where something was really checked; "untested" is said as plainly as
"found". The list follows faults that were found in other systems.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from audit.plain import size
from audit.verdict import every, plural

Status = Literal["absent", "found", "attention", "untested"]
Report = Mapping[str, Any]  # the parts of the document that are ready
Outcome = tuple[Status, str]


@dataclass(frozen=True)
class Hazard:
    """One way to go wrong.

    Attributes:
        name: In a few words.
        danger: What happens then.
        test: From the report to the status and how it was found; None where it was not tested.
        codes: Codes of findings that mean it was found.
        untested: Why it may not have been looked for, and what would.
    """

    name: str
    danger: str
    test: Callable[[Report], Outcome | None]
    codes: tuple[str, ...]
    untested: str


def hazards(report: Report) -> list[dict[str, str]]:
    """Return every hazard with its status and how that was found."""
    return [_judged(hazard, report) for hazard in HAZARDS]


def _judged(hazard: Hazard, report: Report) -> dict[str, str]:
    status, how = _status(hazard, report)
    return {"name": hazard.name, "danger": hazard.danger, "status": status, "how": how}


def _status(hazard: Hazard, report: Report) -> Outcome:
    codes = [
        finding["code"]
        for finding in report["findings"]
        if finding["severity"] != "note" and finding["code"] in hazard.codes
    ]
    if codes:
        return "found", "See the findings: " + ", ".join(list(dict.fromkeys(codes))[:5]) + "."
    return hazard.test(report) or ("untested", hazard.untested)


def _summed(report: Report) -> Outcome | None:
    ledgers = every(report, "merchants")
    if not ledgers:
        return None
    return "absent", (
        f"Each of {plural(ledgers, 'ledger')} was composed by itself, and a run from the events "
        "that were asked for. Epsilons of several merchants are never added or averaged."
    )


def _reset(report: Report) -> Outcome | None:
    runs = sum(every(merchant, "by_run") for merchant in report["merchants"])
    if not runs:
        return None
    return "absent", (
        "The lifetime epsilon was composed from all charges of all runs in a ledger at once "
        f"({plural(runs, 'charge')} of a run in {plural(every(report, 'merchants'), 'ledger')}), "
        "whatever the ledger says of its own sums."
    )


def _caps(report: Report) -> Outcome | None:
    rows = [m for m in report["merchants"] if m["lifetime"] is not None]
    over = [m for m in rows if m["refresh_days"] is None and size(m["lifetime"]) > size(m["cap"])]
    if over:
        told = f"The lifetime epsilon is above the cap in {plural(len(over), 'ledger')}."
        return "attention", told
    if not rows:
        return None
    return "absent", (
        "What each ledger holds was recomputed and compared with the cap in the merchant's own "
        f"policy ({plural(len(rows), 'ledger')})."
    )


def _tried(report: Report, told: str, *names: str) -> Outcome | None:
    """Judge by the tests of the code that have one of these names."""
    rows = (report["empirical"] or {}).get("tests", [])
    rows = [row for row in rows if any(name in row["name"] for name in names)]
    failed = [row["name"] for row in rows if row["passed"] is False]
    if failed:
        return "found", f"The code failed {plural(len(failed), 'test')}: {', '.join(failed[:5])}."
    if not rows or not all(row["passed"] for row in rows):
        return None
    return "absent", f"{told} ({plural(len(rows), 'test')} of the code passed)."


def _shuffled(report: Report) -> Outcome | None:
    places = (*report["merchants"], *report["runs"])
    kinds = {event["kind"] for place in places for event in place["events"]}
    if kinds == {"gaussian-sum"}:
        return "absent", (
            "No sampling is claimed: every recorded event counts all customers, so nothing rests "
            "on how batches were drawn."
        )
    told = "Who enters a step was compared with independent coin flips of the accounted rate"
    return _tried(report, told, "sampling")


def _accountants(report: Report) -> Outcome | None:
    places = (*report["merchants"], *report["runs"])
    told = sum(
        sum(opinion["epsilon"] is not None for opinion in place["opinions"]) > 1 for place in places
    )
    if not told:
        return None
    return "absent", (
        f"Epsilon was recomputed from raw events by two or more accountants, in {told:,} of "
        f"{len(places):,} ledgers and runs; they stand side by side in this report."
    )


def _clipped(report: Report) -> Outcome | None:
    told = "Neighbouring tables with extreme customers moved no sum by more than is accounted for"
    return _tried(report, told, "sensitivity")


def _unnoised(report: Report) -> Outcome | None:
    runs = [run for run in report["runs"] if run["replayed"]]
    if not runs or len(runs) < len(report["runs"]):
        return None
    return "absent", (
        "The recorded noisy sums alone give the published model "
        f"({plural(len(runs), 'run')} replayed), so no other number entered it."
    )


def _generator(report: Report) -> Outcome | None:
    told = "Noise was fresh in every release and independent between merchants"
    return _tried(report, told, "fresh noise", "merchants apart")


def _lattice(report: Report) -> Outcome | None:
    told = "Noise was drawn as integers of the accounted scale and shape, and sums in the ring fit"
    return _tried(report, told, "noise scale", "noise shape", "ring")


def _server_only(report: Report) -> Outcome | None:
    held = sum(every(run, "matched") for run in report["runs"])
    asked = sum(every(run, "merchants") for run in report["runs"])
    if not held:
        return None
    told = (
        f"{held:,} of {asked:,} records of merchants in runs were held against the merchants' own "
        "signed ledgers."
    )
    if held >= asked:
        return "absent", told
    return "attention", told + " For the others there is the coordinator's word only."


def _truncated(report: Report) -> Outcome | None:
    heads = _checked(report, "heads countersigned", "heads in the witness's log")
    if not heads:
        return None
    told = (
        "Every ledger is a chain of hashes, and its heads were held against what the witness "
        f"countersigned ({plural(heads, 'check')})."
    )
    if _checked(report, "heads in the witness's log", "heads known from earlier"):
        return "absent", told
    return "attention", told + (
        " These heads come from the merchants alone, who could have left out the last ones: the "
        "witness's own log was not there."
    )


def _twice(report: Report) -> Outcome | None:
    releases = _checked(report, "releases")
    if not releases:
        return None
    return "absent", (
        "Each release is recorded once for its run, stage, round and attempt, and each step of a "
        f"secure sum once ({plural(releases, 'release')})."
    )


def _checked(report: Report, *names: str) -> int:
    return sum(report["checks"].get(name, 0) for name in names)


def _refreshed(report: Report) -> Outcome | None:
    if not report["merchants"]:
        return None
    periods = sum(merchant["refresh_days"] is not None for merchant in report["merchants"])
    if not periods:
        return "absent", "No merchant's policy forgets what was spent."
    return "attention", (
        f"The cap of {plural(periods, 'merchant')} starts afresh after some days. A customer who "
        "stays is in both periods: read the lifetime epsilon, which forgets nothing."
    )


def _cannot(_: Report) -> Outcome | None:
    return None


_TRY = "`hansa audit empirical` tries the code for it; its result was not given to this report."

HAZARDS = (
    Hazard(
        "Epsilon added up or averaged over merchants",
        "A figure that holds for nobody: each customer has the protection of their own merchant.",
        _summed,
        (),
        "No ledger was there to compose.",
    ),
    Hazard(
        "Epsilon starts anew with every round or run",
        "What is reported is one round's loss; the true one grows with each.",
        _reset,
        ("epsilon-differs", "privacy-differs", "expired-early"),
        "No ledger with runs was there.",
    ),
    Hazard(
        "A merchant's cap is passed",
        "More is released than the owner of the data allowed.",
        _caps,
        ("cap-exceeded",),
        "No ledger was there, or its loss has no bound.",
    ),
    Hazard(
        "Shuffled batches accounted as independent coin flips",
        "The amplification by sampling is claimed without being there.",
        _shuffled,
        ("release-differs",),
        "Sampled sums are recorded. " + _TRY,
    ),
    Hazard(
        "One accountant that is wrong, or made up",
        "Every figure hangs on one program.",
        _accountants,
        ("epsilon-differs", "privacy-differs", "closed-form-differs"),
        "Fewer than two accountants had an opinion.",
    ),
    Hazard(
        "Contributions that are not clipped as said",
        "One customer counts for more than the noise hides.",
        _clipped,
        (),
        _TRY,
    ),
    Hazard(
        "Numbers without noise among the noisy ones",
        "A loss, a count or an accuracy leaves beside the budget.",
        _unnoised,
        ("replay-differs", "published-differs", "release-not-planned"),
        "Not every run could be replayed from its recorded sums.",
    ),
    Hazard(
        "Data looked at before the private part",
        "Bounds, scalers or settings were chosen from customers at no charge.",
        _cannot,
        (),
        "Evidence cannot show this. Bounds are in the contract as public knowledge; who wrote it "
        "must say how they were chosen (filed under product.tuning).",
    ),
    Hazard(
        "Noise that can be guessed or is used twice",
        "Whoever guesses it subtracts it.",
        _generator,
        ("step-twice", "noise-seeded"),
        _TRY,
    ),
    Hazard(
        "Floating-point noise",
        "The last digits tell what the noise was to hide; rounded sums are no Gaussians.",
        _lattice,
        ("sum-differs",),
        _TRY,
    ),
    Hazard(
        "Logs that only the coordinator keeps",
        "Who is to be watched writes the record.",
        _server_only,
        ("release-without-event", "unknown-to-server", "release-differs"),
        "No merchant's evidence could be held against a run's record.",
    ),
    Hazard(
        "Shortened, copied or restored ledgers",
        "Spent budget is forgotten.",
        _truncated,
        (
            "truncated",
            "forked",
            "rolled-back",
            "anchor-missing",
            "chain-gap",
            "chain-broken",
            "not-witnessed",
        ),
        "No head of a ledger was there that a witness countersigned.",
    ),
    Hazard(
        "The same question answered twice",
        "Two answers with fresh noise cost twice; the same noise on other data tells both apart.",
        _twice,
        ("release-twice", "step-twice", "sum-repeated"),
        "No release was there to look at.",
    ),
    Hazard(
        "A budget that starts afresh while the customers stay",
        "The cap holds for each period, and the loss of a loyal customer adds up.",
        _refreshed,
        (),
        "No policy was there.",
    ),
    Hazard(
        "Counts, hashes or timing that tell on the side",
        "The exact number of customers, or a hash of the table, leaves without noise.",
        _cannot,
        (),
        "Not tested by this report. Message sizes and times are not protected, and listed as such; "
        "no field of the evidence is for counts or hashes of tables.",
    ),
)
