"""`hansa pretrain`, and what follows from it: simulate, data generate, audit."""

import json
import warnings
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from audit.verify import verify
from common.contract import contract_toml, read_contract
from common.errors import ContractError, HansaError
from common.evidence import read_evidence, write_evidence
from common.start import read_start
from server.archive import open_archive
from simulations.datasets import load

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # typer imports old names of click
    from hansa.cli import app

SMALL = ("--preset", "smoke", "--merchants", "3")


def hansa(*arguments: object) -> Result:
    """Run a command in this process; an error that `main` would tell is raised."""
    done = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})
    if isinstance(done.exception, HansaError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder that the command made for a small model of two rounds."""
    folder = tmp_path_factory.mktemp("pretrain")
    contract = load("synthetic", preset="smoke", merchants=3).contract
    contract = contract.revised(model={"hidden": [4]}, training={"rounds": 2})
    (folder / "cold.toml").write_text(contract_toml(contract))
    done = hansa("pretrain", folder / "cold.toml", "--out", folder / "warm")
    assert "not generated, start with weight zero: household_size" in done.output
    return folder / "warm"


class TestPretrain:
    """`hansa pretrain`."""

    def test_both_files_fit(self, warm: Path) -> None:
        """Contract and parameters, side by side; nothing else of the contract changes."""
        cold, contract = (
            read_contract(warm.parent / "cold.toml"),
            read_contract(warm / "contract.toml"),
        )
        assert read_start(warm / "contract.toml", contract) is not None
        again = contract.revised(model={"start": None}, training={"learning_rate": None})
        assert again.sha256 == cold.sha256 != contract.sha256

    def test_nothing_is_overwritten(self, warm: Path) -> None:
        """A contract that merchants agreed on stays."""
        with pytest.raises(ContractError, match="is there already"):
            hansa("pretrain", warm / "contract.toml", "--out", warm)

    @pytest.mark.slow
    def test_a_start_is_replaced(self, warm: Path, tmp_path: Path) -> None:
        """The contract may have one already."""
        hansa("pretrain", warm / "contract.toml", "--out", tmp_path / "w", "--seed", 1)
        contract = read_contract(tmp_path / "w" / "contract.toml")
        assert contract.model.start != read_contract(warm / "contract.toml").model.start

    def test_a_contract_that_cannot_be_generated_for(self, warm: Path, tmp_path: Path) -> None:
        """Says which key is in the way, and writes nothing."""
        contract = read_contract(warm / "contract.toml").revised(segments={"cuts": []})
        (tmp_path / "c.toml").write_text(contract_toml(contract))
        with pytest.raises(ContractError, match=r"segments\.cuts"):
            hansa("pretrain", tmp_path / "c.toml", "--out", tmp_path / "w")
        assert not (tmp_path / "w").exists()


class TestContract:
    """`hansa contract` with a contract that names a start."""

    def test_it_says_whether_the_file_fits(self, warm: Path, tmp_path: Path) -> None:
        """Merchants read the contract alone; a coordinator needs both."""
        assert "contract.start fits" in hansa("contract", warm / "contract.toml").output
        alone = tmp_path / "contract.toml"
        alone.write_bytes((warm / "contract.toml").read_bytes())
        assert "is not there; a coordinator needs it" in hansa("contract", alone).output
        (tmp_path / "contract.start").write_bytes(b"")
        with pytest.raises(ContractError, match=r"contract\.start: "):
            hansa("contract", alone)


class TestSimulate:
    """`hansa simulate` from a start, and the audit of it."""

    @pytest.fixture(scope="class", params=["file", "built in", "folder"])
    @classmethod
    def out(
        cls, request: pytest.FixtureRequest, warm: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> Path:
        """Give a finished simulation: of a contract's file, of the default, of a folder."""
        folder = tmp_path_factory.mktemp("simulate")
        options: tuple[object, ...] = (*SMALL, "--rounds", 2)
        if request.param == "file":
            options = (warm / "contract.toml", *SMALL)
        if request.param == "folder":
            hansa("data", "generate", folder / "fed", *SMALL, "--rounds", 2)
            options = ("--data", folder / "fed")
        hansa("simulate", *options, "--out", folder / "out")
        return folder / "out"

    def test_it_starts_there(self, out: Path) -> None:
        """By the record in the evidence, and the model card says so."""
        contract = read_contract(out / "contract.toml")
        files = read_evidence(out / "evidence" / "server.zip").files
        (start,) = [name for name in files if name.endswith("/contract.start")]
        assert files[start] == read_start(out / "contract.toml", contract)
        first = json.loads(files[start.replace("contract.start", "run.jsonl")].splitlines()[0])
        assert first["parameters"] == contract.model.start
        assert str(contract.model.start) in (out / "bundle" / "MODEL_CARD.md").read_text()

    def test_the_audit_agrees(self, out: Path) -> None:
        """Everything follows from the evidence."""
        audit = verify([out / "evidence"])
        assert not [found for found in audit.findings if found.severity == "fail"]
        assert [run.replayed for run in audit.runs] == [True]

    def test_evidence_with_another_start(self, out: Path, tmp_path: Path) -> None:
        """An operator that hands in another one, properly signed, is found out."""
        evidence = read_evidence(out / "evidence" / "server.zip")
        server = out / "server" if (out / "server").exists() else out.parent / "fed" / "server"
        key = open_archive(server).identity.key
        (name,) = [name for name in evidence.files if name.endswith("/contract.start")]
        content = evidence.files[name]
        for number, other in enumerate((None, bytes(len(content)), content[:-8])):
            files = {k: v for k, v in evidence.files.items() if k != name}
            files |= {} if other is None else {name: other}
            path = tmp_path / f"{number}.zip"
            write_evidence(path, "server", "coordinator", files, key, 1.0, "", "")
            codes = {found.code for found in verify([path]).findings}
            assert "start-differs" in codes

    def test_evidence_is_a_plain_zip(self, out: Path) -> None:
        """Whoever wants to can hash the file with nothing of ours."""
        with zipfile.ZipFile(out / "evidence" / "server.zip") as archive:
            assert any(name.endswith("/contract.start") for name in archive.namelist())


@pytest.mark.parametrize("what", ["missing", "swapped"])
def test_a_contracts_file_without_its_start(warm: Path, tmp_path: Path, what: str) -> None:
    """Nothing is simulated."""
    (tmp_path / "mine.toml").write_bytes((warm / "contract.toml").read_bytes())
    if what == "swapped":
        (tmp_path / "mine.start").write_bytes(bytes((warm / "contract.start").stat().st_size))
    with pytest.raises(ContractError, match=r"mine\.start: "):
        hansa("simulate", tmp_path / "mine.toml", *SMALL, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
