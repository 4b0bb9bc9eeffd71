"""`hansa merchant` and `hansa server`: budget, plan, settle, head, evidence."""

import json
import re
import shutil
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner, Result

from clients.enrolment import spent_by
from clients.joining import open_worker
from clients.merchant import read_merchant
from common.budget import Occasion
from common.contract import contract_toml, read_contract
from common.errors import (
    ContractError,
    EvidenceError,
    HansaError,
    IdentityError,
    LedgerError,
    PolicyError,
)
from common.evidence import read_evidence
from common.identity import read_members
from common.ledger import whole_run
from common.plan import plan_of
from server.archive import open_archive
from simulations.datasets import load, write_federation

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # typer imports old names of click
    from hansa.cli import app

ID = "merchant-0000"
ROUNDS = 4


def hansa(*arguments: object, answer: str | None = None, code: int = 0) -> Result:
    """Run a command in this process; an error that `main` would tell is raised."""
    done = CliRunner().invoke(app, [*map(str, arguments)], input=answer, env={"COLUMNS": "100"})
    if isinstance(done.exception, HansaError):
        raise done.exception
    assert done.exit_code == code, done.output
    return done


def in_a_process(*arguments: object, code: int) -> "subprocess.CompletedProcess[str]":
    """Run the real command."""
    command = [sys.executable, "-m", "hansa.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a federation of three merchants whose cap pays for more than one run."""
    folder = tmp_path_factory.mktemp("written") / "fed"
    dataset = load("synthetic", preset="smoke", merchants=3)
    write_federation(dataset, folder, epsilon=2.0)
    contract = dataset.contract.revised(training={"rounds": ROUNDS})
    (folder / "contract.toml").write_text(contract_toml(contract))
    return folder


@pytest.fixture
def fed(written: Path, tmp_path: Path) -> Path:
    """Give a copy of the federation."""
    return Path(shutil.copytree(written, tmp_path / "fed"))


@pytest.fixture
def shop(fed: Path) -> Path:
    """Give one merchant's file, before its first run."""
    return fed / "merchants" / ID / "merchant.toml"


@pytest.fixture
def broken_off(fed: Path, shop: Path) -> Iterator[Path]:
    """Give the merchant's file after a run that ended with its census."""
    worker = open_worker(shop).worker
    ledger, contract = worker.ledger, worker.contract
    plan, key = plan_of(contract), ledger.identity.public
    witness = open_archive(fed / "server").witness
    charges = plan.charges(1)
    head = ledger.reserve(whole_run("broken", contract.sha256), charges, plan.last(ROUNDS))
    assert witness.countersign({ID: (key, head)}) == {}
    census = Occasion("broken", "census", 0, 0, contract.sha256)
    ledger.release(census, charges[0], "0" * 64, countersigned=witness.latest(key))
    yield shop
    ledger.close()


def checked(text: str, schema: str) -> dict[str, Any]:
    """Read a document that keeps the schema that the package ships."""
    document: dict[str, Any] = json.loads(text)
    path = files("hansa") / "schemas" / f"{schema}.schema.json"
    jsonschema.validate(document, json.loads(path.read_text()))
    return document


def change_ledger(shop: Path) -> None:
    """Change one entry of a ledger, as somebody with a database tool could."""
    with sqlite3.connect(shop.parent / "ledger.sqlite") as file:
        file.execute("DROP TRIGGER entry_no_update")
        body = "CAST(replace(body, 'census', 'update') AS BLOB)"
        file.execute(f"UPDATE entry SET body = {body} WHERE seq = 2")  # noqa: S608
    file.close()


class TestBudget:
    """`hansa merchant budget`."""

    def test_before_the_first_run_all_is_left(self, shop: Path) -> None:
        """No ledger is made by looking."""
        text = hansa("merchant", "budget", shop).output
        assert "epsilon 0 of 2 spent" in text
        assert "left: epsilon 2 for one further release" in text or "left: epsilon 1.99" in text
        assert "2 further runs" in text or "3 further runs" in text
        assert "nothing was ever charged" in text
        assert "it was moved or lost" in " ".join(text.split())
        assert not (shop.parent / "ledger.sqlite").exists()

    def test_a_run_that_broke_off_holds_all_that_it_reserved(self, broken_off: Path) -> None:
        """The table says so, and the last lines say what to do."""
        text = hansa("merchant", "budget", broken_off).output
        assert re.search(r"broken +\w{8} +\S+ +reserved +1 +0\.\d+ +1\s", text)
        assert "hansa merchant settle" in text
        assert "epsilon 1 of 2 spent" in text

    def test_json_has_everything(self, broken_off: Path, tmp_path: Path) -> None:
        """And standard output has nothing else."""
        done = hansa("merchant", "budget", broken_off, "--json", "-")
        document = checked(done.stdout, "budget")
        assert document["cap"] == 2.0
        assert [run["run"] for run in document["runs"]] == ["broken"]
        assert document["runs"][0]["state"] == "reserved"
        assert set(document["purposes"]) == {"census", "update", "evaluation", "profile"}
        assert document["fits"]["runs"] >= 1
        assert document["lifetime"] == document["epsilon"] == pytest.approx(1.0)
        hansa("merchant", "budget", broken_off, "--json", tmp_path / "b.json")
        assert json.loads((tmp_path / "b.json").read_text())["runs"] == document["runs"]

    def test_caps_of_its_own_and_a_refresh_period_are_told(self, broken_off: Path) -> None:
        """With the lifetime's epsilon for customers who stay."""
        policy = "refresh_days = 30.0\nepsilon_towards_server = 5.0\n"
        text = broken_off.read_text().replace("[policy]\n", f"[policy]\n{policy}")
        broken_off.write_text(f"{text}\n[policy.purposes]\nprofile = 0.5\n")
        checked(hansa("merchant", "budget", broken_off, "--json", "-").stdout, "budget")
        text = hansa("merchant", "budget", broken_off).output
        assert "A run counts for 30 days. Customers who stay" in text
        assert "lifetime epsilon is 1" in text
        assert "towards the server: epsilon 1 of 5 spent" in text
        assert re.search(r"profile +0\.\d+ +0\.5\s", text)

    def test_refusals_are_told(self, broken_off: Path) -> None:
        """When, in which run, and why."""
        ledger = open_worker(broken_off).worker.ledger
        contract = read_contract(broken_off.parents[2] / "contract.toml")
        charges = [*plan_of(contract).charges(1)] * 20
        with pytest.raises(LedgerError):
            ledger.check_affordable(whole_run("greedy", contract.sha256), charges)
        ledger.close()
        checked(hansa("merchant", "budget", broken_off, "--json", "-").stdout, "budget")
        text = hansa("merchant", "budget", broken_off).output
        assert "1 refusal; the last:" in text
        assert "greedy: would bring this merchant to epsilon" in text

    @pytest.mark.parametrize(("name", "start"), [("b.png", b"\x89PNG"), ("b.svg", b"<?xml"),
                                                 ("b.html", b"<!doctype html>")])  # fmt: skip
    def test_pictures(self, broken_off: Path, tmp_path: Path, name: str, start: bytes) -> None:
        """Of the kind that the name asks for."""
        hansa("merchant", "budget", broken_off, "--picture", tmp_path / name)
        content = (tmp_path / name).read_bytes()
        assert content.startswith(start)
        if name.endswith(".html"):
            assert b"<svg role=" in content
            assert b"Budget of merchant-0000" in content

    def test_a_picture_of_no_known_kind_is_refused_first(self, broken_off: Path) -> None:
        """Before anything is worked out."""
        with pytest.raises(PolicyError, match=r"to end in \.png, \.svg, \.html"):
            hansa("merchant", "budget", broken_off, "--picture", "budget.gif")

    def test_another_contract_can_be_asked_about(self, fed: Path, shop: Path) -> None:
        """Without a contract, nothing is said of runs."""
        (fed / "contract.toml").rename(fed / "other.toml")
        assert "add --contract" in hansa("merchant", "budget", shop).output
        text = hansa("merchant", "budget", shop, "--contract", fed / "other.toml").output
        assert "further runs" in text
        with pytest.raises(ContractError):
            hansa("merchant", "budget", shop, "--contract", fed / "none.toml")

    def test_a_changed_ledger_ends_with_code_2(self, broken_off: Path) -> None:
        """One line, from the real command."""
        change_ledger(broken_off)
        done = in_a_process("merchant", "budget", broken_off, code=2)
        (line,) = done.stderr.splitlines()
        assert "entry 2 was changed, or is missing" in line


class TestSettle:
    """`hansa merchant settle`."""

    def test_frees_what_was_never_released(self, broken_off: Path) -> None:
        """After asking; a second time there is nothing to free."""
        done = hansa("merchant", "settle", broken_off, "broken", answer="y\n")
        assert "reserved epsilon 1 and wrote 1 release of epsilon 0." in done.output
        assert "what counts goes from 1 to 0." in done.output
        account = spent_by(read_merchant(broken_off))
        assert account.runs["broken"].settled
        assert account.spent() < 0.5
        assert "settled already" in hansa("merchant", "settle", broken_off, "broken").output

    def test_no_means_no(self, broken_off: Path) -> None:
        """The ledger stays as it is."""
        hansa("merchant", "settle", broken_off, "broken", answer="n\n", code=1)
        assert not spent_by(read_merchant(broken_off)).runs["broken"].settled

    def test_from_the_real_command(self, broken_off: Path) -> None:
        """Without a question."""
        done = in_a_process("merchant", "settle", broken_off, "broken", "--yes", code=0)
        assert done.stdout.splitlines()[-1].startswith("settled: epsilon 0.")

    def test_nothing_more_is_released(self, broken_off: Path) -> None:
        """The run is over, even if it goes on elsewhere."""
        hansa("merchant", "settle", broken_off, "broken", "--yes")
        worker = open_worker(broken_off).worker
        plan, sha256 = plan_of(worker.contract), worker.contract.sha256
        with pytest.raises(LedgerError, match="this run is closed"):
            worker.ledger.release(
                Occasion("broken", "update", 1, 0, sha256), plan.charges(1)[1], "0" * 64
            )
        worker.ledger.close()

    def test_an_unknown_run_is_refused(self, shop: Path, broken_off: Path) -> None:
        """And no ledger is made for it."""
        with pytest.raises(LedgerError, match="nothing is reserved for a run 'other'"):
            hansa("merchant", "settle", broken_off, "other", "--yes")
        (shop.parent / "ledger.sqlite").unlink()
        with pytest.raises(LedgerError, match="nothing is reserved"):
            hansa("merchant", "settle", shop, "broken", "--yes")
        assert not (shop.parent / "ledger.sqlite").exists()


class TestPlan:
    """`hansa merchant plan`."""

    def test_the_contract_alone(self, fed: Path) -> None:
        """Cost by stage, round by round, and who else could know more."""
        text = hansa("merchant", "plan", fed / "contract.toml").output
        assert "a run reserves epsilon 1 towards whoever sees sums, the server included" in text
        assert "nobody colludes" in text
        assert "a person who is a customer of 5 merchants" in text
        assert "add --merchant" in text
        assert "add --customers" in text
        (row,) = re.findall(r"^ +4 +(0\.\d+) +#+", text, re.M)
        assert float(row) < 1.0

    def test_for_a_merchant(self, fed: Path, broken_off: Path) -> None:
        """What its cap says, and the quality to expect."""
        plan = ("merchant", "plan", fed / "contract.toml", "--merchant", broken_off)
        text = hansa(*plan, "--customers", 2000, "--merchants", 4).output
        assert "your budget: epsilon 1 before, 1." in text
        assert "your cap pays for" in text
        assert "4 merchants with 2,000 customers each, about 6,000 of all trained on" in text
        assert re.search(r"signal over noise \S+ in a round, \S+ in the whole run: good", text)
        assert "accuracy published with a noise of" in text
        checked(hansa(*plan, "--customers", 50, "--json", "-").stdout, "plan")
        text = hansa(*plan, "--customers", 5).output
        assert "drowned" in text
        assert "too few held-out customers" in text

    def test_a_start(self, fed: Path, tmp_path: Path) -> None:
        """Where the contract has one, the plan says what training adds to it."""
        contract = read_contract(fed / "contract.toml")
        for start, told in (("0" * 64, True), (None, False)):
            path = tmp_path / "contract.toml"
            path.write_text(contract_toml(contract.revised("other", model={"start": start})))
            said = {}
            for customers in (5, 500, 5000):
                text = hansa("merchant", "plan", path, "--customers", customers).output
                verdict = re.search(r"in the whole run: (\w+)", text)
                assert verdict is not None
                said[verdict[1]] = text
            assert ("no better than the contract's start" in said["drowned"]) == told
            assert ("about as good as the contract's start" in said["weak"]) == told
            assert ("better than the contract's start" in said["good"]) == told
            for text in (said["drowned"], said["weak"]):
                assert ("last period" in text) != told

    def test_no_customer_is_read(self, fed: Path, shop: Path) -> None:
        """The table need not be there."""
        (shop.parent / "customers.parquet").unlink()
        hansa("merchant", "plan", fed / "contract.toml", "--merchant", shop)

    def test_a_refusal_is_told(self, fed: Path, shop: Path) -> None:
        """In the ledger's words."""
        shop.write_text(shop.read_text().replace("epsilon = 2.0", "epsilon = 0.5"))
        text = hansa("merchant", "plan", fed / "contract.toml", "--merchant", shop).output
        assert "your ledger would refuse: the run would bring this merchant to epsilon" in text

    def test_json_and_picture(self, fed: Path, tmp_path: Path) -> None:
        """An epsilon without a bound is null."""
        plain = tmp_path / "plain.toml"
        contract = read_contract(fed / "contract.toml")
        sums = {"secure": False, "min_survivors": 1}
        plain.write_text(contract_toml(contract.revised(aggregation=sums)))
        picture = tmp_path / "p.svg"
        done = hansa("merchant", "plan", plain, "--json", "-", "--picture", picture)
        document = checked(done.stdout, "plan")
        assert document["colluders"][-1] == {"colluders": 1, "epsilon": None}
        assert len(document["rounds"]) == ROUNDS
        assert document["quality"] is document["budget"] is None
        assert "Training round" in picture.read_text()

    def test_too_few_merchants_are_refused(self, fed: Path) -> None:
        """No sum would come about."""
        with pytest.raises(ContractError, match="no sum comes about"):
            hansa("merchant", "plan", fed / "contract.toml", "--merchants", 1)

    def test_local_noise(self, fed: Path, tmp_path: Path) -> None:
        """A person's epsilon grows less fast, and colluders change nothing."""
        local = tmp_path / "local.toml"
        contract = read_contract(fed / "contract.toml")
        local.write_text(contract_toml(contract.revised(training={"mode": "local"})))
        document = json.loads(hansa("merchant", "plan", local, "--json", "-").stdout)
        assert len({found["epsilon"] for found in document["colluders"]}) == 1


class TestEvidence:
    """`hansa merchant evidence`, `hansa merchant head` and `hansa server`."""

    def test_a_merchant_makes_its_own(self, broken_off: Path, tmp_path: Path) -> None:
        """As a zip file or a folder; older evidence is replaced."""
        for out in (tmp_path / "e.zip", tmp_path / "e", tmp_path / "e"):
            text = hansa("merchant", "evidence", broken_off, "--out", out).output
            assert "3 entries of the ledger of merchant-0000" in text
            assert read_evidence(out).name == ID

    def test_a_missing_contract_is_told(self, fed: Path, broken_off: Path, tmp_path: Path) -> None:
        """And can be added."""
        (fed / "contract.toml").rename(fed / "old.toml")
        out = ("--out", tmp_path / "e.zip")
        assert "add it with --contract" in hansa("merchant", "evidence", broken_off, *out).output
        more = ("--contract", fed / "old.toml")
        text = hansa("merchant", "evidence", broken_off, *out, *more).output
        assert "--contract" not in text

    def test_something_else_is_not_replaced(self, broken_off: Path, tmp_path: Path) -> None:
        """It stays."""
        (tmp_path / "thesis.zip").write_text("thesis")
        with pytest.raises(EvidenceError):
            hansa("merchant", "evidence", broken_off, "--out", tmp_path / "thesis.zip")
        assert (tmp_path / "thesis.zip").read_text() == "thesis"

    def test_head(self, broken_off: Path) -> None:
        """One line, for whoever keeps it."""
        line = hansa("merchant", "head", broken_off).output
        assert re.fullmatch(r"hansa head [0-9a-f]{64} 3 [0-9a-f]{64}\n", line)
        assert hansa("merchant", "head", broken_off.parent).output == line

    @pytest.mark.parametrize("command", [["head"], ["evidence", "--out", "e.zip"]])
    def test_without_a_ledger(self, shop: Path, command: list[str]) -> None:
        """There is nothing to show."""
        with pytest.raises(LedgerError, match="there is no ledger yet"):
            hansa("merchant", command[0], shop, *command[1:])

    def test_a_coordinator_makes_its_own(self, fed: Path, broken_off: Path, tmp_path: Path) -> None:
        """Also before the first run."""
        assert broken_off.is_file()
        text = hansa("server", "evidence", fed, "--out", tmp_path / "s.zip").output
        assert "0 runs, 1 head of merchants' ledgers" in text
        assert read_evidence(tmp_path / "s.zip").key == read_members(fed / "members.toml").witness

    def test_a_folder_without_a_coordinator(self, tmp_path: Path) -> None:
        """Is told by its missing file."""
        with pytest.raises(IdentityError, match=r"members\.toml: there is no list of members"):
            hansa("server", "evidence", tmp_path, "--out", tmp_path / "s.zip")
