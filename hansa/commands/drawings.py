"""Pictures of one merchant's budget and of a plan: PNG, SVG, or a page of its own."""

import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import PolicyError
from common.statements import epsilon_text
from simulations.pictures import PALETTE, WIDTH, drawing, inline, rendered, write_whole
from simulations.wording import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = (".png", ".svg", ".html")
_MOST_BARS = 12
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 44rem; margin: auto; padding: 1rem }}
svg {{ width: 100%; height: auto }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6ebf1; --soft: #a9b4c2; --line: #3a4450; --accent: #6cb6ee; --second: #f0a071 }}
}}
</style>
<h1>{title}</h1>
{picture}
<p>{label}</p>
</html>
"""


def check_picture(path: Path | None) -> None:
    """Raise a `PolicyError` for a picture's name of no known kind, before any work is done."""
    if path is not None and path.suffix.lower() not in KINDS:
        raise PolicyError(f"{path}: expected a picture's name to end in {', '.join(KINDS)}")


def write_budget(bars: Sequence[tuple[str, float]], cap: float, title: str, path: Path) -> None:
    """Draw what was spent against the cap.

    Args:
        bars: (what, epsilon of it alone); the first is everything together.
        cap: Epsilon.
        title: Of the page.
        path: A name that ends in .png, .svg or .html.
    """
    shown = list(bars)[:_MOST_BARS]

    def paint(axes: "Axes") -> None:
        places = range(len(shown))
        colours = [PALETTE["accent"]] + [PALETTE["soft"]] * (len(shown) - 1)
        axes.barh(places, [value for _, value in shown], height=0.56, color=colours)
        axes.axvline(cap, color=PALETTE["second"], linestyle=(0, (5, 3)), linewidth=1.4)
        reach = max([cap, *(value for _, value in shown)])
        for place, (_, value) in enumerate(shown):
            axes.text(1.04 * reach, place, epsilon_text(value), va="center")
        axes.set_yticks(places, [plain(name, 22) for name, _ in shown])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.2 * reach)
        axes.set_xlabel(f"Epsilon alone; cap {epsilon_text(cap)}. Epsilons do not add up")
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.spines["left"].set_visible(False)

    told = "; ".join(f"{plain(name)} {epsilon_text(value)}" for name, value in shown)
    label = f"Epsilon spent, each alone: {told}. Cap {epsilon_text(cap)}."
    _write(path, title, label, (1.5 * WIDTH, 1.3 + 0.36 * len(shown)), paint)


def write_curve(
    curve: Sequence[tuple[int, float]], reserved: float, title: str, path: Path
) -> None:
    """Draw epsilon over the rounds of a run, and what is reserved for it."""
    rounds, spent = [number for number, _ in curve], [value for _, value in curve]

    def paint(axes: "Axes") -> None:
        axes.plot(rounds, spent, color=PALETTE["accent"], marker="o", markersize=3)
        axes.axhline(reserved, color=PALETTE["second"], linestyle=(0, (5, 3)), linewidth=1.4)
        axes.annotate(
            f"reserved {epsilon_text(reserved)}",
            (0, reserved),
            xytext=(4, 5),
            textcoords="offset points",
            color=PALETTE["second"],
        )
        axes.set_xlabel("Training round")
        axes.set_ylabel("Epsilon after it")
        axes.grid(axis="y")
        axes.set_xlim(0, rounds[-1] * 1.03)
        axes.set_ylim(0, 1.18 * max(reserved, *spent))
        axes.locator_params(axis="x", integer=True)

    label = (
        f"Epsilon over the rounds: {epsilon_text(spent[-1])} after round {rounds[-1]}, the last; "
        f"{epsilon_text(reserved)} is reserved, spare attempts included."
    )
    _write(path, title, label, (1.5 * WIDTH, 3.4), paint)


def _write(
    path: Path,
    title: str,
    label: str,
    size: tuple[float, float],
    paint: Callable[["Axes"], None],
) -> None:
    kind = path.suffix.lower().removeprefix(".")
    with drawing():
        from matplotlib.figure import Figure

        ground = "none" if kind == "html" else PALETTE["panel"]
        figure = Figure(figsize=size, layout="constrained", facecolor=ground)
        paint(figure.subplots())
        content = rendered(figure, "png" if kind == "png" else "svg")
    if kind == "html":
        picture = inline(content.decode(), "picture", label)
        page = _PAGE.format(
            title=html.escape(plain(title)), picture=picture, label=html.escape(label)
        )
        content = page.encode()
    write_whole(path, content)
