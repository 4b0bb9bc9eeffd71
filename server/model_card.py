"""MODEL_CARD.md: what a reader who finds the model must know."""

from typing import Any

from common import statements
from common.contract import Contract
from server.coordinator import Outcome


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
        f"- epsilon {privacy['epsilon']:.4g} at delta {privacy['delta']:.3g} for everything this "
        "run published, together",
        f"- epsilon towards the server: {privacy['epsilon_towards_server']:.4g}",
        f"- unit: {statements.UNIT}",
        f"- neighbouring relation: {statements.RELATION}",
        *(f"- **{note}**" for note in privacy["notes"]),
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
