"""The `hansa` command as people and programs meet it: in processes of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import jsonschema
import pandas as pd
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common import statements
from common.bundle import write_bundle
from common.contract import contract_toml, read_contract
from common.plan import planned_epsilon_towards_server
from common.statements import epsilon_text
from simulations.datasets import load, write_federation

COMMAND = [sys.executable, "-m", "hansa.cli"]
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
SMALL = ["--preset", "smoke", "--merchants", "3", "--rounds", "2"]


def hansa(
    *arguments: object, cwd: Path | None = None, code: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run the command and check its exit code."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
        cwd=cwd,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def said(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line on stderr with which a command fails."""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("hansa: ")
    return lines[0]


@pytest.fixture
def federation(tmp_path: Path) -> Path:
    """Write a federation of three merchants and two rounds."""
    dataset = load("synthetic", preset="smoke", merchants=3)
    write_federation(dataset, tmp_path / "federation")
    contract = dataset.contract.revised(training={"rounds": 2})
    (tmp_path / "federation" / "contract.toml").write_text(contract_toml(contract))
    return tmp_path / "federation"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Write the same federation with plain sums, which its merchants accept."""
    dataset = load("synthetic", preset="smoke", merchants=3)
    contract = dataset.contract.revised(training={"rounds": 2}, aggregation={"secure": False})
    write_federation(replace(dataset, contract=contract), tmp_path / "plain")
    return tmp_path / "plain"


class TestHelp:
    """What a newcomer types first."""

    def test_help_lists_all_commands(self) -> None:
        """Each with a sentence."""
        text = hansa("--help").stdout
        groups = ("data", "merchant", "server", "audit")
        for command in ("simulate", "compare", "sweep", "contract", "version", *groups):
            assert re.search(rf"^\W*{command}  +[A-Z]", text, re.MULTILINE)

    @pytest.mark.parametrize(
        ("command", "words"),
        [
            (("simulate",), ("--data", "--epsilon", "--seed", "--overwrite", "--json", "--mode")),
            (("simulate",), ("--insecure-plain-sums", "without masks")),
            (("compare",), ("--seeds", "--epsilon", "--out", "--insecure-plain-sums")),
            (("sweep",), ("--epsilon", "--clip-norm", "--merchants", "--sampling-rate", "--keep")),
            (("data",), ("list", "show", "generate")),
            (("merchant",), ("check", "plan", "budget", "settle", "evidence", "head", "assign")),
            (("merchant",), ("init", "enrol", "members", "rotate", "join", "leave")),
            (("server",), ("init", "invite", "members", "revoke", "rotate", "evidence")),
            (("server",), ("start", "stop", "run", "status", "resume")),
            (("audit",), ("verify", "epsilon", "report", "empirical")),
            (("data", "generate"), ("--epsilon", "--data-seed")),
        ],
        ids=str,
    )
    def test_every_command_has_help(self, command: tuple[str, ...], words: tuple[str, ...]) -> None:
        """It names the options."""
        text = hansa(*command, "--help").stdout
        assert all(word in text for word in words)

    def test_an_unknown_option_is_wrong_use(self) -> None:
        """Exit code 2, and no traceback."""
        assert "--nonsense" in hansa("simulate", "--nonsense", code=2).stderr

    def test_the_version_is_printed(self) -> None:
        """As installed."""
        assert hansa("version").stdout.strip() == "0.1.0"


class TestErrors:
    """One clear line, no traceback, the right code."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("simulate", "--data", "nonsense"), "unknown data set 'nonsense'"),
            (("simulate", "missing.toml", *SMALL), "missing.toml: there is no such contract"),
            (("simulate", "--epsilon", "0", *SMALL), "privacy.epsilon"),
            (("simulate", "--mode", "foo", *SMALL), "'distributed' or 'local', got 'foo'"),
            (("simulate", "--data", "./missing"), "missing: holds no federation"),
            (("simulate", "--preset", "tiny"), "unknown preset of synthetic 'tiny'"),
            (("compare", "--epsilon", "0"), "--epsilon: expected a number above 0"),
            (("contract", "missing.toml"), "there is no such contract file"),
            (("data", "generate", "x", "--epsilon", "0"), "--epsilon: expected a number above 0"),
            (("data", "show", "nonsense"), "unknown data set 'nonsense'"),
            (("simulate", "--merchants", "1"), "use 2 merchants or more, or --insecure-plain-sums"),
            (("data", "generate", "x", "--merchants", "1"), "use 2 merchants or more"),
            (("compare", "--merchants", "1"), "use 2 merchants or more, or --insecure-plain-sums"),
        ],
        ids=str,
    )
    def test_wrong_use_is_told_in_one_line(
        self, tmp_path: Path, arguments: tuple[str, ...], words: str
    ) -> None:
        """Exit code 2, and nothing is left behind."""
        assert words in said(hansa(*arguments, cwd=tmp_path, code=2))
        assert list(tmp_path.iterdir()) == []

    def test_an_invalid_contract_is_told_by_key(self, tmp_path: Path) -> None:
        """File, key, expected and found; a line for each finding."""
        contract = contract_toml(load("synthetic", preset="smoke", merchants=3).contract)
        path = tmp_path / "c.toml"
        path.write_text(contract.replace("rounds = 60", "rounds = -1"))
        assert "c.toml: training.rounds" in said(hansa("contract", path, code=2))
        path.write_text("[federation\n")
        assert "is not valid TOML" in said(hansa("simulate", path, *SMALL, code=2))

    @pytest.mark.slow
    def test_a_contract_for_other_data_is_refused(self, tmp_path: Path) -> None:
        """The message names the column."""
        contract = contract_toml(load("synthetic", preset="smoke", merchants=3).contract)
        (tmp_path / "c.toml").write_text(contract.replace('"gap_days"', '"shoe_size"'))
        done = hansa("simulate", tmp_path / "c.toml", *SMALL, code=2)
        assert "no column 'shoe_size'" in said(done)

    @pytest.mark.slow
    @pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
    def test_a_folder_with_something_in_it_is_kept(
        self, tmp_path: Path, overwrite: list[str]
    ) -> None:
        """Also when asked to overwrite, because it is no simulation's."""
        (tmp_path / "thesis.docx").touch()
        done = hansa("simulate", *SMALL, "--out", tmp_path, *overwrite, code=2)
        assert ("not overwritten" if overwrite else "--overwrite") in said(done)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.docx"]

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "option",
        [
            ["--epsilon", "2"],
            ["--seed", "0"],
            ["--rounds", "3"],
            ["--data-seed", "1"],
            ["--insecure-plain-sums"],
        ],
    )
    def test_a_federations_folder_takes_no_overrides(
        self, federation: Path, tmp_path: Path, option: list[str]
    ) -> None:
        """Contract and policies are its own."""
        done = hansa("simulate", "--data", federation, *option, cwd=tmp_path, code=2)
        assert said(done).startswith(f"hansa: {option[0]}: ")


class TestSimulate:
    """A whole run from the command line."""

    @pytest.mark.slow
    def test_json_on_the_terminal_is_nothing_else(self, tmp_path: Path) -> None:
        """Standard output is one document that keeps its schema; the report is there."""
        done = hansa("simulate", *SMALL, "--seed", "3", "--out", "o", "--json", "-", cwd=tmp_path)
        document = json.loads(done.stdout)
        schema = json.loads((files("hansa") / "schemas" / "simulate.schema.json").read_text())
        jsonschema.validate(document, schema)
        assert document["seed"] == 3
        assert any("not for release" in note for note in document["notes"])
        assert document == json.loads((tmp_path / "o" / "result.json").read_text())
        assert "guess" in (tmp_path / "o" / "report.html").read_text()
        assert "Report" in done.stderr

    @pytest.mark.slow
    def test_sums_are_secure_unless_told_otherwise(self, tmp_path: Path) -> None:
        """Everything that is written says so, and one epsilon holds towards everybody."""
        done = hansa("simulate", *SMALL, "--out", "o", "--json", "r.json", cwd=tmp_path)
        document = json.loads((tmp_path / "r.json").read_text())
        assert document["secure"] is True
        assert document["epsilon_server"] == document["epsilon"]
        assert {merchant["accuracy"] for merchant in document["merchants"]} == {None}
        assert document["achieved"]["survivors_min"] == document["achieved"]["survivors_max"] == 3
        assert document["achieved"]["epsilon"] < document["epsilon"]
        assert [entry["colluders"] for entry in document["colluders"]] == [0, 1]
        assert read_contract(tmp_path / "o" / "contract.toml").aggregation.secure
        bundle, page = tmp_path / "o" / "bundle", (tmp_path / "o" / "report.html").read_text()
        for text in (done.stdout, page, (bundle / "MODEL_CARD.md").read_text()):
            told = " ".join(text.split())
            assert "The sums of this run were masked" in told
            assert "not masked" not in told
        assert 'class="box red"' not in page
        assert "Towards server" not in done.stdout
        assert "Noisy accuracy" not in done.stdout
        assert "Colluders epsilon" in done.stdout
        told = json.loads((bundle / "privacy.json").read_text())
        assert told["achieved"] == document["achieved"]
        assert told["colluders"] == document["colluders"]

    @pytest.mark.slow
    def test_plain_sums_need_a_flag_and_are_told_everywhere(self, tmp_path: Path) -> None:
        """In red where there is red, in words everywhere else."""
        flags = ("--insecure-plain-sums", "--out", "o", "--json", "r.json")
        done = hansa("simulate", *SMALL, *flags, cwd=tmp_path)
        document = json.loads((tmp_path / "r.json").read_text())
        assert document["secure"] is False
        assert document["epsilon_server"] > document["epsilon"]
        contract = read_contract(tmp_path / "o" / "contract.toml")
        assert not contract.aggregation.secure
        bundle = tmp_path / "o" / "bundle"
        assert 'class="box red"' in (tmp_path / "o" / "report.html").read_text()
        assert "The sums were not masked" in done.stdout
        assert "Towards server" in done.stdout
        told = json.loads((bundle / "privacy.json").read_text())
        assert told["notes"] == [statements.NOT_MASKED["distributed"]]
        assert (
            f"**{statements.NOT_MASKED['distributed']}**" in (bundle / "MODEL_CARD.md").read_text()
        )

    @pytest.mark.slow
    def test_a_generated_federation_keeps_its_ledgers(self, tmp_path: Path) -> None:
        """The second run is refused because the budget is spent, and the message says so."""
        arguments = ("generate", "f", "--preset", "smoke", "--merchants", "3", "--rounds", "10")
        assert "3 merchants, 150 customers" in hansa("data", *arguments, cwd=tmp_path).stdout
        assert read_contract(tmp_path / "f/contract.toml").training.rounds == 10
        hansa("simulate", "--data", "f", "--out", "one", cwd=tmp_path)
        assert len(list(tmp_path.glob("f/merchants/*/ledger.sqlite"))) == 3
        done = hansa("simulate", "--data", "f", "--out", "two", cwd=tmp_path, code=1)
        assert "0 of 3 merchants take part" in done.stderr
        assert "would bring this merchant to epsilon" in done.stderr
        assert "its cap is 1 at delta" in done.stderr
        assert not (tmp_path / "two" / "bundle").exists()
        assert not (tmp_path / "two" / "report.html").exists()
        check = ("merchant", "check", "f/merchants/merchant-0001/merchant.toml")
        checked = hansa(*check, "--contract", "f/contract.toml", cwd=tmp_path, code=1)
        assert "your ledger refuses this contract" in checked.stdout

    @pytest.mark.slow
    def test_ctrl_c_ends_a_run_without_a_trace(self, tmp_path: Path) -> None:
        """Exit code 130, one word, no bundle and no report."""
        arguments = ["--preset", "small", "--rounds", "5000", "--epsilon", "50", "--out", "o"]
        process = subprocess.Popen(
            [*COMMAND, "simulate", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
            cwd=tmp_path,
        )
        try:
            contract = tmp_path / "o" / "contract.toml"
            end = time.monotonic() + 60
            while not contract.exists() and time.monotonic() < end:
                time.sleep(0.05)
            time.sleep(1.0)  # some rounds later
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=30)
        finally:
            process.kill()
        assert process.returncode == 130
        assert "Traceback" not in told
        assert told.strip().endswith("hansa: interrupted")
        assert not (tmp_path / "o" / "bundle").exists()
        assert not (tmp_path / "o" / "report.html").exists()
        assert not (tmp_path / "o" / "result.json").exists()

    @pytest.mark.slow
    def test_an_earlier_simulation_is_overwritten_when_asked(self, tmp_path: Path) -> None:
        """The second run's files are its own."""
        for extra in ((), ("--overwrite",)):
            hansa("simulate", *SMALL, "--out", "o", *extra, "--json", "r.json", cwd=tmp_path)
        document = json.loads((tmp_path / "r.json").read_text())
        told = json.loads((tmp_path / "o" / "bundle" / "privacy.json").read_text())
        assert told["run"] == document["run"]

    @pytest.mark.slow
    def test_a_contract_file_is_followed(self, tmp_path: Path) -> None:
        """Its delta and rounds, for the merchants of the data set."""
        contract = load("synthetic", preset="smoke", merchants=3).contract
        contract = contract.revised(training={"rounds": 2}, privacy={"delta": 1e-4})
        (tmp_path / "c.toml").write_text(contract_toml(contract))
        arguments = ("--preset", "smoke", "--merchants", "4", "--out", "o", "--json", "-")
        document = json.loads(hansa("simulate", "c.toml", *arguments, cwd=tmp_path).stdout)
        assert (document["delta"], document["rounds"]) == (1e-4, 2)
        assert read_contract(tmp_path / "o/bundle/contract.toml").federation.min_merchants == 4


class TestCompare:
    """The comparison from the command line."""

    @pytest.mark.slow
    def test_json_and_page(self, tmp_path: Path) -> None:
        """The document keeps its schema; page and picture are written."""
        contract = load("synthetic", preset="smoke", merchants=3).contract
        (tmp_path / "c.toml").write_text(contract_toml(contract.revised(training={"rounds": 2})))
        arguments = ("--preset", "smoke", "--merchants", "3", "--seeds", "1", "--out", "o")
        done = hansa("compare", "c.toml", *arguments, "--json", "-", cwd=tmp_path)
        schema = json.loads((files("hansa") / "schemas" / "compare.schema.json").read_text())
        jsonschema.validate(json.loads(done.stdout), schema)
        assert json.loads(done.stdout)["secure"] is True
        assert "not masked" not in " ".join(done.stderr.split())
        assert (tmp_path / "o" / "comparison.html").is_file()
        assert (tmp_path / "o" / "comparison.png").is_file()

    @pytest.mark.slow
    def test_plain_sums_need_a_flag(self, tmp_path: Path) -> None:
        """And are told with the verdict."""
        contract = load("synthetic", preset="smoke", merchants=3).contract
        (tmp_path / "c.toml").write_text(contract_toml(contract.revised(training={"rounds": 2})))
        arguments = ("--preset", "smoke", "--merchants", "3", "--seeds", "1")
        done = hansa(
            "compare", "c.toml", *arguments, "--insecure-plain-sums", "--json", "-", cwd=tmp_path
        )
        assert json.loads(done.stdout)["secure"] is False
        assert statements.NOT_MASKED_COMPARED in " ".join(done.stderr.split())


class TestData:
    """The built-in data sets."""

    def test_the_list_names_every_set_and_what_it_needs(self) -> None:
        """Names are whole, and so is what has to be installed."""
        text = hansa("data", "list").stdout
        for part in ("complete-journey", "cdnow", "synthetic", "hansa[data]"):
            assert part in text

    def test_one_set_is_shown_with_its_features(self) -> None:
        """Merchants, customers, segments, provenance and bounds."""
        text = hansa("data", "show", "synthetic", "--preset", "smoke").stdout
        for part in ("20 merchants, 1,000 customers", "provenance disputed", "gap_days", "gone"):
            assert part in text

    def test_a_federation_is_not_written_over(self, federation: Path) -> None:
        """A folder with something in it is refused."""
        done = hansa("data", "generate", federation, "--preset", "smoke", code=2)
        assert "already exists and is not an empty folder" in said(done)


class TestContract:
    """A contract before anybody signs it."""

    def test_it_tells_hash_releases_and_cost(self, federation: Path) -> None:
        """All that a member wants to know."""
        text = hansa("contract", federation / "contract.toml").stdout
        assert read_contract(federation / "contract.toml").sha256 in text
        for part in ("valid", "census", "update", "profile", "epsilon 1 towards whoever sees sums"):
            assert part in text

    def test_of_secure_sums_it_tells_one_epsilon(self, federation: Path) -> None:
        """For everybody, the smallest cohort, and what holds towards the server."""
        text = " ".join(hansa("contract", federation / "contract.toml").stdout.split())
        assert "epsilon 1 towards whoever sees sums, the server included" in text
        assert "over at least 2 merchants" in text
        assert "fewer than a third of the merchants of a sum collude" in text
        assert "not masked" not in text

    def test_of_plain_sums_it_tells_the_servers_epsilon(self, plain: Path) -> None:
        """Rounded up."""
        text = hansa("contract", plain / "contract.toml").stdout
        agreed = read_contract(plain / "contract.toml")
        server = epsilon_text(planned_epsilon_towards_server(agreed))
        assert f"epsilon {server} towards the server (sums are not masked)" in text
        assert float(server) >= planned_epsilon_towards_server(agreed)
        assert "included" not in text


class TestMerchant:
    """What a merchant does on its own."""

    def test_a_good_table_is_counted(self, federation: Path) -> None:
        """Customers, segments, held out, and what a run costs."""
        file = federation / "merchants" / "merchant-0000" / "merchant.toml"
        text = hansa("merchant", "check", file, "--contract", federation / "contract.toml").stdout
        assert "50 customers, 50 with a segment" in text
        assert "costs epsilon 1 towards" in text
        assert "towards whoever sees sums, the server included" in text
        assert "your key is enrolled, in a list of 3 merchants" in text
        assert "you help to unmask sums over at least 3 merchants" in text
        assert "would be accepted" in text
        assert not (file.parent / "ledger.sqlite").exists()
        assert not (file.parent / "session.sealed").exists()

    @pytest.mark.slow
    def test_plain_sums_cost_more_towards_the_server(self, plain: Path) -> None:
        """Two epsilons; the ledger needs a key all the same."""
        folder = plain / "merchants" / "merchant-0000"
        check = ("merchant", "check", folder / "merchant.toml")
        text = hansa(*check, "--contract", plain / "contract.toml").stdout
        agreed = read_contract(plain / "contract.toml")
        server = epsilon_text(planned_epsilon_towards_server(agreed))
        assert f"sees sums and {server} towards the server" in text
        assert "its sums are not masked; your key is enrolled" in text
        (folder / "identity.key").unlink()
        line = said(hansa(*check, "--contract", plain / "contract.toml", code=2))
        assert "there is no identity key" in line

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("broken", "words"),
        [
            ("identity.key", "there is no identity key"),
            ("others' key", "is not enrolled with the key in"),
            ("members.toml", "there is no list of members"),
            ("mode", "others can read this key"),
        ],
    )
    def test_secure_sums_need_an_enrolled_key(
        self, federation: Path, broken: str, words: str
    ) -> None:
        """Exit code 2: a file cannot be used."""
        folder = federation / "merchants" / "merchant-0000"
        key = folder / "identity.key"
        if broken == "identity.key":
            key.unlink()
        elif broken == "others' key":
            key.write_text((folder.parent / "merchant-0001" / "identity.key").read_text())
        elif broken == "members.toml":
            (federation / "members.toml").unlink()
        else:
            key.chmod(0o644)
        check = ("merchant", "check", folder / "merchant.toml")
        assert words in said(hansa(*check, "--contract", federation / "contract.toml", code=2))

    @pytest.mark.slow
    def test_a_short_list_of_members_is_noticed(self, federation: Path) -> None:
        """It may still grow, so the check goes on."""
        listed = federation / "members.toml"
        lines = listed.read_text().splitlines()
        listed.write_text("\n".join([*lines[:3], *lines[lines.index("[witness]") :]]) + "\n")
        check = ("merchant", "check", federation / "merchants" / "merchant-0000" / "merchant.toml")
        text = hansa(*check, "--contract", federation / "contract.toml").stdout
        assert "in a list of 2 merchants; the contract counts on 3" in text
        assert "would be accepted" in text

    @pytest.mark.slow
    def test_without_a_witness_nothing_would_be_released(self, federation: Path) -> None:
        """Exit code 1, and whom to ask."""
        listed = federation / "members.toml"
        listed.write_text(listed.read_text().partition("[witness]")[0])
        check = ("merchant", "check", federation / "merchants" / "merchant-0000" / "merchant.toml")
        text = hansa(*check, "--contract", federation / "contract.toml", code=1).stdout
        assert "has no [witness] key" in text
        assert "would be accepted" not in text

    @pytest.mark.slow
    def test_a_merchants_own_list_of_members_comes_first(self, federation: Path) -> None:
        """As in a run: what lies beside the merchant's file is what it pinned."""
        folder = federation / "merchants" / "merchant-0000"
        own = (federation / "members.toml").read_text().replace("merchant-0000", "merchant-9999")
        (folder / "members.toml").write_text(own)
        check = ("merchant", "check", folder / "merchant.toml")
        line = said(hansa(*check, "--contract", federation / "contract.toml", code=2))
        assert "merchants/merchant-0000/members.toml: 'merchant-0000' is not enrolled" in line

    @pytest.mark.slow
    def test_a_bad_table_is_told_by_row_and_column(self, federation: Path) -> None:
        """Without the cell's value, and with exit code 2."""
        folder = federation / "merchants" / "merchant-0000"
        table = pd.read_parquet(folder / "customers.parquet")
        table["spend"] = table["spend"].astype(str)
        table.loc[7, "spend"] = "secret-4711"
        table.to_parquet(folder / "customers.parquet")
        check = ("merchant", "check", folder / "merchant.toml")
        line = said(hansa(*check, "--contract", federation / "contract.toml", code=2))
        assert "row 8" in line
        assert "column 'spend'" in line
        assert "4711" not in line

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("found", "put", "words"),
        [
            ("epsilon = 1.0", "epsilon = 0.5", "your ledger refuses this contract"),
            ("min_cohort = 3", "min_cohort = 4", "sums over at least 4 merchants"),
        ],
    )
    def test_a_policy_that_would_refuse_fails_the_check(
        self, federation: Path, found: str, put: str, words: str
    ) -> None:
        """Exit code 1, so that a script notices."""
        file = federation / "merchants" / "merchant-0000" / "merchant.toml"
        file.write_text(file.read_text().replace(found, put))
        check = ("merchant", "check", file, "--contract", federation / "contract.toml")
        assert words in hansa(*check, code=1).stdout

    @pytest.mark.slow
    def test_a_policy_against_plain_sums_fails_the_check(self, plain: Path) -> None:
        """Exit code 1 too."""
        file = plain / "merchants" / "merchant-0000" / "merchant.toml"
        file.write_text(file.read_text().replace("sums = true", "sums = false"))
        check = ("merchant", "check", file, "--contract", plain / "contract.toml")
        assert "its sums are not masked" in hansa(*check, code=1).stdout

    @pytest.mark.slow
    def test_a_published_model_assigns_customers(self, federation: Path, tmp_path: Path) -> None:
        """Two files for their owner; a bundle that was changed is refused."""
        hansa("simulate", "--data", federation, "--out", "o", cwd=tmp_path)
        file = federation / "merchants" / "merchant-0001" / "merchant.toml"
        hansa("merchant", "assign", "o/bundle", file, "--out", "mine", cwd=tmp_path)
        ours = pd.read_parquet(tmp_path / "mine" / "assignments.parquet")
        theirs = pd.read_parquet(tmp_path / "o/merchants/merchant-0001/assignments.parquet")
        pd.testing.assert_frame_equal(ours, theirs)
        files = {one.name: one.read_bytes() for one in (tmp_path / "o/bundle").iterdir()}
        del files["manifest.json"]
        write_bundle(tmp_path / "forged", files, Ed25519PrivateKey.generate())
        done = hansa("merchant", "assign", "forged", file, "--out", "m", cwd=tmp_path, code=1)
        assert "not by the coordinator that you pinned" in said(done)
        with (tmp_path / "o/bundle/model.safetensors").open("ab") as model:
            model.write(b"x")
        done = hansa("merchant", "assign", "o/bundle", file, "--out", "m", cwd=tmp_path, code=1)
        assert "was changed after the bundle was written" in said(done)
