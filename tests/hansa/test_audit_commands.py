"""`hansa audit`: evidence of a real run, untouched and changed."""

import io
import json
import shutil
import subprocess
import sys
import warnings
import zipfile
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
from typer.testing import CliRunner, Result

from clients.evidence import head_line
from common.chain import Entry
from common.errors import EvidenceError, HansaError
from common.evidence import read_evidence
from common.identity import Identity
from simulations.datasets import load
from simulations.federation import assemble
from simulations.run import simulate

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # typer imports old names of click
    from hansa.cli import app


def hansa(*arguments: object, code: int = 0) -> Result:
    """Run a command in this process; an error that `main` would tell is raised."""
    done = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "120"})
    if isinstance(done.exception, HansaError):
        raise done.exception
    assert done.exit_code == code, (done.output, done.exception)
    return done


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Simulate a run of three merchants; return its folder."""
    out = tmp_path_factory.mktemp("simulated")
    dataset = load("synthetic", preset="smoke", merchants=3)
    contract = dataset.contract.revised(training={"rounds": 2}, model={"hidden": [4]})
    federation = assemble(dataset, contract, out, None)
    simulate(federation, out, lambda _record, _rounds: None)
    return out


@pytest.fixture
def evidence(simulated: Path, tmp_path: Path) -> Path:
    """Give a copy of the simulation's evidence."""
    return Path(shutil.copytree(simulated / "evidence", tmp_path / "evidence"))


def rewritten(path: Path, name: str, old: bytes, new: bytes) -> None:
    """Change one file in a zip file of evidence."""
    with zipfile.ZipFile(path) as archive:
        files = {n: archive.read(n) for n in archive.namelist()}
    assert old in files[name]
    with zipfile.ZipFile(path, "w") as archive:
        for n, content in files.items():
            archive.writestr(n, content.replace(old, new) if n == name else content)


class TestSimulation:
    """What a simulation leaves for an audit."""

    def test_everybodys_evidence_is_there(self, evidence: Path) -> None:
        """The coordinator's and each merchant's."""
        names = sorted(path.relative_to(evidence).as_posix() for path in evidence.rglob("*.zip"))
        merchants = [f"merchants/merchant-000{number}.zip" for number in range(3)]
        assert names == [*merchants, "server.zip"]

    def test_no_customer_no_path_no_key_is_in_it(self, simulated: Path, evidence: Path) -> None:
        """In any file of any of them."""
        text = b"".join(
            content
            for path in evidence.rglob("*.zip")
            for content in read_evidence(path).files.values()
        )
        private = (simulated / "server" / "identity.key").read_text().strip()
        for secret in ("customer-0", "person-0", str(simulated), private, "identity.key"):
            assert secret.encode() not in text


class TestVerify:
    """`hansa audit verify`."""

    def test_untouched_evidence_passes(self, evidence: Path) -> None:
        """With one line on what was checked."""
        text = hansa("audit", "verify", evidence).output
        assert "checked 3 ledgers and 1 run" in text
        assert "PASS" in text

    def test_changed_evidence_fails(self, evidence: Path) -> None:
        """The finding has its severity, its place, and what to do; from the real command."""
        path = evidence / "merchants" / "merchant-0001.zip"
        rewritten(path, "policy.json", b'"delta"', b'"DELTA"')
        command = [sys.executable, "-m", "hansa.cli", "audit", "verify", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "FAIL    evidence-invalid" in done.stdout
        assert "policy.json: was changed after the evidence was made" in done.stdout
        assert "Ask the party to make its evidence anew" in done.stdout
        assert done.stderr == ""

    def test_json(self, evidence: Path, tmp_path: Path) -> None:
        """For machines."""
        document = json.loads(hansa("audit", "verify", evidence, "--json", "-").stdout)
        path = files("hansa") / "schemas" / "audit.schema.json"
        jsonschema.validate(document, json.loads(path.read_text()))
        assert document["passed"] is True
        assert len(document["evidence"]) == 4
        assert {ledger["merchant"] for ledger in document["ledgers"]} == {
            f"merchant-000{number}" for number in range(3)
        }
        (evidence / "server.zip").unlink()
        hansa("audit", "verify", evidence, "--json", tmp_path / "a.json")
        found = json.loads((tmp_path / "a.json").read_text())["findings"]
        assert "no-evidence-of-server" in {finding["code"] for finding in found}

    def test_an_anchor_that_was_kept(self, evidence: Path, tmp_path: Path) -> None:
        """Passes while the ledger holds it, and fails where the ledger is another."""
        one = read_evidence(evidence / "merchants" / "merchant-0000.zip")
        lines = [json.loads(line) for line in one.files["ledger.jsonl"].splitlines()]
        key, anchors = one.key.hex(), tmp_path / "heads"
        anchors.write_text(f"# kept in May\nhansa head {key} 3 {lines[2]['link']}\n")
        hansa("audit", "verify", evidence, "--anchor", anchors)
        anchors.write_text(f"hansa head {key} 3 {lines[3]['link']}\n")
        text = hansa("audit", "verify", evidence, "--anchor", anchors, code=1).output
        assert "anchor-missing" in text

    def test_wrong_use(self, evidence: Path, tmp_path: Path) -> None:
        """A missing file, a folder without evidence, a file of anchors that is none."""
        with pytest.raises(EvidenceError, match="no such file"):
            hansa("audit", "verify", tmp_path / "none.zip")
        (tmp_path / "empty").mkdir()
        with pytest.raises(EvidenceError, match="no evidence"):
            hansa("audit", "verify", tmp_path / "empty")
        (tmp_path / "heads").write_text("something else\n")
        with pytest.raises(EvidenceError, match="line 1: expected 'hansa head"):
            hansa("audit", "verify", evidence, "--anchor", tmp_path / "heads")

    def test_many_findings_are_cut(self, evidence: Path) -> None:
        """The terminal shows the gravest; the JSON has all."""
        from rich.console import Console

        from audit.findings import Audit, Finding
        from hansa.commands.audit import _tell_findings

        console = Console(record=True, width=200, file=io.StringIO())
        note = [Finding("not-evidence", "note", f"{n}.zip", "passed over") for n in range(60)]
        grave = Finding("cap-exceeded", "fail", "shop\x1b[31m", "is passed")
        audit = Audit((), (*note, grave))
        _tell_findings(audit, list(audit.findings), console)
        text = console.export_text()
        assert text.startswith("FAIL    cap-exceeded  shop�[31m: is passed")
        assert "and 21 more" in text


class TestEpsilon:
    """`hansa audit epsilon`."""

    def test_accountants_side_by_side(self, evidence: Path) -> None:
        """Ledgers and runs, by Hansa and by two libraries."""
        text = hansa("audit", "epsilon", evidence).output
        for heading in ("Hansa", "dp-accounting PLD", "Opacus PRV", "Published"):
            assert heading in text
        assert text.count("merchant-000") == 3
        assert "every release that either side tells of has its event" in text

    def test_a_ledger_that_the_coordinator_does_not_tell_of(self, evidence: Path) -> None:
        """Is no reason to say that all is well."""
        (evidence / "server.zip").unlink()
        done = hansa("audit", "epsilon", evidence, "--json", "-")
        document = json.loads(done.stdout)
        assert document["runs"] == []
        assert "no coordinator's evidence was there" in done.stderr
        assert all(ledger["hansa"] > 0 for ledger in document["ledgers"])

    def test_what_was_not_looked_at_is_not_said_to_hold(self, evidence: Path) -> None:
        """No ledger at all, or evidence that fails."""
        text = hansa("audit", "epsilon", evidence / "server.zip").output
        assert "what was charged is not known" in text
        one = evidence / "merchants" / "merchant-0001.zip"
        rewritten(one, "policy.json", b'"delta"', b'"DELTA"')
        text = hansa("audit", "epsilon", one, code=1).output
        assert "hansa audit verify says why" in text
        assert "every release" not in text


class TestReport:
    """`hansa audit report`."""

    def test_writes_page_json_and_registry_entry(self, evidence: Path, tmp_path: Path) -> None:
        """And says the verdict."""
        out = tmp_path / "report"
        text = hansa("audit", "report", evidence, "--out", out).output
        names = {"report.html", "report.json", "opendp-registry.yaml"}
        assert {path.name for path in out.iterdir()} == names
        assert "Nothing was found that fails this audit" in text

    def test_takes_what_people_filed_and_measured(self, evidence: Path, tmp_path: Path) -> None:
        """A filing; a result of the empirical audit that cannot be read is refused."""
        (tmp_path / "filing.toml").write_text('[controller]\nname = "Hanseatic shops"\n')
        filed = ("--filing", tmp_path / "filing.toml")
        hansa("audit", "report", evidence, "--out", tmp_path / "r", *filed)
        assert "Hanseatic shops" in (tmp_path / "r" / "report.html").read_text()
        for text in ("nothing", "[1]", '{"schema": "hansa/budget/1"}'):
            (tmp_path / "e.json").write_text(text)
            tried = ("--empirical", tmp_path / "e.json")
            with pytest.raises(EvidenceError, match=r"e\.json"):
                hansa("audit", "report", evidence, "--out", tmp_path / "r", *tried)
        (tmp_path / "filing.toml").write_text('[controller]\nnmae = "misspelt"\n')
        with pytest.raises(HansaError, match="not known"):
            hansa("audit", "report", evidence, "--out", tmp_path / "r", *filed)

    def test_a_file_in_the_way(self, evidence: Path, tmp_path: Path) -> None:
        """One clear line."""
        (tmp_path / "r").write_text("something else")
        with pytest.raises(HansaError, match="the report cannot be written"):
            hansa("audit", "report", evidence, "--out", tmp_path / "r")

    def test_a_failed_audit_is_reported_too(self, evidence: Path, tmp_path: Path) -> None:
        """With exit code 1."""
        rewritten(evidence / "server.zip", "members.toml", b"merchant-0001", b"merchant-9001")
        hansa("audit", "report", evidence, "--out", tmp_path / "r", code=1)
        assert "evidence-invalid" in (tmp_path / "r" / "report.html").read_text()


def test_the_anchor_of_a_command_is_what_the_audit_reads(tmp_path: Path) -> None:
    """`hansa merchant head` and `--anchor` agree on the line."""
    from audit.witness import read_anchors

    identity = Identity.generate("shop")
    line = head_line(identity, [Entry(7, b"{}", b"\x01" * 32, b"")])
    (tmp_path / "heads").write_text(line)
    (anchor,) = read_anchors(tmp_path / "heads")
    assert (str(anchor), anchor.seq) == (line, 7)


def test_the_empirical_audit_has_a_command() -> None:
    """It is measured in tests of its own."""
    text = hansa("audit", "empirical", "--help").output
    assert "--canaries" in text
