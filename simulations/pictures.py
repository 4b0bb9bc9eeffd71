"""Pictures of a simulation and a comparison, as SVG text.

Matplotlib figures are made directly, without pyplot and its global state, and matplotlib is
imported only when a picture is drawn. Every colour is one of `PALETTE`; in the SVG it becomes a
CSS variable with the light colour to fall back on, so a page can show the same picture light and
dark. A picture that has nothing to show is the empty string.
"""

import html
import io
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from common.errors import HansaError
from common.statements import epsilon_text
from simulations.result import Comparison, ComparisonRow, RoundRecord, SimulationResult, Spread
from simulations.wording import (
    RULES,
    TOO_FEW,
    known,
    method_name,
    number,
    percent,
    plain,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = {  # CSS variable -> colour on a light ground; blue and vermilion differ for all eyes
    "ink": "#1b2430",
    "soft": "#556173",
    "line": "#dde3ea",
    "accent": "#0b66a8",
    "second": "#b5490a",
    "panel": "#fffffe",
}
WIDTH = 4.6  # inches; small, so that the words stay readable on a telephone
FONT = 9.5
MAX_POINTS = 400
MAX_NAME = 22
CELL_STRENGTH = 0.5  # the strongest cell still leaves the printed number its contrast
_STYLES: dict[Any, Any] = {
    "axes.edgecolor": PALETTE["soft"],
    "axes.facecolor": "none",
    "axes.labelcolor": PALETTE["soft"],
    "axes.labelsize": FONT,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": FONT,
    "grid.color": PALETTE["line"],
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    "svg.hashsalt": "hansa",
    "text.color": PALETTE["ink"],
    "text.parse_math": False,  # names are text, whatever dollar signs they hold
    "xtick.color": PALETTE["soft"],
    "ytick.color": PALETTE["soft"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}
_ROLES = {colour: f"var(--{role}, {colour})" for role, colour in PALETTE.items()}


def learning_curve(result: SimulationResult) -> str:
    """Draw the noisy accuracy over the rounds, with one standard deviation of its noise."""
    measured = _thinned([entry for entry in result.rounds if known(entry.accuracy)])
    if not measured:
        return ""
    rounds = [entry.round for entry in measured]
    accuracies = [100 * (entry.accuracy or 0.0) for entry in measured]
    errors = [100 * (entry.accuracy_error or 0.0) for entry in measured]

    def paint(axes: "Axes") -> None:
        axes.errorbar(
            rounds,
            accuracies,
            yerr=errors,
            color=PALETTE["accent"],
            marker="o",
            markersize=4.5,
            elinewidth=1.1,
            capsize=2.5,
        )
        axes.set_xlabel("Training round")
        axes.set_ylabel("Noisy accuracy, %")
        axes.grid(axis="y")
        axes.set_xlim(0, max(result.rounds[-1].round, rounds[-1]) * 1.03)
        axes.locator_params(axis="x", integer=True)

    told = (
        f"{percent(entry.accuracy, entry.accuracy_error)} after round {entry.round}"
        for entry in (measured[0], measured[-1])
    )
    label = f"Learning curve: noisy accuracy {', '.join(told)}."
    return _picture("learning", label, (WIDTH, 3.0), paint)


def epsilon_curve(result: SimulationResult) -> str:
    """Draw the epsilon spent so far over the rounds, against the contract's cap."""
    spent = _thinned([entry for entry in result.rounds if known(entry.epsilon)])
    if not spent:
        return ""
    cap = result.contract.privacy.epsilon
    end = spent[-1].round

    def paint(axes: "Axes") -> None:
        axes.plot(
            [entry.round for entry in spent],
            [entry.epsilon for entry in spent],
            color=PALETTE["accent"],
        )
        axes.axhline(cap, color=PALETTE["second"], linestyle=(0, (5, 3)), linewidth=1.4)
        axes.annotate(
            f"cap {epsilon_text(cap)}",
            (0, cap),
            xytext=(4, 5),
            textcoords="offset points",
            color=PALETTE["second"],
        )
        if known(result.epsilon):
            axes.plot([end], [result.epsilon], marker="D", markersize=5.5, color=PALETTE["accent"])
            told = f"◆ whole run {epsilon_text(result.epsilon)}"
            corner = axes.transAxes
            axes.text(0.98, 0.06, told, ha="right", color=PALETTE["accent"], transform=corner)
        axes.set_xlabel("Training round")
        axes.set_ylabel("Epsilon spent so far")
        axes.grid(axis="y")
        axes.set_xlim(0, end * 1.03)
        axes.set_ylim(0, 1.18 * max(cap, *(entry.epsilon for entry in spent)))
        axes.locator_params(axis="x", integer=True)

    label = (
        f"Epsilon over the rounds: {epsilon_text(spent[-1].epsilon)} after round {end}, "
        f"{epsilon_text(result.epsilon)} for the whole run, cap {epsilon_text(cap)}."
    )
    return _picture("epsilon", label, (WIDTH, 3.0), paint)


def segment_shares(result: SimulationResult) -> str:
    """Draw every segment's noisy share with its error; a suppressed one says so."""
    segments = result.segments
    if not segments:
        return ""
    names = [plain(segment.name, MAX_NAME) for segment in segments]
    shares = [100 * (segment.share or 0.0) if known(segment.share) else 0.0 for segment in segments]
    errors = [
        100 * (segment.share_error or 0.0) if known(segment.share) else 0.0 for segment in segments
    ]

    def paint(axes: "Axes") -> None:
        rows = range(len(segments))
        axes.barh(rows, shares, height=0.56, color=PALETTE["accent"], alpha=0.85)
        reach = max([1.0, *(share + error for share, error in zip(shares, errors, strict=True))])
        for row, segment in enumerate(segments):
            told = TOO_FEW
            if known(segment.share):
                axes.errorbar(
                    shares[row],
                    row,
                    xerr=errors[row],
                    color=PALETTE["ink"],
                    elinewidth=1.1,
                    capsize=2.5,
                    linestyle="none",
                )
                told = f"{shares[row]:.1f} %"
            at = max(shares[row] + errors[row], 0.0) + 0.02 * reach
            axes.text(at, row, told, va="center", color=PALETTE["soft"])
        axes.set_yticks(rows, names)
        axes.invert_yaxis()
        axes.set_xlim(min([0.0, *shares]), 1.2 * reach)
        axes.set_xlabel("Share of customers, %")
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.spines["left"].set_visible(False)

    parts = (
        f"{name} {percent(segment.share, segment.share_error) if known(segment.share) else TOO_FEW}"
        for name, segment in zip(names, segments, strict=True)
    )
    label = f"Segment shares: {'; '.join(parts)}."
    return _picture("shares", label, (WIDTH, max(2.2, 0.9 + 0.42 * len(segments))), paint)


def confusion_matrix(result: SimulationResult) -> str:
    """Draw the noisy confusion counts; colour is the share of the true segment's row."""
    counts = result.confusion
    if not counts:
        return ""
    names = [plain(name, 14) for name in result.contract.segments.names]

    def paint(axes: "Axes") -> None:
        size = max(5.0, min(10.0, 52.0 / len(counts)))
        for row, values in enumerate(counts):
            total = sum(max(value, 0.0) for value in values) or 1.0
            for column, value in enumerate(values):
                strength = CELL_STRENGTH * max(value, 0.0) / total
                _cell(axes, column, row, strength)
                axes.text(
                    column,
                    row,
                    f"{round(value):,}",
                    ha="center",
                    va="center",
                    fontsize=size,
                )
        axes.set_xticks(
            range(len(names)),
            names,
            rotation=30 if len(names) > 3 else 0,
            ha="right" if len(names) > 3 else "center",
            rotation_mode="anchor",
        )
        axes.set_yticks(range(len(names)), names)
        axes.set_xlim(-0.52, len(names) - 0.48)
        axes.set_ylim(len(names) - 0.48, -0.52)
        axes.set_xlabel("Predicted segment")
        axes.set_ylabel("True segment")
        axes.spines[["left", "bottom"]].set_visible(False)

    correct = sum(counts[index][index] for index in range(len(counts)))
    label = (
        f"Confusion matrix of {len(counts)} segments, noisy counts of held-out customers: "
        f"{number(correct)} of {number(sum(map(sum, counts)))} on the diagonal."
    )
    return _picture("confusion", label, (WIDTH, max(3.0, min(5.0, 1.6 + 0.5 * len(counts)))), paint)


def method_dots(comparison: Comparison, measure: Literal["accuracy", "auc"]) -> str:
    """Draw one measure of every method, mean with one standard deviation over the seeds."""
    rows = [row for row in comparison.rows if known(getattr(row, measure).mean)]
    if not rows:
        return ""
    title = "Accuracy" if measure == "accuracy" else "AUC"
    parts = (f"{method_name(row)} {getattr(row, measure).mean:.3f}" for row in rows)
    return _picture(
        measure,
        f"{title} by method: {'; '.join(parts)}.",
        (WIDTH, 1.0 + 0.34 * len(rows)),
        lambda axes: _dots(axes, rows, measure),
    )


def write_comparison_picture(comparison: Comparison, path: Path) -> None:
    """Write accuracy and AUC of all methods side by side, on white, as PNG or SVG.

    Raises:
        HansaError: The file name ends in neither .png nor .svg.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in {"png", "svg"}:
        raise HansaError(f"{path}: expected a picture's name to end in .png or .svg")
    with drawing():
        from matplotlib.figure import Figure

        size = (9.5, 1.2 + 0.34 * max(len(comparison.rows), 2))
        figure = Figure(figsize=size, layout="constrained", facecolor=PALETTE["panel"])
        left, right = figure.subplots(1, 2, sharey=True)
        _dots(left, comparison.rows, "accuracy")
        _dots(right, comparison.rows, "auc")
        content = rendered(figure, kind)
    write_whole(path, content)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds the old one or the new one, never a part.

    Raises:
        HansaError: The file cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise HansaError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        part.unlink(missing_ok=True)


def _dots(axes: "Axes", rows: Sequence[ComparisonRow], measure: str) -> None:
    for place, row in enumerate(rows):
        spread: Spread = getattr(row, measure)
        if not known(spread.mean):
            continue
        private = row.epsilon is not None
        colour = PALETTE["accent"] if private else PALETTE["second"]
        axes.errorbar(
            spread.mean,
            place,
            xerr=spread.sd if known(spread.sd) else 0.0,
            color=PALETTE["soft"] if row.method in RULES else colour,
            marker="D" if row.method in RULES else "o",
            markersize=5.5 if row.method in RULES else 6.5,
            markerfacecolor=None if private else PALETTE["panel"],
            markeredgewidth=1.5,
            elinewidth=1.3,
            capsize=0,
        )
    axes.set_yticks(range(len(rows)), [method_name(row) for row in rows], color=PALETTE["ink"])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("Accuracy" if measure == "accuracy" else "AUC")
    axes.margins(x=0.08)
    axes.grid(axis="both")
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    axes.locator_params(axis="x", nbins=5)


def _cell(axes: "Axes", column: int, row: int, strength: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    axes.add_patch(
        FancyBboxPatch(
            (column - 0.46, row - 0.46),
            0.92,
            0.92,
            boxstyle="round,pad=0,rounding_size=0.06",
            facecolor=PALETTE["accent"],
            edgecolor="none",
            alpha=max(strength, 0.03),
        )
    )


def _thinned(rounds: Sequence[RoundRecord]) -> Sequence[RoundRecord]:
    """Keep at most about `MAX_POINTS` rounds, evenly, and always the last."""
    stride = -(-len(rounds) // MAX_POINTS) or 1
    return rounds[::-1][::stride][::-1]


def _picture(
    name: str, label: str, size: tuple[float, float], paint: Callable[["Axes"], None]
) -> str:
    with drawing():
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, layout="constrained")
        paint(figure.subplots())
        text = rendered(figure, "svg").decode()
    return inline(text, name, label)


@contextmanager
def drawing() -> Iterator[None]:
    """Hold our settings, and no others, while a figure is made and saved."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLES)
        # The reader's fonts show what matplotlib's own cannot measure.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        yield


def rendered(figure: "Figure", kind: str) -> bytes:
    """Return a figure as a file, `svg` or `png`, without date or software."""
    buffer = io.BytesIO()
    if kind == "svg":
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    else:
        figure.savefig(buffer, format=kind, dpi=160, metadata={"Software": None})
    figure.clear()
    return buffer.getvalue()


def inline(svg: str, name: str, label: str) -> str:
    """Turn matplotlib's file into an element: ids of its own, named, in the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style\b.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<[^<>]*>", lambda tag: _retagged(tag.group(), name), svg)
    opening = f'<svg role="img" aria-label="{html.escape(label)}" stroke-linejoin="round"'
    svg = svg.replace("<svg", opening, 1)
    return re.sub(r"\n\s*", "\n", svg).strip()


def _retagged(tag: str, name: str) -> str:
    tag = tag.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")
    tag = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', tag)
    tag = re.sub(r'\bid="', f'id="{name}-', tag)
    tag = tag.replace("url(#", f"url(#{name}-").replace("'DejaVu Sans'", "var(--font, sans-serif)")
    return re.sub(r"#[0-9a-f]{6}\b", lambda colour: _ROLES.get(colour.group(), colour.group()), tag)
