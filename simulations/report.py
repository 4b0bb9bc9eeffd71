"""One self-contained HTML page for a simulation and one for a comparison.

The page asks for nothing from anywhere: style and pictures are in the file, and a content security
policy forbids the rest. Names come from contracts and merchants, so they count as hostile: every
value is escaped by Jinja2 and stripped of control characters on its way into the page.
"""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import statements
from common.accounting import person_table
from common.contract import Contract, Feature
from common.plan import CENSUS, EVALUATION, PROFILE, UPDATE
from simulations import pictures, wording
from simulations.pictures import write_comparison_picture, write_whole
from simulations.result import Comparison, RoundRecord, SegmentRecord, SimulationResult
from simulations.wording import verdict

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["verdict", "write_comparison", "write_comparison_picture", "write_report"]

HIGHLIGHTS = 3
MAX_ROUNDS = 500
WORD_DISTANCE = 0.25  # how far apart two different words count, where a number's range is 1
PURPOSES = {
    CENSUS: "Counting the training customers",
    UPDATE: "Training the model",
    EVALUATION: "Measuring on held-out customers",
    PROFILE: "Segment shares and profiles",
}


@dataclass(frozen=True)
class Highlight:
    """A feature in which a segment stands out."""

    feature: str
    typical: str
    usual: str  # the mean over all segments, or their most common word
    direction: str  # above | below | unlike


def write_report(result: SimulationResult, path: Path) -> None:
    """Write a simulation's report as one HTML file, whole or not at all.

    Raises:
        HansaError: The file cannot be written.
    """
    page = (
        _environment()
        .get_template("simulation.html.j2")
        .render(
            result=result,
            contract=result.contract,
            headline=wording.headline(result),
            cautions=wording.cautions(result),
            assurance=wording.assurance(result),
            merchants=sorted(result.merchants, key=lambda merchant: merchant.refused is None),
            refused=sum(merchant.refused is not None for merchant in result.merchants),
            pictures={
                "learning": pictures.learning_curve(result),
                "epsilon": pictures.epsilon_curve(result),
                "shares": pictures.segment_shares(result),
                "confusion": pictures.confusion_matrix(result),
            },
            rounds=_shown_rounds(result.rounds),
            spent=[(PURPOSES.get(name, name), value) for name, value in result.spent.items()],
            most_spent=max(result.spent.values(), default=1.0) or 1.0,
            segments=[
                (segment, highlights(segment, result.segments, result.contract))
                for segment in result.segments
            ],
            features=_profiled(result),
            several_merchants=person_table(result.epsilon, result.delta),
            not_protected=statements.NOT_PROTECTED,
            settings=_settings(result.contract),
        )
    )
    write_whole(path, page.encode())


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write a comparison as one HTML file, whole or not at all.

    Raises:
        HansaError: The file cannot be written.
    """
    page = (
        _environment()
        .get_template("comparison.html.j2")
        .render(
            comparison=comparison,
            verdict=verdict(comparison),
            caution=wording.comparison_caution(comparison),
            pictures={
                "accuracy": pictures.method_dots(comparison, "accuracy"),
                "auc": pictures.method_dots(comparison, "auc"),
            },
        )
    )
    write_whole(path, page.encode())


def highlights(
    segment: SegmentRecord, segments: Sequence[SegmentRecord], contract: Contract
) -> list[Highlight]:
    """Find the few features in which a segment differs most from the mean of all segments.

    Numbers are compared in the contract's public range, so that a feature with large values does
    not drown the others. Suppressed cells take no part.
    """
    found = []
    for feature in contract.features:
        mine = _typical(segment, feature.name)
        others = [_typical(other, feature.name) for other in segments]
        told = _differing(feature, segment.profile.get(feature.name, {}), mine, others)
        if told is not None:
            found.append(told)
    found.sort(key=lambda pair: -pair[0])
    return [highlight for _, highlight in found[:HIGHLIGHTS]]


def _typical(segment: SegmentRecord, feature: str) -> float | str | None:
    value = segment.profile.get(feature, {}).get("typical")
    return value if isinstance(value, str) or wording.known(value) else None


def _differing(
    feature: Feature,
    cell: Mapping[str, float | str | None],
    mine: float | str | None,
    others: Sequence[float | str | None],
) -> tuple[float, Highlight] | None:
    """Return how far a cell is from the others, and how to say it; nothing where it is not."""
    if isinstance(mine, str):
        usual = Counter(word for word in others if isinstance(word, str)).most_common(1)[0][0]
        unlike = Highlight(feature.name, mine, usual, "unlike")
        return None if mine == usual else (WORD_DISTANCE, unlike)
    if mine is None:
        return None
    mean = statistics.fmean(value for value in others if isinstance(value, int | float))
    if mine == mean:
        return None
    unit = f" {cell['unit']}" if cell.get("unit") else ""
    distance = abs(mine - mean) / (feature.high - feature.low)
    direction = "above" if mine > mean else "below"
    said = Highlight(
        feature.name, wording.number(mine) + unit, wording.number(mean) + unit, direction
    )
    return distance, said


def _cell(cell: Mapping[str, float | str | None] | None) -> str:
    """Write one value of a profile with its bounds."""
    typical = (cell or {}).get("typical")
    if cell is None or typical is None:
        return wording.TOO_FEW
    if isinstance(typical, str):
        return typical
    low, high = cell.get("low"), cell.get("high")
    unit = f" {cell['unit']}" if cell.get("unit") else ""
    if isinstance(low, str) or isinstance(high, str) or low is None or high is None:
        return wording.number(typical) + unit
    return f"{wording.number(typical)}{unit} ({wording.number(low)} to {wording.number(high)})"


def _profiled(result: SimulationResult) -> list[str]:
    """List the features that any segment has a profile of, in the contract's order."""
    known = {name for segment in result.segments for name in segment.profile}
    return [feature.name for feature in result.contract.features if feature.name in known]


def _shown_rounds(rounds: Sequence[RoundRecord]) -> Sequence[RoundRecord]:
    """Keep every round, or of very many the evaluated ones and the last."""
    if len(rounds) <= MAX_ROUNDS:
        return rounds
    kept = [entry for entry in rounds if entry.accuracy is not None or entry is rounds[-1]]
    return kept[-MAX_ROUNDS:]


def _settings(contract: Contract) -> list[tuple[str, str]]:
    """Name the settings of a contract that a reader asks about."""
    training, model, privacy = contract.training, contract.model, contract.privacy
    federation, aggregation = contract.federation, contract.aggregation
    layers = ", ".join(str(size) for size in model.hidden)
    epsilon, rate = statements.epsilon_text(privacy.epsilon), wording.number(training.step_size)
    needed = f"{federation.min_merchants:,} counted on, {contract.min_survivors:,} in every sum"
    shape = f"{model.family}, hidden layers {layers}, {model.activation}"
    noise = {
        "distributed": "shared between the merchants (mode distributed)",
        "local": "each merchant's own (mode local)",
    }
    delta, clip = wording.number(privacy.delta), wording.number(privacy.clip_norm)
    return [
        ("Federation", f"{federation.name}, version {federation.version}"),
        ("Merchants needed", f"{needed}; up to {aggregation.colluders:,} may collude"),
        ("Features", f"{len(contract.features):,}, as {contract.inputs:,} model inputs"),
        ("Segments", ", ".join(contract.segments.names)),
        ("Model", shape if model.family == "mlp" else model.family),
        ("Noise", noise[training.mode]),
        ("Sums", "masked" if aggregation.secure else "not masked"),
        ("Rounds", f"{training.rounds:,}, and {training.spare_rounds:,} spare"),
        ("Optimizer", f"{training.optimizer}, learning rate {rate}"),
        ("Held out for evaluation", f"{100 * training.held_out:.3g} % of the customers"),
        ("Privacy", f"epsilon at most {epsilon}, delta {delta}, clip norm {clip}"),
        ("Budget", ", ".join(f"{name} {100 * share:.3g} %" for name, share in privacy.split)),
    ]


def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: wording.plain(value) if type(value) is str else value,
    )
    filters: dict[str, Any] = {
        "cell": _cell,
        "counted": wording.counted,
        "duration": wording.duration,
        "epsilon": statements.epsilon_text,
        "method": wording.method_name,
        "number": wording.number,
        "percent": wording.percent,
        "spread": wording.spread_text,
        "svg": Markup,  # pictures are ours, and matplotlib escapes the names in them
    }
    environment.filters.update(filters)
    environment.globals.update(known=wording.known, too_few=wording.TOO_FEW)
    return environment
