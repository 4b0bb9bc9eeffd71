"""How findings are said: numbers, cautions and verdicts, once for terminal and HTML.

Nothing here knows a terminal or a browser. An epsilon is rounded up, never down.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from common import statements
from common.statements import epsilon_text
from simulations.result import Comparison, ComparisonRow, SimulationResult, Spread

TOO_FEW = "too few"
NOTHING = "–"  # noqa: RUF001
METHODS = {
    "majority": "Most common segment",
    "last-period": "Same as last period",
    "start": "The start unchanged",
    "alone": "Each merchant alone",
    "distributed": "Together, shared noise",
    "local": "Together, own noise",
    "pooled": "All rows in one place",
}
RULES = frozenset({"majority", "last-period", "start"})  # nothing is trained, nothing is spent
AGREEMENT = 1.02  # a second opinion above the first by more than this is worth a warning
_REORDERING = frozenset("\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e")
_ISOLATING = frozenset("\u2066\u2067\u2068\u2069")


@dataclass(frozen=True)
class Caution:
    """Something a reader must see before any figure."""

    title: str
    text: str
    grave: bool  # grave: in red; otherwise a calm box


def plain(text: str, limit: int | None = None) -> str:
    r"""Make a stranger's name harmless to show, and no longer than `limit` characters.

    Line breaks and tabs become spaces; other control characters, lone surrogates and marks that
    reorder the line become one visible sign.

    >>> plain("a\x1b[31mb"), plain("a long name", limit=7)
    ('a�[31mb', 'a long…')
    """
    shown = "".join(_visible(character) for character in text)
    return shown if limit is None or len(shown) <= limit else shown[: limit - 1].rstrip() + "…"


def _visible(character: str) -> str:
    if character in "\t\n\r":
        return " "
    point = ord(character)
    hidden = point < 32 or 127 <= point < 160 or 0xD800 <= point < 0xE000
    return "\ufffd" if hidden or character in _REORDERING | _ISOLATING else character


def known(value: float | None) -> bool:
    """Tell whether there is a finite number to show."""
    return value is not None and math.isfinite(value)


def number(value: float | None, digits: int = 3) -> str:
    """Write a number with `digits` significant digits and thousands apart.

    >>> number(12345.6), number(0.01234), number(-0.5), number(1e-5)
    ('12,300', '0.0123', '-0.5', '1e-5')
    """
    if value is None or not math.isfinite(value):
        return NOTHING
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4:
        return f"{value:.{digits}g}".replace("e-0", "e-")
    rounded = round(value, digits - 1 - size)
    text = f"{rounded:,.{max(digits - 1 - size, 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def percent(value: float | None, error: float | None = None) -> str:
    """Write a share in percent, with one standard deviation where it is known.

    >>> percent(0.587, 0.012), percent(0.25)
    ('58.7 ± 1.2 %', '25.0 %')
    """
    if value is None or not math.isfinite(value):
        return NOTHING
    if error is None or not math.isfinite(error):
        return f"{100 * value:.1f} %"
    return f"{100 * value:.1f} ± {100 * error:.1f} %"


def spread_text(spread: Spread) -> str:
    """Write mean and standard deviation with three decimals.

    >>> spread_text(Spread(0.5871, 0.0123))
    '0.587 ± 0.012'
    """
    if not math.isfinite(spread.mean):
        return NOTHING
    return f"{spread.mean:.3f}" + (f" ± {spread.sd:.3f}" if math.isfinite(spread.sd) else "")


def duration(seconds: float) -> str:
    """Write a time as people say it.

    >>> duration(8.26), duration(125), duration(7260)
    ('8.3 s', '2 min 5 s', '2 h 1 min')
    """
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def counted(count: int, thing: str) -> str:
    """Write a count with its noun.

    >>> counted(1, "merchant"), counted(1200, "merchant")
    ('1 merchant', '1,200 merchants')
    """
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def headline(result: SimulationResult) -> str:
    """Say in one sentence what the run came to."""
    taking_part = sum(merchant.refused is None for merchant in result.merchants)
    segments = len(result.contract.segments.names)
    accuracy = result.metrics.get("accuracy")
    quality = "without a published accuracy"
    if known(accuracy):
        quality = (
            f"with a noisy accuracy of {percent(accuracy, result.metrics.get('accuracy_error'))}"
        )
    others = "" if taking_part == len(result.merchants) else f" of {len(result.merchants):,}"
    return (
        f"{taking_part:,}{others} {'merchant' if taking_part == 1 and not others else 'merchants'} "
        f"learned to tell {segments} customer segments apart, {quality}, "
        f"for an epsilon of {epsilon_text(result.epsilon)} of the "
        f"{epsilon_text(result.contract.privacy.epsilon)} allowed, "
        + ("towards the server too." if result.secure else "towards whoever sees sums only.")
    )


def assurance(result: SimulationResult) -> str:
    """Say what masking gave; nothing where sums were not masked, of which `cautions` warn."""
    if not result.secure:
        return ""
    mode, fewest = result.contract.training.mode, result.achieved.survivors_min
    return statements.sums_statement(mode, secure=True, merchants=fewest)


def collusion(result: SimulationResult) -> str:
    """Say in one line what noise was achieved, and what colluders leave of it."""
    achieved = epsilon_text(result.achieved.epsilon)
    if result.contract.training.mode == "local":
        return f"epsilon {achieved} whoever colludes: each merchant's own noise is enough"
    fewest, most = result.achieved.survivors_min, result.achieved.survivors_max
    among = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
    parts = [f"epsilon {achieved} by the noise of {among} merchants a sum"]
    for told in result.colluders:
        if told.colluders:
            verb = "colludes" if told.colluders == 1 else "collude"
            parts.append(f"{epsilon_text(told.epsilon)} if {told.colluders:,} {verb}")
    return ", ".join(parts)


def cautions(result: SimulationResult) -> list[Caution]:
    """List what a reader must know before believing any figure, the gravest first."""
    found = []
    if not result.secure:
        found.append(_not_masked(result))
    cap = result.contract.privacy.epsilon
    if result.epsilon > cap * (1 + 1e-9):
        text = (
            f"The contract allows an epsilon of {epsilon_text(cap)}; "
            f"this run spent {epsilon_text(result.epsilon)}. Do not release it."
        )
        found.append(Caution("More was spent than the contract allows", text, grave=True))
    if not result.epsilon_recomputed <= result.epsilon * AGREEMENT:
        text = (
            f"The run says {epsilon_text(result.epsilon)}, the independent accountant finds "
            f"{epsilon_text(result.epsilon_recomputed)}. Believe the larger one."
        )
        found.append(Caution("The two accountants disagree", text, grave=True))
    if result.seed is not None:
        text = (
            f"Everything was drawn from seed {result.seed}, so the noise can be guessed "
            "and protects nobody. Good for trying things out, not for release."
        )
        found.append(
            Caution("Repeatable run: the noise can be guessed, not for release", text, False)
        )
    return found


def _not_masked(result: SimulationResult) -> Caution:
    towards, claimed = epsilon_text(result.epsilon_server), epsilon_text(result.epsilon)
    contrast = "" if towards == claimed else f", not {claimed}"
    text = (
        "Whoever runs the server can see each merchant's single noisy update. "
        f"Towards the server the epsilon is {towards}{contrast}."
    )
    if contrast:
        text += f" The {claimed} holds only towards those who see sums and what is published."
    return Caution("The sums were not masked", text, grave=True)


def comparison_caution(comparison: Comparison) -> Caution | None:
    """Warn of a comparison whose federated runs summed plainly."""
    if comparison.secure:
        return None
    return Caution("The sums were not masked", statements.NOT_MASKED_COMPARED, grave=True)


def method_name(row: ComparisonRow) -> str:
    """Name a method and its privacy.

    >>> spread = Spread(0.5, 0.1)
    >>> method_name(ComparisonRow("local", 2.0, spread, spread, spread, ()))
    'Together, own noise, ε 2'
    """
    name = METHODS.get(row.method, plain(row.method))
    if row.epsilon is not None:
        return f"{name}, ε {epsilon_text(row.epsilon)}"
    return name if row.method in RULES else f"{name}, no privacy"


def verdict(comparison: Comparison) -> list[str]:
    """Say whether private-together is worth it, from the numbers, also where it is not.

    One method is called better than another when a two-sided Welch test over the seeds gives less
    than 5 % to chance, with the cautious `seeds - 1` degrees of freedom.
    """
    together = [
        row for row in comparison.rows if row.method == "distributed" and row.epsilon is not None
    ]
    if not together:
        return ["Private-together was not measured, so there is nothing to weigh it against."]
    alone = _without_privacy(comparison.rows, "alone")
    free = _without_privacy(comparison.rows, "last-period")
    rivals = (
        (alone, "merchants alone without privacy"),
        (free, 'the free rule "last-period"'),
        (_without_privacy(comparison.rows, "start"), "the start unchanged"),
    )
    sentences = [
        _weigh(row, other, rival, comparison.seeds)
        for row in sorted(together, key=lambda row: row.epsilon or 0.0)
        for other, rival in rivals
        if other is not None
    ]
    if alone is None:
        sentences.append("Merchants alone without privacy were not measured.")
    if free is None:
        sentences.append('The free rule "last-period" could not be measured on this data.')
    if comparison.seeds < 2:
        sentences.append("One seed only: how much of this is chance is not known.")
    return sentences


def _without_privacy(rows: Sequence[ComparisonRow], method: str) -> ComparisonRow | None:
    found = (row for row in rows if row.method == method and row.epsilon is None)
    return next(found, None)


def _weigh(row: ComparisonRow, other: ComparisonRow, rival: str, seeds: int) -> str:
    difference = row.accuracy.mean - other.accuracy.mean
    points = f"{abs(100 * difference):.1f} percentage points"
    start = f"At epsilon {epsilon_text(row.epsilon or 0.0)}, private-together"
    end = f"in accuracy ({row.accuracy.mean:.3f} against {other.accuracy.mean:.3f})"
    if known(row.auc.mean) and known(other.auc.mean):
        end += f"; AUC {row.auc.mean:.3f} against {other.auc.mean:.3f}"
    if not math.isfinite(difference):
        return f"{start} and {rival} cannot be weighed: an accuracy is missing."
    if difference == 0 or not _clear(row.accuracy, other.accuracy, seeds):
        side = "ahead" if difference > 0 else "behind"
        by = f"{points} {side}, within chance over {seeds} seeds" if difference else "no difference"
        return f"{start} does not clearly differ from {rival}: {by}, {end}."
    verb = "beats" if difference > 0 else "does not beat"
    by = f"by {points}" if difference > 0 else f"and is {points} behind"
    return f"{start} {verb} {rival} {by} {end}."


def _clear(one: Spread, other: Spread, seeds: int) -> bool:
    """Tell whether two means differ by more than chance; with one seed, take them as they are."""
    if seeds < 2:
        return True
    from scipy.stats import t

    error = math.sqrt((one.sd**2 + other.sd**2) / seeds)
    return bool(abs(one.mean - other.mean) > t.ppf(0.975, seeds - 1) * error)
