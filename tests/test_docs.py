"""The documentation says what the program does."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import warnings
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import jsonschema
import pytest

from audit.advice import ADVICE
from audit.codes import CODES
from clients.merchant import Merchant
from common.contract import parse_contract

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
        *(ROOT / "docs").rglob("*.md"),
    ]
)
_FENCE = re.compile(r"^```(?P<kind>\w+)(?P<words>[^\n`]*)\n(?P<text>.*?)^```$", re.M | re.S)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)\s]+)\)")
_MACHINE_PATH = re.compile(r"(?<![\w.])(/(home|root|tmp|work|Users|mnt|opt|var)/|[A-Z]:\\)")
_SECONDS = 300


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    kind: str
    words: tuple[str, ...]
    text: str

    def word(self, name: str) -> str | None:
        """Return the value of `name=value` after the fence."""
        found = (word.partition("=")[2] for word in self.words if word.startswith(f"{name}="))
        return next(found, None)


LONG = {
    "README.md",
    "docs/commands/audit.md",
    "docs/commands/merchant.md",
    "docs/commands/server.md",
    "docs/commands/simulate.md",
    "docs/quickstart.md",
}


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [Block(m["kind"], tuple(m["words"].split()), m["text"]) for m in _FENCE.finditer(text)]


def name_of(page: Path) -> str:
    """Name a page in the list of tests."""
    return str(page.relative_to(ROOT))


def generator() -> ModuleType:
    """Load `docs/generate.py`, which is no package."""
    path = ROOT / "docs" / "generate.py"
    spec = importlib.util.spec_from_file_location("docs_generate", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # typer imports old names of click
    GENERATOR = generator()
    COMMANDS: dict[str, click.Command] = dict(GENERATOR.commands())


def command_page(name: str) -> str:
    """Return the text of the page of a command; subcommands share a page."""
    return (ROOT / "docs" / "commands" / f"{name.split(maxsplit=1)[0]}.md").read_text(
        encoding="utf-8"
    )


def run_line(line: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run one line of an example in a folder, with this Python's `hansa` first on the path."""
    own = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": own + os.pathsep + os.environ["PATH"], "COLUMNS": "200"}
    return subprocess.run(
        shlex.split(line),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )


def follow(page: Path, folder: Path, *, slow: bool) -> None:
    """Write the page's example files and run its examples in order; check what they print."""
    for block in blocks(page):
        if target := block.word("file"):
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            (folder / target).write_text(block.text, encoding="utf-8")
        if block.kind != "console" or "run" not in block.words:
            continue
        if "slow" in block.words and not slow:
            continue
        lines = block.text.strip().splitlines()
        expected = int(block.word("exit") or 0)
        printed = ""
        for line in (line.removeprefix("$ ") for line in lines if line.startswith("$ ")):
            done = run_line(line, folder)
            assert done.returncode == expected, f"{line}\n{done.stdout}{done.stderr}"
            printed += done.stdout
        for line in (line for line in lines if not line.startswith("$ ")):
            assert line in printed, f"{name_of(page)} promises: {line}\n{printed}"


def runnable(*, slow: bool) -> list[Path]:
    """Return the pages with examples to run; with `slow` those that have slow ones."""

    def wanted(block: Block) -> bool:
        return "run" in block.words and ("slow" in block.words or not slow)

    return [page for page in PAGES if any(wanted(block) for block in blocks(page))]


def with_long_ones_slow(pages: list[Path]) -> list[Any]:
    """Return pages as parameters; those whose examples take more than a few seconds are slow."""
    return [
        pytest.param(page, marks=pytest.mark.slow if name_of(page) in LONG else [])
        for page in pages
    ]


class TestGenerated:
    """Generated tables."""

    @pytest.mark.parametrize("page", GENERATOR.pages(), ids=name_of)
    def test_generated_text_is_fresh(self, page: Path) -> None:
        """A page holds what `python docs/generate.py` would write."""
        text = page.read_text(encoding="utf-8")
        assert GENERATOR.filled(text) == text, "run: python docs/generate.py"

    def test_a_stale_block_is_noticed(self) -> None:
        """Text that was changed by hand inside a generated block is replaced."""
        page = "<!-- generated: measures -->\nold\n<!-- end -->"
        assert "old" not in GENERATOR.filled(page)
        assert "`recency_days`" in GENERATOR.filled(page)


class TestCommands:
    """Pages of commands."""

    @pytest.mark.parametrize("name", COMMANDS)
    def test_a_command_and_its_options_are_documented(self, name: str) -> None:
        """Every command has its generated table, and every option says what it does."""
        assert f"<!-- generated: command {name} -->" in command_page(name)
        for parameter in COMMANDS[name].params:
            if parameter.param_type_name == "option":
                assert getattr(parameter, "help", None), f"hansa {name}: {parameter.opts}"
                assert f"`{parameter.opts[0]}`" in command_page(name)
            else:
                assert GENERATOR.argument_help(COMMANDS[name])[parameter.name or ""]

    @pytest.mark.parametrize("name", COMMANDS)
    def test_a_command_explains_itself(self, name: str) -> None:
        """Every command has a help text and a section on its exit codes."""
        assert COMMANDS[name].help
        assert "## Exit codes" in command_page(name)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("line", "code"),
        [
            ("hansa version", 0),
            ("hansa nonsense", 2),  # wrong use
            ("hansa contract none.toml", 2),  # ContractError
            ("hansa simulate --data none", 2),  # DataError
            ("hansa merchant check none.toml --contract good.toml", 2),  # PolicyError
            ("hansa merchant assign full none.toml --out assigned", 1),  # BundleError
            ("hansa simulate --preset smoke --out full", 2),  # DataError
        ],
    )
    def test_exit_codes_are_as_documented(self, line: str, code: int, tmp_path: Path) -> None:
        """An error ends with the exit code of the table, and with one message, no traceback."""
        example = next(b for b in blocks(ROOT / "docs/contract.md") if "contract" in b.words)
        (tmp_path / "good.toml").write_text(example.text, encoding="utf-8")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "something").write_text("here", encoding="utf-8")
        done = run_line(line, tmp_path)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert bool(done.stderr) == bool(code)


def typed(page: Path) -> list[str]:
    """Return every `hansa` command that a page shows, as it is typed."""
    lines = [line for b in blocks(page) if b.kind == "console" for line in b.text.splitlines()]
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ hansa ")]


class TestTyped:
    """Commands that the pages show, whether or not they are run by a test."""

    @pytest.mark.parametrize("page", [page for page in PAGES if typed(page)], ids=name_of)
    def test_a_shown_command_and_its_options_exist(self, page: Path) -> None:
        """Whoever copies a line gets a command that is there."""
        for line in typed(page):
            words = shlex.split(line)[1:]
            name = next((n for n in (" ".join(words[:2]), words[0]) if n in COMMANDS), None)
            assert name is not None, line
            known = {option for part in COMMANDS[name].params for option in part.opts}
            for word in words:
                assert not word.startswith("--") or word in known, f"{line}: {word}"

    def test_ten_minutes_begins_with_eight_commands(self) -> None:
        """The first block of the page is the whole way, and nothing but commands."""
        first = next(b for b in blocks(ROOT / "docs/ten-minutes.md") if b.kind == "console")
        lines = first.text.splitlines()
        assert len(lines) == 8
        assert all(line.startswith("$ hansa ") for line in lines)


class TestMetrics:
    """Lists of metrics."""

    @pytest.mark.parametrize(
        ("module", "page"), [("server", "operators.md"), ("clients", "merchants.md")]
    )
    def test_every_metric_is_listed(self, module: str, page: str) -> None:
        """Each name that the program gives a metric is on the page."""
        source = (ROOT / module / "metrics.py").read_text(encoding="utf-8")
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        names = set(re.findall(r'"(hansa_[a-z_]+)"', source))
        assert len(names) > 4
        assert [name for name in sorted(names) if f"`{name}" not in text] == []


class TestFindings:
    """Codes of findings."""

    def test_every_code_is_explained(self) -> None:
        """For auditors, with its severity; and no other code is."""
        text = (ROOT / "docs" / "auditors.md").read_text(encoding="utf-8")
        told = dict(re.findall(r"^\| `([a-z-]+)` \| (\w+) \|", text, re.M))
        assert {code: told.get(code) for code in CODES} == CODES
        assert set(told) == {*CODES, *ADVICE}


class TestLinks:
    """Links between pages."""

    @pytest.mark.parametrize("page", PAGES, ids=name_of)
    def test_relative_links_lead_somewhere(self, page: Path) -> None:
        """A relative link names a file that is there, and a heading that is on it."""
        text = _FENCE.sub("", page.read_text(encoding="utf-8"))
        for target in (match["target"] for match in _LINK.finditer(text)):
            if target.startswith(("https://", "http://")):
                continue
            path, _, heading = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists(), target
            if heading:
                assert heading in anchors(linked), target

    def test_every_page_is_listed(self) -> None:
        """Each page of the documentation is linked from its table of contents."""
        for folder in (ROOT / "docs", ROOT / "docs" / "commands"):
            contents = (folder / "README.md").read_text(encoding="utf-8")
            for page in folder.glob("*.md"):
                assert page.name == "README.md" or f"]({page.name})" in contents


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as they are made from the words."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


class TestExamples:
    """Examples in fenced blocks."""

    @pytest.mark.parametrize("page", with_long_ones_slow(runnable(slow=False)), ids=name_of)
    def test_examples_run(self, page: Path, tmp_path: Path) -> None:
        """The quick examples of a page work in an empty folder, one after the other."""
        follow(page, tmp_path, slow=False)

    @pytest.mark.slow
    @pytest.mark.parametrize("page", runnable(slow=True), ids=name_of)
    def test_slow_examples_run(self, page: Path, tmp_path: Path) -> None:
        """The longer examples of a page work too."""
        follow(page, tmp_path, slow=True)

    @pytest.mark.parametrize("page", PAGES, ids=name_of)
    def test_toml_examples_are_valid(self, page: Path) -> None:
        """Every contract and merchant file in the pages is accepted."""
        for block in blocks(page):
            if block.kind == "toml" and "contract" in block.words:
                parse_contract(tomllib.loads(block.text), source=name_of(page))
            elif block.kind == "toml" and "merchant" in block.words:
                Merchant.model_validate(tomllib.loads(block.text))

    @pytest.mark.parametrize("name", ["simulate", "compare", "sweep"])
    def test_json_examples_fit_their_schema(self, name: str) -> None:
        """The JSON examples are valid under the schemas that the package ships."""
        path = files("hansa") / "schemas" / f"{name}.schema.json"
        schema = json.loads(path.read_text(encoding="utf-8"))
        found = [b for b in blocks(ROOT / "docs" / "results.md") if name in b.words]
        assert found
        for block in found:
            jsonschema.validate(json.loads(block.text), schema)


class TestManners:
    """What every page owes its reader."""

    @pytest.mark.parametrize("page", PAGES, ids=name_of)
    def test_no_machine_paths(self, page: Path) -> None:
        """No page names a folder of somebody's machine."""
        assert not _MACHINE_PATH.search(page.read_text(encoding="utf-8"))

    def test_the_limits_of_masked_sums_are_told_early(self) -> None:
        """The README says against whom sums are masked before it shows anything else."""
        text = (ROOT / "README.md").read_text(encoding="utf-8").partition("##")[0]
        assert "Sums are masked" in text
        assert "fewer than a third of the merchants of a sum collude" in text
        assert "Plain sums need a flag" in text

    @pytest.mark.parametrize("page", PAGES, ids=name_of)
    def test_no_page_says_that_secure_sums_are_missing(self, page: Path) -> None:
        """What was true of the first version is nowhere promised any more."""
        text = page.read_text(encoding="utf-8")
        for stale in ("does not mask", "not masked yet", "Not in this version: must be false"):
            assert stale not in text

    @pytest.mark.parametrize("page", PAGES, ids=name_of)
    def test_no_page_says_that_deployment_is_missing(self, page: Path) -> None:
        """Contracts are signed, and real federations run."""
        text = page.read_text(encoding="utf-8")
        for stale in ("is not signed in this version", "is not there yet", "- Signed contracts"):
            assert stale not in text

    def test_a_change_of_what_is_released_is_in_the_changelog(self) -> None:
        """Protocol, keys, files, noise: under Privacy."""
        text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition("### Privacy")[2]
        for told in ("Protocol version 2", "`members.toml`", "`identity.key`", "`session.sealed`"):
            assert told in text
        for told in ("max_customers", "min_cohort", "discrete Gaussian", "noisy accuracy"):
            assert told in text

    def test_the_changelog_has_a_privacy_heading(self) -> None:
        """Changes of what is released stand under a heading of their own."""
        assert "### Privacy" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
