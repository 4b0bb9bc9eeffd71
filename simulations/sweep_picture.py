"""The picture of a sweep: accuracy against epsilon, one line a configuration of the rest."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

from simulations.pictures import PALETTE, drawing, rendered
from simulations.sweep_findings import AXES, Group, Sweep, headline, varied
from simulations.wording import known

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_LINES = 6  # of one panel, before the merchants or the sampling rates get panels of their own
_COLOURS = [PALETTE[name] for name in ("accent", "second", "ink", "soft")]
_DASHES = ["-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2))]
_MARKERS = "osD^vP"
_PANEL = (5.2, 4.2)  # inches
_TITLE = 64  # characters of a line over one panel
_APART = 3.0  # points between the bars of two lines at the same epsilon
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
    with drawing():
        from matplotlib.figure import Figure

        size = (_PANEL[0] * len(panels), _PANEL[1])
        figure = Figure(figsize=size, layout="constrained", facecolor=PALETTE["panel"])
        shape = figure.subplots(1, len(panels), sharey=True, squeeze=False)
        for axes, (title, groups) in zip(shape[0], panels, strict=True):
            _paint(axes, title, _lines(groups))
        shape[0][0].set_ylabel("Noisy accuracy, %")
        figure.suptitle(
            "\n".join(textwrap.wrap(headline(sweep), _TITLE * len(panels))),
            fontsize=10,
            color=PALETTE["soft"],
        )
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
    styles = zip(cycle(_COLOURS), _dashes(), cycle(_MARKERS), strict=False)
    for place, (line, (colour, dashes, marker)) in enumerate(zip(lines, styles, strict=False)):
        shown = [group for group in line.groups if known(group.accuracy.mean)]
        if not shown:
            continue
        errors = [group.accuracy.sd if known(group.accuracy.sd) else 0.0 for group in shown]
        axes.errorbar(
            [group.any.epsilon for group in shown],
            [100 * group.accuracy.mean for group in shown],
            yerr=[100 * error for error in errors],
            color=colour,
            linestyle=dashes,
            marker=marker,
            markersize=5,
            elinewidth=1.1,
            capsize=2.5,
            label=line.name or None,
            transform=_beside(axes, place - (len(lines) - 1) / 2),
        )
    _ticks(axes, sorted({group.any.epsilon for line in lines for group in line.groups}))
    axes.set_xlabel("Epsilon of the contract")
    axes.set_title(title, fontsize=10)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    if any(line.name for line in lines) and axes.get_legend_handles_labels()[0]:
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False, fontsize=8.5, ncols=2
        )


def _beside(axes: "Axes", places: float) -> Any:
    """Move a line to the side, so that its bars do not cover those of the others."""
    from matplotlib.transforms import ScaledTranslation

    moved = ScaledTranslation(places * _APART / 72, 0, axes.figure.dpi_scale_trans)
    return axes.transData + moved


def _dashes() -> "cycle[object]":
    """Change the dashes when the colours begin anew."""
    return cycle([dashes for dashes in _DASHES for _ in _COLOURS])


def _ticks(axes: "Axes", epsilons: Sequence[float]) -> None:
    if epsilons[-1] > _WIDE * epsilons[0]:
        axes.set_xscale("log")
        axes.minorticks_off()
    else:
        axes.set_xlim(0, 1.06 * epsilons[-1])
    if len(epsilons) <= 10:
        axes.set_xticks(epsilons, [f"{value:g}" for value in epsilons])
