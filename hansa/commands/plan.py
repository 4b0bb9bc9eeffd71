"""`hansa merchant plan`: what a run costs and what it may be good for, before joining."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clients.forecast import Cost, Crowd
from common.contract import Contract, read_contract
from common.errors import ContractError
from common.plan import plan_of
from common.statements import epsilon_text
from simulations.wording import counted, number, percent, plain

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "hansa/plan/1"
_POINTS = 8
_SAID = {
    "drowned": "Noise drowns most of it: expect a model no better than the segment of last "
    "period. Ask for more merchants, more customers, a smaller model or a larger epsilon.",
    "weak": "The noise can be seen: expect a model that learns, but do not count on it to beat the "
    "segment of last period.",
    "good": "The noise costs little: expect nearly what the same training would reach without it.",
}
_SAID_FROM_A_START = {
    "drowned": "There are too few customers for this noise: expect a model no better than the "
    "contract's start (model.start), for which this run pays nothing. Use that as it is, or ask "
    "for more merchants or more customers.",
    "weak": "The noise can be seen: expect a model about as good as the contract's start "
    "(model.start), for which this run pays nothing.",
    "good": "The noise costs little: expect a model that is better than the contract's start "
    "(model.start), nearly by what the same training would add without noise.",
}


@dataclass(frozen=True)
class Choices:
    """The command's options, as typed."""

    contract: Path
    merchant: Path | None
    customers: int | None
    merchants: int | None
    picture: Path | None
    json: Path | None


def run(choices: Choices) -> None:
    """Print a plan; draw and write it where asked.

    Raises:
        ContractError: The contract cannot be used.
        PolicyError: The merchant's file, or the picture's name, cannot be used.
        LedgerError: The ledger was changed.
    """
    from rich.console import Console

    if choices.picture is not None:
        from hansa.commands.drawings import check_picture

        check_picture(choices.picture)
    console = Console(stderr=str(choices.json) == "-", highlight=False)
    contract = read_contract(choices.contract)
    cost, crowd = Cost(contract), _crowd(choices, contract)
    with console.status("composing what a run releases"):
        budget = None if choices.merchant is None else _budget(cost, choices.merchant)
        document = plan_document(cost, crowd, budget)
    _print(document, cost, console)
    if choices.picture is not None:
        from hansa.commands.drawings import write_curve

        title = f"Plan of {contract.federation.name}"
        write_curve(cost.curve, cost.reserved, title, choices.picture)
    if choices.json is not None:
        from hansa.commands.choose import write_json

        write_json(document, choices.json)


def _crowd(choices: Choices, contract: Contract) -> Crowd | None:
    merchants = choices.merchants or contract.federation.min_merchants
    if merchants < contract.min_survivors:
        raise ContractError(
            f"--merchants: with {counted(merchants, 'merchant')} no sum comes about; the contract "
            f"needs {contract.min_survivors} (aggregation.min_survivors)"
        )
    return None if choices.customers is None else Crowd(contract, merchants, choices.customers)


def plan_document(cost: Cost, crowd: Crowd | None, budget: dict[str, Any] | None) -> dict[str, Any]:
    """Return a plan for machines."""
    contract = cost.contract
    return {
        "schema": SCHEMA,
        "contract": contract.sha256,
        "federation": contract.federation.name,
        "delta": cost.delta,
        "epsilon": cost.reserved,
        "epsilon_towards_server": cost.towards_server,
        "epsilon_without_failures": cost.curve[-1][1],
        "stages": [asdict(stage) for stage in cost.stages()],
        "rounds": [{"round": number, "epsilon": value} for number, value in cost.curve],
        "colluders": [
            {"colluders": k, "epsilon": value if math.isfinite(value) else None}
            for k, value in cost.colluders()
        ],
        "persons": [
            {"merchants": k, "epsilon_shared_noise": shared, "epsilon_own_noise": own}
            for k, shared, own in cost.persons()
        ],
        "budget": budget,
        "quality": None if crowd is None else _quality(crowd),
    }


def _budget(cost: Cost, path: Path) -> dict[str, Any]:
    """Return what a merchant's own cap says to a run, at the policy's delta."""
    from hansa.commands.budget import open_books

    spending = open_books(path, None).spending
    contract = cost.contract
    charges = plan_of(contract).charges(contract.exposed_contributors)
    refusal = spending.refusal_of(charges)
    return {
        "cap": spending.account.budget.epsilon,
        "delta": spending.account.budget.delta,
        "before": spending.epsilon(spending.counted),
        "after": spending.epsilon([*spending.counted, *charges]),
        "left_after": 0.0 if refusal else spending.left(charges),
        "runs": spending.runs_left(contract),
        "refusal": refusal,
    }


def _quality(crowd: Crowd) -> dict[str, Any]:
    return {
        "merchants": crowd.merchants,
        "customers": crowd.customers,
        "training_customers": crowd.training,
        "noise": crowd.noise,
        "noise_norm": crowd.noise_norm,
        "clip_norm": crowd.contract.privacy.clip_norm,
        "ratio": crowd.ratio,
        "run_ratio": crowd.run_ratio,
        "verdict": crowd.verdict,
        "pretrained": crowd.contract.model.start is not None,
        "accuracy_error": crowd.accuracy_error,
        "smallest_segment": crowd.smallest_segment,
    }


def _print(document: dict[str, Any], cost: Cost, console: "Console") -> None:
    for line in _cost_lines(document):
        console.print(line, markup=False, soft_wrap=True)
    _show_stages(console, document)
    _show_curve(console, cost)
    _show_others(console, document, cost)
    told = [*_budget_lines(document["budget"]), *_quality_lines(document["quality"])]
    for line in told:
        console.print(line, markup=False, soft_wrap=True)


def _cost_lines(document: dict[str, Any]) -> list[str]:
    server, whole = document["epsilon_towards_server"], document["epsilon"]
    towards = "the server included"
    if server > whole * (1 + 1e-9):
        towards = f"and {epsilon_text(server)} towards the server"
    return [
        f"{plain(document['federation'])}: contract {document['contract'][:16]}",
        f"a run reserves epsilon {epsilon_text(whole)} towards whoever sees sums, {towards}, at "
        f"delta {document['delta']:.3g}",
        f"a run in which nothing fails releases "
        f"{epsilon_text(document['epsilon_without_failures'])} of it; the rest is free again",
    ]


def _show_stages(console: "Console", document: dict[str, Any]) -> None:
    from hansa.commands.tables import Column, show

    headings = ("Numbers", "Noise / sensitivity", "Times", "Epsilon alone")
    rows = [
        (
            name,
            f"{stage['numbers']:,}",
            number(stage["noise_multiplier"], 4),
            f"{stage['times']:,}",
            epsilon_text(stage["epsilon"]),
        )
        for name, stage in zip(_names(document["stages"]), document["stages"], strict=True)
    ]
    show(console, "Releases", [Column("For", figures=False), *map(Column, headings)], rows)


def _names(stages: list[dict[str, Any]]) -> list[str]:
    """Name each kind of release; a run's last evaluation has less noise than those before."""
    told = [stage["stage"] for stage in stages]
    return [f"{name} (last)" if name in told[:place] else name for place, name in enumerate(told)]


def _show_curve(console: "Console", cost: Cost) -> None:
    from hansa.commands.tables import Column, show

    stride = -(-len(cost.curve) // _POINTS)
    rows = [
        (f"{k:,}", epsilon_text(value), "#" * math.ceil(24 * value / cost.reserved))
        for k, value in cost.curve[::-1][::stride][::-1]
    ]
    columns = [Column("After round"), Column("Epsilon"), Column("", figures=False)]
    show(console, "Epsilon round by round", columns, rows)


def _show_others(console: "Console", document: dict[str, Any], cost: Cost) -> None:
    from hansa.commands.tables import Column, show

    noise = "own" if cost.contract.training.mode == "local" else "shared"
    rows = []
    for found in document["colluders"]:
        value = math.inf if found["epsilon"] is None else found["epsilon"]
        who = f"{counted(found['colluders'], 'merchant')} of the smallest sum "
        who += "colludes" if found["colluders"] == 1 else "collude"
        who = who if found["colluders"] else "the smallest sum, nobody colludes"
        rows.append((who, epsilon_text(value)))
    for found in document["persons"]:
        who = f"a person who is a customer of {found['merchants']:g} merchants"
        rows.append((who, epsilon_text(found[f"epsilon_{noise}_noise"])))
    columns = [Column("Case", figures=False), Column("Epsilon")]
    show(console, "Towards others, for others", columns, rows)


def _budget_lines(budget: dict[str, Any] | None) -> list[str]:
    from hansa.commands.budget import floor_text

    if budget is None:
        return ["add --merchant to see what your own cap says"]
    lines = [
        f"your budget: epsilon {epsilon_text(budget['before'])} before, "
        f"{epsilon_text(budget['after'])} after, cap {epsilon_text(budget['cap'])}, at delta "
        f"{budget['delta']:.3g}"
    ]
    if budget["refusal"]:
        return [*lines, f"your ledger would refuse: the run {budget['refusal']}"]
    left = f"epsilon {floor_text(budget['left_after'])} is left after it"
    return [*lines, f"your cap pays for {counted(budget['runs'], 'such run')}; {left}"]


def _quality_lines(quality: dict[str, Any] | None) -> list[str]:
    if quality is None:
        return ["add --customers to see what quality to expect"]
    error, smallest = quality["accuracy_error"], quality["smallest_segment"]
    said = _SAID_FROM_A_START if quality["pretrained"] else _SAID
    lines = [
        f"{counted(quality['merchants'], 'merchant')} with "
        f"{counted(quality['customers'], 'customer')} each, about "
        f"{quality['training_customers']:,.0f} of all trained on:",
        f"  noise in an averaged gradient {number(quality['noise'])} a number, "
        f"{number(quality['noise_norm'])} in all; the clip norm is {number(quality['clip_norm'])}",
        f"  signal over noise {number(quality['ratio'])} in a round, "
        f"{number(quality['run_ratio'])} in the whole run: {quality['verdict']}",
        f"  {said[quality['verdict']]}",
        "  accuracy: too few held-out customers to publish one"
        if error is None
        else f"  accuracy published with a noise of {percent(error)} either way",
    ]
    if smallest is not None:
        lines.append(f"  shares are published of segments above {percent(smallest)} of customers")
    return lines
