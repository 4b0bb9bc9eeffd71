"""The picture of a merchant's budget over time, as SVG text written by hand.

Colours are the page's CSS variables, so that it follows light and dark; words are escaped. The
line is everything ever spent, the dashed one the cap.
"""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from audit.plain import Measure, shown_epsilon, words

WIDTH, HEIGHT = 400, 236
LEFT, RIGHT, TOP, BOTTOM = 44, 388, 18, 200
TAIL = 48  # behind the last run, where its settlement shows
MOST_POINTS = 120
MOST_NAMED = 6  # runs in the text for those who do not see the picture
FAR = 8.0  # a cap this many times what was spent is told in words only

Merchant = Mapping[str, Any]


@dataclass(frozen=True)
class Dot:
    """What was spent for ever after one run."""

    x: float
    epsilon: float
    run: str
    day: str


def budget_picture(merchant: Merchant) -> str:
    """Draw what a merchant spent over time; nothing where no finite epsilon is told."""
    dots = _dots(merchant["timeline"])
    if not dots:
        return ""
    cap = _finite(merchant["cap"])
    spent = max(_finite(merchant["lifetime"]) or 0.0, *(dot.epsilon for dot in dots))
    near = cap is not None and cap <= FAR * max(spent, 1e-9)
    top = 1.16 * max(spent, cap if near and cap is not None else 0.0, 1e-9)
    parts = [
        *_grid(top),
        *_days(dots),
        *(_cap(cap, top, near) if cap is not None else []),
        *_line(dots, _finite(merchant["lifetime"]), top, cap if near else None),
    ]
    label = html.escape(_told(merchant, dots))
    return (
        f'<svg role="img" viewBox="0 0 {WIDTH} {HEIGHT}" aria-label="{label}">'
        + "".join(parts)
        + "</svg>"
    )


def _finite(value: Measure) -> float | None:
    return float(value) if isinstance(value, int | float) and 0 <= value < 1e12 else None


def _dots(timeline: Sequence[Mapping[str, Any]]) -> list[Dot]:
    """Place the points in time; in their order only where a time is not known."""
    known = [(point, _finite(point["epsilon"])) for point in timeline]
    told = _thinned([(point, epsilon) for point, epsilon in known if epsilon is not None])
    times = [_seconds(point["at"]) for point, _ in told]
    placed = [time for time in times if time is not None]
    timed = len(placed) == len(told) and placed == sorted(placed) and len(set(placed)) > 1
    places = placed if timed else [float(number) for number in range(len(told))]
    first, last = (places[0], places[-1]) if places else (0.0, 0.0)
    inner = RIGHT - LEFT - 8 - TAIL
    return [
        Dot(
            LEFT + 8 + (inner * (place - first) / (last - first) if last > first else inner / 2),
            epsilon,
            point["run"],
            (point["at"] or "")[:10],
        )
        for place, (point, epsilon) in zip(places, told, strict=True)
    ]


def _thinned(
    points: list[tuple[Mapping[str, Any], float]],
) -> list[tuple[Mapping[str, Any], float]]:
    if len(points) <= MOST_POINTS:
        return points
    step = (len(points) - 1) / (MOST_POINTS - 1)
    return [points[round(number * step)] for number in range(MOST_POINTS)]


def _seconds(at: str | None) -> float | None:
    return datetime.fromisoformat(at).timestamp() if at else None


def _y(epsilon: float, top: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * min(epsilon / top, 1.0)


def _step(top: float) -> float:
    """Return a round distance between lines, for three to six of them."""
    power = 10.0 ** math.floor(math.log10(top / 3))
    return next(factor * power for factor in (1, 2, 5, 10) if top / (factor * power) <= 5)


def _grid(top: float) -> list[str]:
    step = _step(top)
    parts = [f'<text class="unit" x="{LEFT - 8}" y="{TOP - 6}" text-anchor="end">\u03b5</text>']
    for line in range(int(top / step) + 1):
        y = _y(line * step, top)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>')
        parts.append(
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{line * step:.3g}</text>'
        )
    return parts


def _days(dots: list[Dot]) -> list[str]:
    first, last = dots[0], dots[-1]
    if len(dots) == 1:
        return [_day(first.day, first.x, "middle")]
    return [_day(first.day, LEFT, "start"), _day(last.day, last.x, "middle")]


def _day(day: str, x: float, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{BOTTOM + 20}" text-anchor="{anchor}">{html.escape(day)}</text>'


def _cap(cap: float, top: float, near: bool) -> list[str]:
    told = f"cap {shown_epsilon(cap)}"
    if not near:
        return [
            f'<text class="cap" x="{RIGHT}" y="{TOP - 4}" text-anchor="end">\u2191 {told}</text>'
        ]
    y = _y(cap, top)
    return [
        f'<path class="cap" d="M{LEFT} {y:.1f}H{RIGHT}"/>',
        f'<text class="cap" x="{LEFT + 6}" y="{y - 6:.1f}">{told}</text>',
    ]


def _line(dots: list[Dot], now: float | None, top: float, cap: float | None) -> list[str]:
    path = f"M{LEFT} {BOTTOM}H{dots[0].x:.1f}"
    path += "".join(f"H{dot.x:.1f}V{_y(dot.epsilon, top):.1f}" for dot in dots)
    last = dots[-1]
    now = last.epsilon if now is None else now
    y = _y(now, top)
    path += f"H{(last.x + RIGHT) / 2:.1f}V{y:.1f}"
    parts = [
        f'<path class="area" d="{path}H{RIGHT}V{BOTTOM}Z"/>',
        f'<path class="spent" d="{path}H{RIGHT}"/>',
    ]
    for dot in dots:
        title = html.escape(f"{dot.day} {words(dot.run, 40)}: epsilon {shown_epsilon(dot.epsilon)}")
        parts.append(
            f'<circle cx="{dot.x:.1f}" cy="{_y(dot.epsilon, top):.1f}" r="3.6">'
            f"<title>{title}</title></circle>"
        )
    crowded = y < TOP + 24 or (cap is not None and -4 <= y - _y(cap, top) < 26)
    below = y + 19 if crowded else y - 9
    parts.append(
        f'<text class="value" x="{RIGHT}" y="{below:.1f}" text-anchor="end">'
        f"{shown_epsilon(now)}</text>"
    )
    return parts


def _told(merchant: Merchant, dots: list[Dot]) -> str:
    """Say the picture for those who do not see it."""
    shown = dots if len(dots) <= MOST_NAMED else [dots[0], dots[-1]]
    steps = ", ".join(
        f"{shown_epsilon(dot.epsilon)} after run {words(dot.run, 40)}"
        + (f" on {dot.day}" if dot.day else "")
        for dot in shown
    )
    return (
        f"Budget of {words(merchant['merchant'], 60)} over time: epsilon {steps}; "
        f"now {shown_epsilon(merchant['lifetime'])}; cap {shown_epsilon(merchant['cap'])}."
    )
