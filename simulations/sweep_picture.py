"""The picture of a sweep: accuracy against epsilon, one line a configuration of the rest."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

from simulations.pictures import PALETTE, drawing, rendered
from simulations.sweep_findings import AXES, Group, Sweep, headline, varied
from simulations.wording import known

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_LINES = 6  # of one panel, before the merchants or the sampling rates get panels of their own
_COLOURS = [PALETTE[name] for name in ("accent", "second", "ink", "soft")]
_DASHES = ["-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2))]
_MARKERS = "osD^vP"
_PANEL = (5.4, 4.2)  # inches
_TITLE = 64  # characters of a line over one panel
_APART = 0.008  # of the axis, between the bars of two lines at the same epsilon
_HELD = "\u00a0"  # a space at which no line is broken
_MOST_TICKS = 10
_NOTHING = "no run has an accuracy to show"
_WIDE = 8  # epsilons further apart than by this factor are spaced by their logarithm


@dataclass(frozen=True)
class Line:
    """One line: groups that differ in epsilon alone, rising."""

    name: str
    groups: tuple[Group, ...]


def picture(sweep: Sweep, kind: str) -> bytes:
    """Draw accuracy against epsilon as a file on white, `png` or `svg`.

    Points are means over the repetitions, bars one standard deviation; of a single run, that of
    the noise in its accuracy. What has no accuracy to state is not drawn.
    """
    panels = _panels(sweep.groups)
    parts = (part.replace(" ", _HELD) for part in headline(sweep).split(", "))
    told = textwrap.fill(", ".join(parts), _TITLE * len(panels))
    with drawing():
        from matplotlib.figure import Figure

        size = (_PANEL[0] * len(panels), _PANEL[1])
        figure = Figure(figsize=size, layout="constrained", facecolor=PALETTE["panel"])
        shape = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)
        for axes, (title, groups) in zip(shape[0], panels, strict=True):
            _paint(axes, title, _lines(groups))
        shape[0][0].set_ylabel("Noisy accuracy, %")
        figure.suptitle(told, fontsize=10, color=PALETTE["soft"])
        return rendered(figure, kind)


def _panels(groups: Sequence[Group]) -> list[tuple[str, list[Group]]]:
    """Split many lines over panels, by merchants if they vary, else by sampling rate."""
    if len(_lines(groups)) > _MOST_LINES:
        for name in ("merchants", "sampling_rate"):
            if name in varied(groups):
                values = sorted({getattr(group.any, name) for group in groups})
                parts = [[g for g in groups if getattr(g.any, name) == value] for value in values]
                return [(AXES[name](part[0].any), part) for part in parts]
    return [("", list(groups))]


def _lines(groups: Sequence[Group]) -> list[Line]:
    """Put groups that differ in epsilon alone on one line, named by what tells it from others."""
    varying = varied(groups)
    if "merchants" in varying and "delta" in varying and _follows(groups):
        varying.remove("delta")
    found: dict[tuple[float, ...], list[Group]] = {}
    for group in groups:
        found.setdefault(tuple(getattr(group.any, name) for name in AXES), []).append(group)
    return [
        Line(
            ", ".join(AXES[name](part[0].any) for name in varying),
            tuple(sorted(part, key=lambda group: group.any.epsilon)),
        )
        for _, part in sorted(found.items())
    ]


def _follows(groups: Sequence[Group]) -> bool:
    """Tell whether delta is the same wherever the number of merchants is."""
    pairs = {(group.any.merchants, group.any.delta) for group in groups}
    return len(pairs) == len({merchants for merchants, _ in pairs})


def _paint(axes: "Axes", title: str, lines: Sequence[Line]) -> None:
    epsilons = sorted({group.any.epsilon for line in lines for group in line.groups})
    wide = epsilons[-1] > _WIDE * epsilons[0]
    styles = zip(cycle(_COLOURS), _dashes(), cycle(_MARKERS), strict=False)
    for place, (line, (colour, dashes, marker)) in enumerate(zip(lines, styles, strict=False)):
        shown = [group for group in line.groups if known(group.accuracy.mean)]
        if not shown:
            continue
        aside = _APART * (place - (len(lines) - 1) / 2)  # so that bars do not cover each other
        errors = [group.accuracy.sd if known(group.accuracy.sd) else 0.0 for group in shown]
        axes.errorbar(
            [_beside(group.any.epsilon, aside, epsilons, wide=wide) for group in shown],
            [100 * group.accuracy.mean for group in shown],
            yerr=[100 * error for error in errors],
            color=colour,
            linestyle=dashes,
            marker=marker,
            markersize=5,
            elinewidth=1.1,
            capsize=2.5,
            label=line.name or None,
        )
    if wide:
        axes.set_xscale("log")
        axes.minorticks_off()
    if len(epsilons) <= _MOST_TICKS:
        axes.set_xticks(epsilons, [f"{value:g}" for value in epsilons])
    axes.set_xlabel("Epsilon of the contract")
    axes.set_title(title, fontsize=10)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    if not axes.has_data():
        axes.set_yticks([])
        axes.text(0.5, 0.5, _NOTHING, ha="center", va="center", transform=axes.transAxes)
    elif any(line.name for line in lines):
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False, fontsize=8.5, ncols=2
        )


def _beside(value: float, aside: float, epsilons: Sequence[float], *, wide: bool) -> float:
    """Move a point aside by a part of the axis."""
    if wide:
        return float(value * (epsilons[-1] / epsilons[0]) ** aside)
    return value + aside * (epsilons[-1] - epsilons[0])


def _dashes() -> "cycle[object]":
    """Change the dashes when the colours begin anew."""
    return cycle([dashes for dashes in _DASHES for _ in _COLOURS])
