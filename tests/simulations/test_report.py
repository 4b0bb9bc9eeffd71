"""The HTML pages, read back as a browser would."""

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from common import statements
from common.accounting import person_table
from common.errors import HansaError
from simulations.report import highlights, verdict, write_comparison, write_report
from simulations.result import Comparison, ComparisonRow, SimulationResult, Spread
from simulations.wording import epsilon_text, method_name

VOID = {"meta", "br", "hr", "img", "input", "link", "wbr"}
CSP = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Page(HTMLParser):
    """Collect a page's tags and words, and hold that every tag is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an opening tag."""
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag that closes itself."""
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        """Hold that the last opened tag is the one that closes."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Note the words a reader sees."""
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        """Return all words, with single spaces."""
        return " ".join(" ".join(self.words).split())

    def found(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        """List the attributes of all tags of a kind that have these attributes."""
        return [
            attrs
            for name, attrs in self.tags
            if name == tag and attributes.items() <= attrs.items()
        ]


def _report(result: SimulationResult, folder: Path) -> Page:
    write_report(result, folder / "report.html")
    return Page(folder / "report.html")


def _comparison(comparison: Comparison, folder: Path) -> Page:
    write_comparison(comparison, folder / "comparison.html")
    return Page(folder / "comparison.html")


def _assert_self_contained(page: Page) -> None:
    assert page.found("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"] == CSP
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "base"}
    for _, attributes in page.tags:
        assert "src" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    without_namespace = page.source.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?://|@import|url\((?!#)", without_namespace)


class TestReport:
    """The report of a simulation."""

    def test_is_self_contained(self, small_result: SimulationResult, tmp_path: Path) -> None:
        """The page loads nothing and its policy forbids it."""
        _assert_self_contained(_report(small_result, tmp_path))

    def test_headings_in_order(self, small_result: SimulationResult, tmp_path: Path) -> None:
        """There is one h1, and no heading skips a level."""
        page = _report(small_result, tmp_path)
        levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(b - a <= 1 for a, b in pairwise(levels))

    def test_ids_are_unique(self, small_result: SimulationResult, tmp_path: Path) -> None:
        """Four pictures in one page share no id."""
        page = _report(small_result, tmp_path)
        ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
        assert len(ids) == len(set(ids))

    def test_everything_has_a_name(self, small_result: SimulationResult, tmp_path: Path) -> None:
        """Pictures have labels, tables captions, and scroll boxes can be reached by keyboard."""
        page = _report(small_result, tmp_path)
        assert len(page.found("svg", role="img")) == 4
        assert all(picture["aria-label"] for picture in page.found("svg"))
        assert len(page.found("caption")) == len(page.found("table"))
        assert len(page.found("table")) == len(page.found("div", role="region", tabindex="0"))

    def test_key_figures(self, small_result: SimulationResult, tmp_path: Path) -> None:
        """The figures that matter stand in the page."""
        text = _report(small_result, tmp_path).text
        for figure in ("0.982", "0.9818", "1e-5", "58.7 ± 1.8 %", "0.561", "8.3 s", "612 MiB"):
            assert figure in text
        assert "2 of 3 merchants learned to tell 4 customer segments apart" in text
        assert small_result.contract.sha256 in text
        for row in person_table(small_result.epsilon, small_result.delta):
            assert all(epsilon_text(value) in text for value in row[1:])
        assert "One merchant refused, so the sums hold two merchants." in text
        assert "its own cap of 0.5 would be passed" in text

    def test_red_box_when_not_masked(self, small_result: SimulationResult, tmp_path: Path) -> None:
        """Unmasked sums are said in red, with the epsilon towards the server."""
        page = _report(small_result, tmp_path)
        assert len(page.found("div", **{"class": "box red"})) == 1
        assert "Towards the server the epsilon is 1.413, not 0.982." in page.text

    def test_calm_box_when_masked(self, masked_result: SimulationResult, tmp_path: Path) -> None:
        """Masked sums need no warning: a calm box says what that gives, and towards whom."""
        page = _report(masked_result, tmp_path)
        assert not page.found("div", **{"class": "box red"})
        assert len(page.found("div", **{"class": "box note"})) == 1
        assert "not masked" not in page.text
        said = statements.sums_statement("distributed", secure=True, merchants=2)
        assert "over at least 2 merchants" in said
        assert said in page.text

    def test_plain_sums_do_not_claim_masks(
        self, small_result: SimulationResult, tmp_path: Path
    ) -> None:
        """What only masking gives is nowhere on the page of plain sums."""
        text = _report(small_result, tmp_path).text
        assert "The sums were masked" not in text
        assert "the server included" not in text
        assert "Sums not masked" in text

    @pytest.mark.slow
    @pytest.mark.parametrize("secure", [False, True])
    def test_what_single_messages_tell_is_shown_for_plain_sums_only(
        self,
        small_result: SimulationResult,
        masked_result: SimulationResult,
        tmp_path: Path,
        secure: bool,
    ) -> None:
        """Masked sums have no column of a merchant's accuracy or of its epsilon to the server."""
        page = _report(masked_result if secure else small_result, tmp_path)
        assert ("Epsilon towards the server" in page.text) is not secure
        assert ("58.1 ± 3.1 %" in page.text) is not secure
        table = page.source.partition('aria-label="Table of the merchants"')[2]
        head, _, rest = table.partition("</thead>")
        assert head.count('scope="col"') == (5 if secure else 7)
        row = rest.partition("</tr>")[0]
        assert row.count("<td") + row.count("<th") == (5 if secure else 7)

    def test_colluders_have_a_table(self, small_result: SimulationResult, tmp_path: Path) -> None:
        """Every entry, rounded up; what is unbounded is said in a word."""
        page = _report(small_result, tmp_path)
        assert "0 0.981 1 1.398 2 unbounded" in page.text
        assert "each over at least 2 merchants" in page.text
        assert "by the noise of 2 to 3 merchants a sum" in page.text

    def test_own_noise_fears_no_colluders(
        self, small_result: SimulationResult, tmp_path: Path
    ) -> None:
        """In mode local the page says so."""
        contract = small_result.contract.revised(training={"mode": "local"})
        text = _report(replace(small_result, contract=contract), tmp_path).text
        assert "nobody who colludes lessens it" in text

    def test_box_when_seeded(self, small_result: SimulationResult, tmp_path: Path) -> None:
        """A seed is said to make the noise guessable, and only a seed is."""
        assert "Repeatable run" not in _report(small_result, tmp_path).text
        text = _report(replace(small_result, seed=0), tmp_path).text
        assert "Repeatable run: the noise can be guessed, not for release" in text

    def test_suppressed_cells(self, small_result: SimulationResult, tmp_path: Path) -> None:
        """A suppressed share and a suppressed profile read "too few", never a number."""
        text = _report(small_result, tmp_path).text
        assert "Champion too few too few Invite to the club" in text

    def test_hostile_names(self, hostile_result: SimulationResult, tmp_path: Path) -> None:
        """A name is text: it opens no tag, holds no control character and turns no line."""
        page = _report(hostile_result, tmp_path)
        _assert_self_contained(page)
        assert "<script>alert(1)</script>$x^{" in page.text
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", page.source)

    def test_nothing_published(self, small_result: SimulationResult, tmp_path: Path) -> None:
        """A run without evaluation and profiles still has a report."""
        bare = replace(
            small_result,
            rounds=(),
            confusion=(),
            metrics={},
            segments=(),
            spent={},
            epsilon_recomputed=float("nan"),
        )
        page = _report(bare, tmp_path)
        assert not page.found("svg")
        assert "No round has a published accuracy" in page.text
        assert "The two accountants disagree" in page.text
        assert "nan" not in page.text.split()

    def test_thousand_merchants(self, large_result: SimulationResult, tmp_path: Path) -> None:
        """Every one of a thousand merchants has a row, in a box that scrolls, refused first."""
        page = _report(large_result, tmp_path)
        assert len(re.findall(r'scope="row">merchant-\d', page.source)) == 1000
        box = page.found("div", **{"aria-label": "Table of the merchants"})[0]
        assert box["class"] == "scroll tall"
        assert page.text.index("merchant-0975") < page.text.index("merchant-0001")
        assert len(page.source) < 1_000_000

    def test_many_rounds_are_thinned(self, small_result: SimulationResult, tmp_path: Path) -> None:
        """Of thousands of rounds the table shows the evaluated ones, and says so."""
        last = small_result.rounds[-1]
        unevaluated = replace(last, accuracy=None, accuracy_error=None)
        rounds = (
            *(replace(unevaluated, round=n) for n in range(1, 3000)),
            replace(last, round=3000),
        )
        page = _report(replace(small_result, rounds=rounds), tmp_path)
        assert "3,000 training rounds; shown are the last 1 with an evaluation." in page.text

    def test_written_whole(self, small_result: SimulationResult, tmp_path: Path) -> None:
        """An old report is replaced, and no part file stays."""
        _report(small_result, tmp_path)
        _report(replace(small_result, seed=3), tmp_path)
        assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]

    def test_unwritable(self, small_result: SimulationResult, tmp_path: Path) -> None:
        """A file that cannot be written is an error that names it."""
        (tmp_path / "report.html").mkdir()
        with pytest.raises(HansaError, match=r"report\.html: cannot be written"):
            write_report(small_result, tmp_path / "report.html")

    def test_contrast(self, small_result: SimulationResult, tmp_path: Path) -> None:
        """Words keep a contrast of 4.5 (WCAG AA), light and dark."""
        source = _report(small_result, tmp_path).source
        themes = re.findall(r":root \{(.*?--amber-line[^}]*)\}", source, flags=re.DOTALL)
        assert len(themes) == 2
        for theme in themes:
            colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", theme))
            for words in ("ink", "soft", "accent", "second"):
                for ground in ("ground", "panel", "wash"):
                    assert _contrast(colours[words], colours[ground]) >= 4.5
            assert _contrast(colours["red"], colours["red-wash"]) >= 4.5
            assert _contrast(colours["ink"], colours["red-wash"]) >= 4.5
            assert _contrast(colours["ink"], colours["amber-wash"]) >= 4.5


def _contrast(one: str, other: str) -> float:
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


class TestHighlights:
    """What a segment stands out by."""

    def test_largest_differences_first(self, small_result: SimulationResult) -> None:
        """Differences count in the contract's range, so days win over euros here."""
        segments = small_result.segments
        found = highlights(segments[0], segments, small_result.contract)
        assert [mark.feature for mark in found] == ["recency_days", "member", "spend"]
        assert (found[0].typical, found[0].usual, found[0].direction) == (
            "160 days",
            "83 days",
            "above",
        )

    def test_words(self, small_result: SimulationResult) -> None:
        """An unusual word is a highlight, the usual one is not."""
        segments = small_result.segments
        marks = highlights(segments[2], segments, small_result.contract)
        assert [mark.usual for mark in marks if mark.direction == "unlike"] == ["shop"]

    def test_suppressed(self, small_result: SimulationResult) -> None:
        """A suppressed segment stands out by nothing."""
        segments = small_result.segments
        assert highlights(segments[3], segments, small_result.contract) == []


class TestComparison:
    """The page of a comparison."""

    def test_is_self_contained(self, shop_comparison: Comparison, tmp_path: Path) -> None:
        """The page loads nothing and its policy forbids it."""
        _assert_self_contained(_comparison(shop_comparison, tmp_path))

    def test_content(self, shop_comparison: Comparison, tmp_path: Path) -> None:
        """Verdict, both pictures, both tables, the notes and the warning are there."""
        page = _comparison(shop_comparison, tmp_path)
        assert len(page.found("svg")) == 2
        assert len(page.found("table")) == len(page.found("caption")) == 2
        for sentence in (*verdict(shop_comparison), *shop_comparison.notes):
            assert sentence in page.text
        assert "0.587 ± 0.008" in page.text
        assert "full sight of the held-out customers" in page.text
        assert "not for release" in page.text
        assert "nan" not in page.text.split()

    def test_plain_sums_are_said_in_red(self, shop_comparison: Comparison, tmp_path: Path) -> None:
        """And only they are."""
        assert not _comparison(shop_comparison, tmp_path).found("div", **{"class": "box red"})
        page = _comparison(replace(shop_comparison, secure=False), tmp_path)
        assert len(page.found("div", **{"class": "box red"})) == 1
        assert statements.NOT_MASKED_COMPARED in page.text

    def test_hostile_names(self, shop_comparison: Comparison, tmp_path: Path) -> None:
        """A data set's name is text."""
        page = _comparison(replace(shop_comparison, data="<script>x</script>"), tmp_path)
        _assert_self_contained(page)


def _with(comparison: Comparison, method: str, epsilon: float | None, mean: float) -> Comparison:
    def changed(row: ComparisonRow) -> ComparisonRow:
        same = (row.method, row.epsilon) == (method, epsilon)
        return replace(row, accuracy=Spread(mean, 0.008)) if same else row

    return replace(comparison, rows=tuple(changed(row) for row in comparison.rows))


class TestVerdict:
    """The sentences that weigh the methods."""

    def test_better(self, shop_comparison: Comparison) -> None:
        """A clear lead over either rival is said with its size."""
        told = verdict(shop_comparison)
        assert told[2].startswith(
            "At epsilon 1, private-together beats merchants alone without privacy by "
            "7.6 percentage points in accuracy (0.587 against 0.511)"
        )
        assert told[3].startswith(
            'At epsilon 1, private-together beats the free rule "last-period" by 4.3'
        )

    def test_within_chance(self, shop_comparison: Comparison) -> None:
        """A lead smaller than chance is not called one."""
        assert "does not clearly differ" in verdict(shop_comparison)[1]
        assert "0.4 percentage points ahead, within chance" in verdict(shop_comparison)[1]

    def test_worse(self, shop_comparison: Comparison) -> None:
        """A clear loss is said as plainly as a win."""
        told = verdict(_with(shop_comparison, "distributed", 1.0, 0.45))
        assert "does not beat merchants alone without privacy and is 6.1" in told[2]
        assert 'does not beat the free rule "last-period" and is 9.4' in told[3]

    def test_a_start_is_a_rival(self, shop_comparison: Comparison) -> None:
        """What is there before anything is learned is weighed like the other free rule."""
        alone = next(r for r in shop_comparison.rows if r.method == "alone")
        start = replace(alone, method="start", accuracy=Spread(0.6, 0.004))
        told = verdict(replace(shop_comparison, rows=(*shop_comparison.rows, start)))
        assert told[2].startswith(
            "At epsilon 0.5, private-together does not beat the start unchanged and is 5.2"
        )
        assert method_name(start) == "The start unchanged"

    def test_one_seed(self, shop_comparison: Comparison) -> None:
        """One seed shows differences, and says that chance is not known."""
        assert "One seed only" in verdict(replace(shop_comparison, seeds=1))[-1]

    def test_missing_rivals(self, shop_comparison: Comparison) -> None:
        """Rivals that were not measured are said to be missing."""
        rows = tuple(row for row in shop_comparison.rows if row.method == "distributed")
        told = verdict(replace(shop_comparison, rows=rows))
        assert told == [
            "Merchants alone without privacy were not measured.",
            'The free rule "last-period" could not be measured on this data.',
        ]

    def test_nothing_private(self, shop_comparison: Comparison) -> None:
        """Without a private run there is no verdict."""
        assert "not measured" in verdict(replace(shop_comparison, rows=()))[0]


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
class TestBrowser:
    """The report in a real browser, opened from disk."""

    @staticmethod
    def _chromium(page: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                str(CHROMIUM),
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--disable-background-networking",
                "--hide-scrollbars",
                "--enable-logging=stderr",
                "--virtual-time-budget=2000",
                f"--user-data-dir={folder / 'profile'}",
                *arguments,
                page.as_uri(),
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )

    @pytest.mark.slow
    def test_dom(self, hostile_result: SimulationResult, tmp_path: Path) -> None:
        """Chromium finds every section and picture, and the policy has nothing to refuse."""
        write_report(hostile_result, tmp_path / "report.html")
        done = self._chromium(tmp_path / "report.html", tmp_path, "--dump-dom")
        for section in ("key-figures", "pictures", "budget", "segments", "merchants", "contract"):
            assert f'<h2 id="{section}">' in done.stdout
        assert done.stdout.count('<svg role="img"') == 4
        assert "<script" not in done.stdout
        assert "Content Security Policy" not in done.stderr

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("scheme", "accent", "panel"),
        [("1", (0x0B, 0x66, 0xA8), (255, 255, 255)), ("0", (0x6C, 0xB6, 0xF2), (0x17, 0x1E, 0x27))],
        ids=["light", "dark"],
    )
    def test_screenshot(
        self,
        small_result: SimulationResult,
        tmp_path: Path,
        scheme: str,
        accent: tuple[int, int, int],
        panel: tuple[int, int, int],
    ) -> None:
        """The pictures are painted in the colours of the reader's scheme."""
        from PIL import Image

        write_report(small_result, tmp_path / "report.html")
        self._chromium(
            tmp_path / "report.html",
            tmp_path,
            "--window-size=1200,1600",
            f"--blink-settings=preferredColorScheme={scheme}",
            f"--screenshot={tmp_path / 'shot.png'}",
        )
        with Image.open(tmp_path / "shot.png") as shot:
            curve = shot.convert("RGB").crop((90, 1050, 590, 1400))
            colours = {colour: count for count, colour in curve.getcolors(1 << 24) or []}
        assert colours.get(panel, 0) > 50_000
        assert colours.get(accent, 0) > 300
