"""MODEL_CARD.md: what a reader who finds the model must know."""

from typing import Any

from common import statements
from common.contract import Contract
from common.statements import epsilon_text
from server.outcome import Outcome


def model_card(outcome: Outcome, contract: Contract, documents: dict[str, dict[str, Any]]) -> str:
    """Return the card as Markdown, from the same documents that the bundle holds."""
    privacy, metrics = documents["privacy.json"], documents["metrics.json"]
    accuracy = (
        "too noisy to state"
        if metrics["accuracy"] is None
        else f"{metrics['accuracy']:.3f} ± {metrics['accuracy_error']:.3f} (noise, one sd)"
    )
    hidden = contract.model.hidden if contract.model.family == "mlp" else ()
    lines = [
        f"# {contract.federation.name}",
        "",
        "A customer-segment classifier, trained together by "
        f"{len(outcome.merchants)} merchants with Hansa.",
        "",
        "## Privacy",
        "",
        f"- epsilon {epsilon_text(privacy['epsilon'])} at delta {privacy['delta']:.3g} for "
        "everything this run published, together",
        _towards_server(privacy),
        *_achieved(privacy),
        f"- unit: {statements.UNIT}",
        f"- neighbouring relation: {statements.RELATION}",
        *_notes(privacy),
        "",
        "Not protected:",
        "",
        *(f"- {item}" for item in statements.NOT_PROTECTED),
        "",
        "## Model",
        "",
        f"- family: {contract.model.family}"
        + (f", hidden layers {list(hidden)}, {contract.model.activation}" if hidden else ""),
        f"- inputs: {contract.inputs}, each in [-1, 1], scaled by the contract's public bounds",
        "- segments: " + ", ".join(f"{i} {n}" for i, n in enumerate(contract.segments.names)),
        f"- training: mode '{contract.training.mode}', {len(outcome.cohorts)} rounds, "
        f"clip norm {contract.privacy.clip_norm:g}",
        *_start(contract),
        "",
        "## Quality on held-out customers (noisy)",
        "",
        f"- accuracy: {accuracy}",
        "",
        "## Use",
        "",
        "Meant for assigning a merchant's own customers to segments on its own machine. Not for "
        "decisions about credit, insurance, employment or the like.",
        "",
        f"Run `{outcome.run}`, contract `{contract.sha256}`.",
        "",
    ]
    return "\n".join(lines)


def _start(contract: Contract) -> list[str]:
    """Tell of parameters that the contract names; how they came about, no hash can tell."""
    if contract.model.start is None:
        return []
    return [
        f"- start: parameters `{contract.model.start}`, agreed on in the contract; the epsilon "
        "above counts what this run released, not what they were trained on"
    ]


def _towards_server(privacy: dict[str, Any]) -> str:
    if privacy["secure_aggregation"]:
        return "- the same epsilon towards the server, which saw masked sums"
    return f"- epsilon towards the server: {epsilon_text(privacy['epsilon_towards_server'])}"


def _achieved(privacy: dict[str, Any]) -> list[str]:
    """Tell epsilon by the noise that was there, and what colluders leave of it."""
    achieved = privacy["achieved"]
    fewest, most = achieved["survivors_min"], achieved["survivors_max"]
    among = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
    lines = [
        f"- by the noise of {among} merchants in a sum, epsilon {epsilon_text(achieved['epsilon'])}"
    ]
    for told in privacy["colluders"]:
        if told["colluders"]:
            left = "unbounded" if told["epsilon"] is None else epsilon_text(told["epsilon"])
            verb = "colludes" if told["colluders"] == 1 else "collude"
            lines.append(f"- if {told['colluders']:,} of them {verb} with whoever looks: {left}")
    return lines


def _notes(privacy: dict[str, Any]) -> list[str]:
    """Print warnings in bold; that sums were masked is none."""
    calm = 1 if privacy["secure_aggregation"] else 0
    notes = privacy["notes"]
    return [f"- {note}" for note in notes[:calm]] + [f"- **{note}**" for note in notes[calm:]]
