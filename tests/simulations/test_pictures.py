"""The pictures, as SVG and PNG."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from common.errors import HansaError
from simulations import pictures
from simulations.result import Comparison, SimulationResult

DRAWN = [
    pictures.learning_curve,
    pictures.epsilon_curve,
    pictures.segment_shares,
    pictures.confusion_matrix,
]
SVG = "{http://www.w3.org/2000/svg}"


def _words(svg: str) -> list[str]:
    return [text.text or "" for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]  # noqa: S314


@pytest.mark.parametrize("draw", DRAWN)
class TestEveryPicture:
    """What holds for each picture of a simulation."""

    def test_well_formed(
        self, draw: Callable[[SimulationResult], str], small_result: SimulationResult
    ) -> None:
        """The picture is one named element, with words as words and no colour scheme of its own."""
        svg = draw(small_result)
        root = ElementTree.fromstring(svg)  # noqa: S314
        assert svg.startswith("<svg")
        assert root.get("role") == "img"
        assert root.get("aria-label")
        assert len(_words(svg)) > 4
        assert "var(--ink" in svg or "var(--soft" in svg
        assert "xlink" not in svg

    def test_deterministic(
        self, draw: Callable[[SimulationResult], str], small_result: SimulationResult
    ) -> None:
        """The same result gives the same bytes."""
        assert draw(small_result) == draw(small_result)

    def test_hostile_names(
        self, draw: Callable[[SimulationResult], str], hostile_result: SimulationResult
    ) -> None:
        """Names with markup, mathematics and foreign letters are drawn as they are written."""
        svg = draw(hostile_result)
        ElementTree.fromstring(svg)  # noqa: S314
        assert "<script" not in svg

    def test_nothing_to_show(
        self, draw: Callable[[SimulationResult], str], small_result: SimulationResult
    ) -> None:
        """Without figures there is no picture."""
        assert draw(replace(small_result, rounds=(), segments=(), confusion=())) == ""


def test_rounds_without_evaluation(small_result: SimulationResult) -> None:
    """Rounds without a finite accuracy leave the learning curve empty, not at zero."""
    rounds = [replace(entry, accuracy=None) for entry in small_result.rounds]
    rounds[3] = replace(rounds[3], accuracy=float("nan"))
    assert pictures.learning_curve(replace(small_result, rounds=tuple(rounds))) == ""


def test_many_rounds_stay_small(small_result: SimulationResult) -> None:
    """Twenty thousand rounds are thinned, and the last one is kept."""
    last = small_result.rounds[-1]
    rounds = tuple(replace(last, round=number) for number in range(1, 20_001))
    svg = pictures.learning_curve(replace(small_result, rounds=rounds))
    assert len(svg) < 400_000
    assert "after round 20000" in svg


def test_suppressed_share(small_result: SimulationResult) -> None:
    """A suppressed share says so in the picture and in its label."""
    svg = pictures.segment_shares(small_result)
    assert "too few" in _words(svg)
    assert "Champion too few" in svg


def test_confusion_counts(small_result: SimulationResult) -> None:
    """All counts are printed as whole numbers, negative noise included."""
    words = _words(pictures.confusion_matrix(small_result))
    assert {"88", "61", "56", "72", "-1", "0"} <= set(words)


def test_epsilon_shows_the_cap(small_result: SimulationResult) -> None:
    """The cap and the whole run's epsilon are written beside the curve."""
    words = _words(pictures.epsilon_curve(small_result))
    assert "cap 1" in words
    assert "◆ whole run 0.982" in words


def test_dots_name_every_method(shop_comparison: Comparison) -> None:
    """Every method with a figure has a row; one without is left out."""
    assert "Most common segment" in _words(pictures.method_dots(shop_comparison, "accuracy"))
    words = _words(pictures.method_dots(shop_comparison, "auc"))
    assert "Most common segment" not in words
    assert "Together, shared noise, ε 1" in words
    assert pictures.method_dots(replace(shop_comparison, rows=()), "auc") == ""


@pytest.mark.parametrize(("name", "start"), [("c.png", b"\x89PNG"), ("deep/c.SVG", b"<?xml")])
def test_comparison_picture(
    shop_comparison: Comparison, tmp_path: Path, name: str, start: bytes
) -> None:
    """The file's ending chooses the kind, and folders are made."""
    pictures.write_comparison_picture(shop_comparison, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


def test_comparison_picture_of_another_kind(shop_comparison: Comparison, tmp_path: Path) -> None:
    """Another ending is an error that says what is expected."""
    with pytest.raises(HansaError, match=r"expected a picture's name to end in \.png or \.svg"):
        pictures.write_comparison_picture(shop_comparison, tmp_path / "c.gif")


def test_settings_stay_ours(small_result: SimulationResult) -> None:
    """A caller's matplotlib settings neither change nor are changed."""
    import matplotlib

    plain = pictures.learning_curve(small_result)
    with matplotlib.rc_context({"font.size": 30.0}):
        assert pictures.learning_curve(small_result) == plain
        assert matplotlib.rcParams["font.size"] == 30.0


def test_imports_are_lazy() -> None:
    """Importing what writes reports loads neither matplotlib nor jinja2 nor scipy."""
    code = (
        "import sys, simulations.report, simulations.documents\n"
        "print({'matplotlib', 'jinja2', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "set()"
