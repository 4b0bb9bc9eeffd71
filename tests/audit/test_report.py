"""The report of an audit: its document, and its page read back as a browser would."""

import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from audit.advice import ADVICE, advice_on
from audit.codes import CODES
from audit.filing import FIELDS, MISSING, filing_of, filing_template, read_filing
from audit.findings import Audit, AuditedRun, Finding, Spending
from audit.hazards import HAZARDS
from audit.person import composed, epsilon_of
from audit.plain import measure, shown_epsilon, size, words
from audit.report import report_document, write_report
from audit.report_page import report_html
from audit.report_pictures import budget_picture
from common.accounting import epsilon, person_table
from common.errors import HansaError
from common.events import GaussianSum
from common.statements import odds_statement
from tests.audit.audits import (
    BEGAN,
    CONTRACT,
    EMPIRICAL,
    EVENTS,
    FILING,
    PRIVACY,
    audit,
    evidence,
    failing,
    run,
    spending,
)

DOCS = Path(__file__).parents[2] / "docs"
SCHEMA = json.loads((DOCS / "audit-report.schema.json").read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
VOID = {"meta", "br", "hr", "img", "input", "link", "wbr"}
CSP = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = "<script>alert(1)</script>\"'\x1b[31m\u202e\x00 {{ 7*7 }} </svg><img src=http://x/>"


class Page(HTMLParser):
    """Collect a page's tags and words, and hold that every tag is closed."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.source = source
        self.feed(source)
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


def _document(found: Audit, empirical: Any = None, filed: Any = None) -> dict[str, Any]:
    document = report_document(found, empirical, filed or {}, BEGAN)
    VALIDATOR.validate(document)
    json.dumps(document, allow_nan=False)
    return document


def _page(found: Audit, empirical: Any = None, filed: Any = None) -> Page:
    return Page(report_html(_document(found, empirical, filed)))


def _assert_self_contained(page: Page) -> None:
    assert page.found("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"] == CSP
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "base"}
    for _, attributes in page.tags:
        assert "src" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert not re.search(r"@import|url\(", page.source)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", page.source)


class TestDocument:
    """The JSON document."""

    def test_fits_its_schema(self) -> None:
        """Audits that pass, fail, or found nothing to check."""
        for found in (audit(), failing(), Audit((), ())):
            _document(found, EMPIRICAL, FILING)

    def test_the_schema_knows_no_other_field(self) -> None:
        """A field that is not described is refused."""
        with pytest.raises(jsonschema.ValidationError):
            VALIDATOR.validate({**_document(audit()), "surprise": 1})

    def test_verdicts(self) -> None:
        """Pass, fail, and nothing checked are three things."""
        assert _document(audit())["verdict"]["outcome"] == "pass"
        verdict = _document(failing())["verdict"]
        assert (verdict["outcome"], verdict["passed"]) == ("fail", False)
        assert verdict["headline"] == "2 findings fail this audit."
        empty = _document(Audit((), ()))["verdict"]
        assert (empty["outcome"], empty["passed"]) == ("nothing", False)

    def test_what_a_verdict_does_not_cover(self) -> None:
        """Missing ledgers, runs, replays, merchants' evidence and attacks are said."""
        assert len(_document(Audit((), ()))["verdict"]["lacks"]) == 3
        lacks = _document(replace(audit(), runs=(replace(run(), replayed=None),)))["verdict"]
        assert any("could not be replayed" in told for told in lacks["lacks"])
        assert any("coordinator's word" in told for told in lacks["lacks"])

    def test_findings_the_gravest_first(self) -> None:
        """And each with what to do."""
        found = _document(failing())["findings"]
        assert [entry["severity"] for entry in found] == ["fail", "fail", "warning", "note"]
        assert all(entry["advice"] for entry in found)

    def test_a_failed_attack_fails_the_report(self) -> None:
        """A bound above the claim, a failed test, or a verdict is enough."""
        tests = [{**EMPIRICAL["mechanism_tests"][0], "passed": False}]
        for told, code in (
            ({"lower_bound": 1.7}, "empirical-bound-above-claim"),
            ({"mechanism_tests": tests}, "mechanism-test-failed"),
            ({"verdict": "FAIL"}, "empirical-failed"),
            ({"verdict": "FAIL", "failures": ["ledger: charged 2"]}, "empirical-failed"),
        ):
            document = _document(audit(), {**EMPIRICAL, **told})
            assert document["verdict"]["outcome"] == "fail"
            assert document["findings"][0]["code"] == code
            assert code in ADVICE

    def test_an_attack_without_canaries(self) -> None:
        """No bound is not an unbounded one."""
        told = {**EMPIRICAL, "lower_bound": None, "confidence": None, "canaries": None}
        document = _document(audit(), told)
        assert document["empirical"]["lower_bound"] is None
        verdict = document["verdict"]
        assert verdict["passed"]
        assert "tests of the code's mechanisms with generated customers" in verdict["covers"]
        assert any("No training was attacked" in told for told in verdict["lacks"])

    def test_an_attack_under_another_contract(self) -> None:
        """The verdict does not rest on it in silence."""
        own = audit().runs[0].contract_sha256
        for contract, told in ((own, False), ("0" * 64, True)):
            lacks = _document(audit(), {**EMPIRICAL, "contract_sha256": contract})["verdict"][
                "lacks"
            ]
            assert any("another contract" in sentence for sentence in lacks) is told

    def test_the_closed_form_is_a_third_opinion(self) -> None:
        """Where the listed events cost clearly more than was recomputed, there is a warning."""
        assert not [f for f in _document(audit())["findings"] if f["code"] == "closed-form-differs"]
        found = replace(audit(), spending=(replace(spending(), lifetime=0.5),))
        assert "closed-form-differs" in [f["code"] for f in _document(found)["findings"]]

    def test_numbers_that_are_none(self) -> None:
        """What is not finite is unbounded; what is no number is not known."""
        odd = replace(
            spending(), lifetime=math.nan, cap=math.inf, opinions={"a": math.inf, "b": "no"}
        )
        merchant = _document(replace(audit(), spending=(odd,)))["merchants"][0]
        assert (merchant["lifetime"], merchant["cap"]) == ("unbounded", "unbounded")
        assert merchant["opinions"] == [
            {"accountant": "a", "epsilon": "unbounded", "why": ""},
            {"accountant": "b", "epsilon": None, "why": "no"},
        ]
        told = _document(replace(audit(), runs=(replace(run(), privacy={"epsilon": None}),)))
        assert told["runs"][0]["claimed"] == "unbounded"
        assert told["runs"][0]["claimed_towards_server"] is None

    def test_long_lists_are_cut(self) -> None:
        """With the number of what was left out, in the document and on the page."""
        findings = tuple(Finding("chain-gap", "fail", f"entry {n}", "gap") for n in range(5000))
        merchants = tuple(f"m{n}" for n in range(1000))
        found = replace(audit(), findings=findings, runs=(replace(run(), merchants=merchants),))
        document = _document(found)
        assert (len(document["findings"]), document["findings_left_out"]) == (2000, 3000)
        assert document["runs"][0]["merchants_left_out"] == 800
        page = Page(report_html(document))
        assert "And 4,800 more findings" in page.text
        assert "and 988 more" in page.text
        assert len(page.source) < 1_000_000

    def test_merchants_that_are_alike_share_a_picture(self) -> None:
        """In a federation most are."""
        page = _page(replace(audit(), spending=tuple(spending(f"m{n}") for n in range(40))))
        assert len(page.found("svg", role="img")) == 1
        assert "m11 and 28 more 40 merchants alike." in page.text
        assert "without a picture" not in page.text

    def test_many_merchants(self) -> None:
        """A large federation has a page of bearable size, drawn for a few."""
        found = replace(audit(), spending=tuple(spending(f"m{n}", 1 + n / 9e3) for n in range(500)))
        page = _page(found)
        assert len(page.found("svg", role="img")) == 12
        assert len(page.source) < 1_000_000
        assert "And 488 more merchants without a picture" in page.text

    def test_unknown_filed_field(self) -> None:
        """A field that nobody reads is an error, not silence."""
        with pytest.raises(HansaError, match=r"product\.nmae: this field is not known"):
            report_document(audit(), None, {"product": {"nmae": "x"}})


class TestPage:
    """The HTML page."""

    def test_is_self_contained(self) -> None:
        """The page loads nothing and its policy forbids it, whatever was found."""
        for found in (audit(), failing(), Audit((), ())):
            _assert_self_contained(_page(found, EMPIRICAL, FILING))

    def test_is_made_from_the_document_alone(self) -> None:
        """A document that was written and read back gives the same page."""
        document = _document(audit(), EMPIRICAL, FILING)
        assert report_html(json.loads(json.dumps(document))) == report_html(document)

    def test_headings_and_ids(self) -> None:
        """One h1, no level is skipped, ids are unique, and every link leads somewhere."""
        page = _page(failing(), EMPIRICAL)
        levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(b - a <= 1 for a, b in pairwise(levels))
        ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
        assert len(ids) == len(set(ids))
        assert {(attrs["href"] or "")[1:] for attrs in page.found("a")} <= set(ids)

    def test_verdict_comes_first(self) -> None:
        """With the worst findings, before any other figure."""
        text = _page(failing()).text
        assert (
            text.index("FAIL") < text.index("the policy allows 2") < text.index("What is promised")
        )
        assert "read this as what was promised, not as what is confirmed" in text
        text = _page(audit(), EMPIRICAL).text
        assert "PASS" in text
        assert "not as what is confirmed" not in text

    def test_tables_can_be_reached_and_read(self) -> None:
        """Boxes that scroll have a name and take the keyboard; pictures have words."""
        page = _page(audit(), EMPIRICAL)
        for box in page.found("div"):
            if (box.get("class") or "").startswith("scroll"):
                assert box["tabindex"] == "0"
                assert box["aria-label"]
        pictures = page.found("svg", role="img")
        assert len(pictures) == 3
        assert "epsilon 1.003 after run 3f0a9c11d2e4b587 on 2026-09-10" in str(
            pictures[0]["aria-label"]
        )

    def test_epsilons_are_rounded_up(self) -> None:
        """Never down, wherever they stand."""
        found = replace(audit(), spending=(replace(spending(), lifetime=1.83881),))
        assert "1.839 of 2" in _page(found).text

    def test_plain_sums_are_said_in_red(self) -> None:
        """Runs that were not masked have the coordinator's own epsilon."""
        contract = {**CONTRACT, "aggregation": {"secure": False}}
        privacy = {**PRIVACY, "epsilon_towards_server": 14.8721}
        plain = replace(run(), contract=contract, privacy=privacy)
        text = _page(replace(audit(), runs=(plain,))).text
        assert "not masked" in text
        assert "of one of them alone epsilon 14.88 holds towards the coordinator" in text
        assert "Epsilon towards the coordinator" not in _page(audit()).text

    def test_one_merchant_alone_tells_nothing_of_masks(self) -> None:
        """Without a run's record nobody says that the coordinator saw masked messages."""
        text = _page(replace(audit(), runs=())).text
        assert "no coordinator's evidence tells whether sums were masked" in text
        assert "the epsilon of the runs holds towards it too" not in text

    def test_mode_local(self) -> None:
        """Whoever colludes, each merchant's own noise is there."""
        contract = {**CONTRACT, "training": {"mode": "local"}}
        text = _page(replace(audit(), runs=(replace(run(), contract=contract),))).text
        assert "Mode local: the epsilon of the runs holds all the same" in text
        assert "The runs of this report are of the second kind" in text

    def test_colluders(self) -> None:
        """The table of a run, where null is unbounded."""
        text = _page(audit()).text
        assert "0 0.9301 1 0.9577 5 1.121 18 unbounded" in text

    def test_what_nobody_filed(self) -> None:
        """Is to be filled in; what is filed is shown."""
        text = _page(audit()).text
        assert text.count(MISSING) > 20
        assert "North Sea Retail Association" in _page(audit(), None, FILING).text

    def test_hostile_evidence(self) -> None:
        """A name is text, in tables, attributes and pictures."""
        page = _page(_hostile(), {**EMPIRICAL, "verdict": HOSTILE}, {"product": {"name": HOSTILE}})
        _assert_self_contained(page)
        assert "<script>alert(1)</script>" in page.text
        assert "{{ 7*7 }}" in page.text

    def test_contrast(self) -> None:
        """Words keep a contrast of 4.5 (WCAG AA), light and dark."""
        source = _page(audit()).source
        themes = re.findall(r":root \{(.*?--amber-line[^}]*)\}", source, flags=re.DOTALL)
        assert len(themes) == 2
        for theme in themes:
            colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", theme))
            pairs = [(w, g) for w in ("ink", "soft", "accent") for g in ("ground", "panel")]
            pairs += [(w, f"{w}-wash") for w in ("red", "green", "amber")]
            pairs += [("ink", f"{w}-wash") for w in ("red", "green", "amber")]
            pairs += [("soft", "red-wash"), ("amber", "panel"), ("second", "panel")]
            for written, ground in pairs:
                assert _contrast(colours[written], colours[ground]) >= 4.5, (written, ground)


def _hostile() -> Audit:
    """Return an audit in which every text is hostile."""
    return Audit(
        evidence=(
            {**evidence(HOSTILE), "kind": HOSTILE, "head": HOSTILE, "files": {HOSTILE: "1"}},
        ),
        findings=(Finding(HOSTILE, "fail", HOSTILE, HOSTILE),),
        spending=(
            replace(
                spending(HOSTILE),
                by_run={HOSTILE: 1.0},
                by_purpose={HOSTILE: 1.0},
                timeline=((BEGAN, HOSTILE, 1.0),),
                opinions={HOSTILE: HOSTILE},
                events=({"kind": HOSTILE},),
                refusals=((BEGAN, HOSTILE, HOSTILE),),
            ),
        ),
        runs=(
            replace(
                run(HOSTILE),
                contract={"federation": {"name": HOSTILE}, "training": {"mode": HOSTILE}},
                merchants=(HOSTILE,),
                privacy={"notes": [HOSTILE], "events": {HOSTILE: [{"kind": HOSTILE}]}},
            ),
        ),
        checks={HOSTILE: 1},
    )


def _wide() -> Audit:
    """Return an audit whose names are long words without a break."""
    long = "W" * 180
    return Audit(
        (),
        (),
        (replace(spending(long), opinions={long: 1.0}, by_run={long: 1.0}),),
        (replace(run(long), merchants=(long,), opinions={long: 1.0}, contract_sha256=long),),
    )


def _contrast(one: str, other: str) -> float:
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


TEXTS = st.text(max_size=12) | st.just(HOSTILE)
NUMBERS = st.floats() | st.integers(-(10**400), 10**400) | st.sampled_from([0.0, 5e-324, 1e308])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def _objects(*keys: str) -> st.SearchStrategy[dict[str, Any]]:
    """Return objects in which some of the keys are there, with anything in them."""
    return st.dictionaries(st.sampled_from(keys) | TEXTS, JSON, max_size=5)


EVENT = _objects("kind", "noise_multiplier", "count", "sampling_rate")
EPSILONS = st.dictionaries(TEXTS, NUMBERS, max_size=3)
OPINIONS = st.dictionaries(TEXTS, NUMBERS | TEXTS, max_size=3)
SPENDING = st.builds(
    Spending,
    merchant=TEXTS,
    delta=NUMBERS,
    cap=NUMBERS,
    refresh_days=st.none() | NUMBERS,
    lifetime=NUMBERS,
    by_run=EPSILONS,
    by_purpose=EPSILONS,
    timeline=st.lists(st.tuples(NUMBERS, TEXTS, NUMBERS), max_size=4).map(tuple),
    opinions=OPINIONS,
    events=st.lists(EVENT | st.sampled_from(EVENTS), max_size=3).map(tuple),
    refusals=st.lists(st.tuples(NUMBERS, TEXTS, TEXTS), max_size=2).map(tuple),
)
RUNS = st.builds(
    AuditedRun,
    run=TEXTS,
    contract=_objects("federation", "training", "privacy", "aggregation", "features"),
    contract_sha256=TEXTS,
    began_at=NUMBERS,
    merchants=st.lists(TEXTS, max_size=3).map(tuple),
    finished=st.booleans(),
    privacy=_objects("epsilon", "colluders", "events", "epsilon_by_stage", "notes", "achieved"),
    recomputed=st.none() | NUMBERS,
    opinions=OPINIONS,
    replayed=st.none() | st.booleans(),
    fewest=st.none() | st.integers(),
    matched=st.lists(TEXTS, max_size=3).map(tuple),
)
AUDITS = st.builds(
    Audit,
    evidence=st.lists(_objects("name", "made_at", "code", "files"), max_size=2).map(tuple),
    findings=st.lists(
        st.builds(Finding, TEXTS, st.sampled_from(["fail", "warning", "note"]), TEXTS, TEXTS),
        max_size=3,
    ).map(tuple),
    spending=st.lists(SPENDING, max_size=2).map(tuple),
    runs=st.lists(RUNS, max_size=2).map(tuple),
    checks=st.dictionaries(TEXTS, st.integers(), max_size=3),
)
TRIED = st.none() | _objects("claimed_epsilon", "lower_bound", "mechanism_tests", "verdict")


class TestAnything:
    """Whatever evidence holds."""

    @pytest.mark.slow
    @settings(
        max_examples=50,
        phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking such audits takes long
        suppress_health_check=list(HealthCheck),
    )
    @given(found=AUDITS, tried=TRIED)
    def test_any_audit_has_a_valid_report(self, found: Audit, tried: Any) -> None:
        """Valid JSON under the schema, and a well-formed page with nothing unescaped in it."""
        _assert_self_contained(_page(found, tried))


class TestPerson:
    """Closed forms."""

    def test_agrees_with_the_accountant_of_a_run(self) -> None:
        """Written anew, it finds what `common.accounting` finds."""
        events = [GaussianSum(8.0, 2.0, 20), GaussianSum(12.0, 1.0, 2)]
        mu = composed(
            {"kind": "gaussian-sum", "noise_multiplier": e.noise_multiplier, "count": e.count}
            for e in events
        )
        assert mu is not None
        assert epsilon_of(mu, 1e-6) == pytest.approx(epsilon(events, 1e-6), rel=1e-9)

    def test_the_table_of_the_privacy_model(self) -> None:
        """A person at 2.5, 5 and 12 merchants, from epsilon 1 at each."""
        mu = 0.31390245831182945  # epsilon 1 at delta 1e-4
        assert epsilon_of(mu, 1e-4) == pytest.approx(1.0)
        for k, shared, independent in person_table(1.0, 1e-4):
            assert epsilon_of(k * mu, 1e-4) == pytest.approx(shared)
            assert epsilon_of(math.sqrt(k) * mu, 1e-4) == pytest.approx(independent)

    def test_sampled_events_have_no_closed_form(self) -> None:
        """The page says so instead of a table."""
        sampled = {**EVENTS[0], "kind": "poisson-gaussian-sum", "sampling_rate": 0.1}
        assert composed([sampled]) is None
        found = replace(audit(), spending=(replace(spending(), events=(sampled,)),))
        assert "No table: it needs a ledger" in _page(found).text

    def test_no_sense_no_figure(self) -> None:
        """Numbers out of range give none."""
        assert epsilon_of(1.0, 0.0) is None
        assert epsilon_of(1e9, 1e-5) == "unbounded"
        assert epsilon_of(1e-9, 1e-5) == 0.0
        assert composed([{**EVENTS[0], "noise_multiplier": 0.0}]) is None


class TestPlain:
    """Values of strangers."""

    def test_words(self) -> None:
        """Anything becomes a short visible text."""
        assert words(True) == "yes"
        assert words(10**5000) == "a very large number"
        assert words({"a": 1}) == "(dict)"
        assert words("a\x00\ud800\u202eb") == "a\ufffd\ufffd\ufffdb"
        assert len(words("x" * 10**6)) == 2000

    def test_measures(self) -> None:
        """An epsilon that was written as a word reads back; an order is there for all."""
        assert measure("unbounded") == "unbounded"
        assert measure(10**400) == "unbounded"
        assert size(None) < size(0.0) < size("unbounded")
        assert shown_epsilon(5e-324) == "1e-12"


class TestPicture:
    """A budget over time."""

    @staticmethod
    def _drawn(*points: tuple[float, float], cap: float = 2.0) -> str:
        timeline = tuple((at, f"run {n}", value) for n, (at, value) in enumerate(points))
        merchant = replace(spending(), timeline=timeline, cap=cap)
        return budget_picture(_document(replace(audit(), spending=(merchant,)))["merchants"][0])

    def test_nothing_to_draw(self) -> None:
        """No point, or none that is finite, gives no picture."""
        assert self._drawn() == ""
        assert self._drawn((BEGAN, math.inf)) == ""

    def test_one_point(self) -> None:
        """Stands in the middle, with its day."""
        drawn = self._drawn((BEGAN, 1.0))
        assert drawn.count("<circle") == 1
        assert "2026-09-10" in drawn

    def test_times_that_go_backwards(self) -> None:
        """Are drawn in their order."""
        drawn = self._drawn((BEGAN, 1.0), (BEGAN - 9e6, 1.2), (-1.0, 1.3))
        places = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', drawn)]
        assert places == sorted(places)

    def test_many_points_are_thinned(self) -> None:
        """First and last stay."""
        drawn = self._drawn(*((BEGAN + n * 9e4, 1 + n / 1000) for n in range(1000)))
        assert drawn.count("<circle") == 120
        assert "epsilon 1 after run run 0 on 2026-09-10, 1.999 after run run 999" in drawn

    def test_ends_at_what_counts_now(self) -> None:
        """Not at what was reserved, which may be more than was released."""
        drawn = self._drawn((BEGAN, 1.9999))
        assert '<text class="value"' in drawn
        assert drawn.partition('<text class="value"')[2].partition("<")[0].endswith(">1.839")
        assert "now 1.839; cap 2" in drawn

    def test_a_cap_far_away(self) -> None:
        """Is told, not drawn, so that the line is not flat."""
        drawn = self._drawn((BEGAN, 1.0), cap=100.0)
        assert 'class="cap" d=' not in drawn
        assert "cap 100" in drawn
        assert "cap unbounded" in self._drawn((BEGAN, 1.0), cap=math.inf)


class TestHazards:
    """What is said to be tested was tested."""

    def test_nothing_to_look_at(self) -> None:
        """Without evidence nothing is absent."""
        found = _document(Audit((), ()))["hazards"]
        assert len(found) == len(HAZARDS)
        assert {hazard["status"] for hazard in found} == {"untested"}

    def test_heads_from_merchants_alone(self) -> None:
        """A merchant could have left out the last ones: that is no proof of a whole ledger."""
        checks = {"heads countersigned": 9}
        found = {
            h["name"]: h["status"] for h in _document(replace(audit(), checks=checks))["hazards"]
        }
        assert found["Shortened, copied or restored ledgers"] == "attention"

    def test_a_good_audit(self) -> None:
        """What evidence cannot show stays untested; partial matching asks to read on."""
        found = {h["name"]: h["status"] for h in _document(audit(), EMPIRICAL)["hazards"]}
        assert found["Data looked at before the private part"] == "untested"
        assert found["Logs that only the coordinator keeps"] == "attention"
        assert list(found.values()).count("absent") == 12

    def test_found_by_code(self) -> None:
        """A finding turns its hazard to found, and names itself."""
        found = {h["name"]: h for h in _document(failing())["hazards"]}
        assert found["A merchant's cap is passed"]["status"] == "found"
        assert "cap-exceeded" in found["A merchant's cap is passed"]["how"]
        assert found["Shortened, copied or restored ledgers"]["status"] == "found"
        assert (
            found["A budget that starts afresh while the customers stay"]["status"] == "attention"
        )

    def test_found_by_a_test_of_the_code(self) -> None:
        """A failed test of the mechanism is no "not tested"."""
        tests = [{**row, "passed": False} for row in EMPIRICAL["mechanism_tests"]]
        tried = {**EMPIRICAL, "mechanism_tests": tests}
        found = {h["name"]: h["status"] for h in _document(audit(), tried)["hazards"]}
        assert found["Contributions that are not clipped as said"] == "found"
        assert found["Noise that can be guessed or is used twice"] == "found"

    def test_sampled_sums_need_the_empirical_audit(self) -> None:
        """Poisson sampling is not believed."""
        event = {**EVENTS[0], "kind": "poisson-gaussian-sum", "sampling_rate": 0.1}
        found = replace(audit(), spending=(replace(spending(), events=(event,)),))
        name = "Shuffled batches accounted as independent coin flips"
        assert {h["name"]: h["status"] for h in _document(found)["hazards"]}[name] == "untested"

    def test_codes_exist(self) -> None:
        """A hazard looks for no finding that the audit cannot make."""
        known = set(CODES) | set(ADVICE)
        assert {code for hazard in HAZARDS for code in hazard.codes} <= known

    def test_every_failing_code_has_advice(self) -> None:
        """Whoever reads a finding learns what to do."""
        missing = [c for c, severity in CODES.items() if severity != "note" and c not in ADVICE]
        assert missing == []
        assert advice_on(Finding("new-code", "fail", "", "")).startswith("Do not rely")


class TestFiling:
    """What people file."""

    def test_the_template_is_a_valid_empty_file(self, tmp_path: Path) -> None:
        """It names every field, and files nothing."""
        path = tmp_path / "filing.toml"
        path.write_text(filing_template(), encoding="utf-8")
        assert read_filing(path) == {}
        assert filing_template().count(' = ""') == len(FIELDS)
        assert filing_template() in (DOCS / "audit-report.md").read_text(encoding="utf-8")

    def test_values(self, tmp_path: Path) -> None:
        """Lists, dates and truth become texts."""
        path = tmp_path / "filing.toml"
        path.write_text(
            '[product]\nregion = ["EU", "CN"]\npublication_date = 2026-11-02\n'
            "[pipl]\nsensitive = false\n",
            encoding="utf-8",
        )
        assert read_filing(path) == {
            "product": {"region": "EU, CN", "publication_date": "2026-11-02"},
            "pipl": {"sensitive": "no"},
        }

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("[product]\nnmae = 'x'", "this field is not known"),
            ("product = 1", "expected a table"),
            ("[product]\nname = {a = 1}", "expected a text"),
            ("[product", "is not valid TOML"),
            ("\x00", "is not valid TOML"),
        ],
    )
    def test_wrong_files(self, tmp_path: Path, text: str, told: str) -> None:
        """One sentence that names file and field."""
        path = tmp_path / "filing.toml"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(HansaError, match=told):
            read_filing(path)

    def test_unreadable_files(self, tmp_path: Path) -> None:
        """Missing, too large, no text."""
        with pytest.raises(HansaError, match="there is no such file"):
            read_filing(tmp_path / "none.toml")
        (tmp_path / "large.toml").write_bytes(b"#" * 1_000_001)
        with pytest.raises(HansaError, match="larger than"):
            read_filing(tmp_path / "large.toml")
        (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
        with pytest.raises(HansaError, match="cannot be read as UTF-8"):
            read_filing(tmp_path / "binary.toml")

    def test_filing_twice_changes_nothing(self) -> None:
        """What `read_filing` returned may be given again."""
        assert filing_of(filing_of(FILING)) == filing_of(FILING)


class TestWrite:
    """Files on disk."""

    def test_three_files(self, tmp_path: Path) -> None:
        """Page, document and registry entry; no part file stays."""
        paths = write_report(_document(audit()), tmp_path / "new" / "folder")
        assert [path.name for path in paths] == [
            "report.html",
            "report.json",
            "opendp-registry.yaml",
        ]
        assert sorted(p.name for p in paths[0].parent.iterdir()) == sorted(p.name for p in paths)
        VALIDATOR.validate(json.loads(paths[1].read_text(encoding="utf-8")))

    def test_nothing_half_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where one file cannot be written, the old ones stay as they were."""
        write_report(_document(audit()), tmp_path)
        old = (tmp_path / "report.html").read_bytes()
        real = Path.open

        def full(path: Path, *args: Any, **kwargs: Any) -> Any:
            if "opendp" in path.name:
                raise OSError(28, "No space left on device")
            return real(path, *args, **kwargs)

        monkeypatch.setattr(Path, "open", full)
        with pytest.raises(HansaError, match="No space left"):
            write_report(_document(failing()), tmp_path)
        monkeypatch.undo()
        assert (tmp_path / "report.html").read_bytes() == old
        assert len(list(tmp_path.iterdir())) == 3


class TestOdds:
    """What an epsilon means in words."""

    @pytest.mark.parametrize(
        ("value", "told"),
        [(0.0, "at most 50 %"), (1.0, "at most 73.2 %"), (8.0, "no limit"), (math.inf, "no limit")],
    )
    def test_rounded_up(self, value: float, told: str) -> None:
        """Never less than it is; a limit near certainty is none."""
        said = odds_statement(value, 1e-5)
        assert told in said or "no longer held back" in said
        assert ("held back" in said) is (value > 6)

    def test_the_chance_is_rounded_up_too(self) -> None:
        """One in a smaller number."""
        assert "1 in 3." in odds_statement(1.0, 0.28)
        assert "next to nothing" in odds_statement(1.0, 5e-324)


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
class TestBrowser:
    """The page in a real browser, opened from disk."""

    @staticmethod
    def _chromium(page: Path, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
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

    def test_dom(self, tmp_path: Path) -> None:
        """Chromium finds every section, and the policy has nothing to refuse."""
        write_report(_document(_hostile(), EMPIRICAL), tmp_path)
        done = self._chromium(tmp_path / "report.html", tmp_path, "--dump-dom")
        for section in ("promise", "findings", "threats", "hazards", "runs", "gdpr", "pipl"):
            assert f'<h2 id="{section}">' in done.stdout
        assert "<script" not in done.stdout
        assert "Content Security Policy" not in done.stderr
        assert "http://x" not in done.stderr

    @pytest.mark.parametrize("width", [360, 1200])
    def test_fits_a_telephone(self, tmp_path: Path, width: int) -> None:
        """Nothing is wider than the screen, and the verdict is on it."""
        found = replace(failing(), runs=(*failing().runs, *_wide().runs), spending=_wide().spending)
        write_report(_document(found, EMPIRICAL, FILING), tmp_path)
        frame = tmp_path / "frame.html"
        frame.write_text(
            f'<iframe id="f" src="report.html" width="{width}" height="740"></iframe><script>'
            "f.onload = () => { const d = f.contentDocument.documentElement;"
            'const v = f.contentDocument.getElementById("verdict").getBoundingClientRect();'
            "document.title = [d.scrollWidth, d.clientWidth, v.bottom, v.right].join(); }</script>",
            encoding="utf-8",
        )
        options = ("--allow-file-access-from-files", "--dump-dom", "--window-size=1400,900")
        done = self._chromium(frame, tmp_path, *options)
        title = re.search(r"<title>([\d.,]+)</title>", done.stdout)
        assert title is not None, done.stdout[:500]
        scroll, client, bottom, right = map(float, title[1].split(","))
        assert scroll <= client <= width
        assert bottom < 740
        assert right <= client

    @pytest.mark.parametrize(
        ("scheme", "ground"),
        [("1", (0xFD, 0xF0, 0xEE)), ("0", (0x32, 0x1A, 0x1B))],
        ids=["light", "dark"],
    )
    def test_screenshot(self, tmp_path: Path, scheme: str, ground: tuple[int, int, int]) -> None:
        """A failed audit is painted in the reader's colours, above everything else."""
        from PIL import Image

        write_report(_document(failing()), tmp_path)
        self._chromium(
            tmp_path / "report.html",
            tmp_path,
            "--window-size=1200,700",
            f"--blink-settings=preferredColorScheme={scheme}",
            f"--screenshot={tmp_path / 'shot.png'}",
        )
        with Image.open(tmp_path / "shot.png") as shot:
            painted = shot.convert("RGB").crop((80, 160, 1120, 400)).getcolors(1 << 24) or []
        assert {colour: count for count, colour in painted}.get(ground, 0) > 50_000
