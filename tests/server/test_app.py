"""The ServerApp: where it finds the contract, what it prints, where the bundle lands."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from audit.verify import verify
from clients.app import create_app as create_client_app
from common.bundle import read_bundle
from common.contract import Contract, contract_toml
from common.errors import ContractError, HansaError, IdentityError, RunError
from common.identity import Identity, write_identity, write_members
from common.ledger import Ledger
from common.network import network_of
from common.start import starting_from, to_bytes
from server.app import _places, create_app
from server.archive import open_archive
from server.coordinator import Coordinator
from server.evidence import coordinator_evidence
from simulations.datasets import Dataset
from simulations.federation import assemble
from simulations.grid import InProcessGrid, run_in_process
from simulations.members import Federation

Federate = Callable[..., Federation]


def context(**config: Any) -> Context:
    """Give the context of a server with this run configuration."""
    return Context(1, 0, {}, RecordDict(), config)


def write_files(federation: Federation, folder: Path) -> dict[str, Any]:
    """Write what the server reads; return the run configuration that names it."""
    (folder / "contract.toml").write_text(contract_toml(federation.contract))
    write_members(federation.enrolled, folder / "members.toml")
    return {"contract": str(folder / "contract.toml"), "server": str(federation.server)}


def run_app(federation: Federation, config: dict[str, Any]) -> None:
    """Run the app as Flower would."""
    client_app = create_client_app(
        lambda context: federation.members[int(context.node_config["partition-id"])].worker
    )
    run_in_process(create_app(), client_app, len(federation.members), config)


class TestPaths:
    """Contract, bundle and the coordinator's own folder, from the run configuration."""

    def test_a_federation_has_everything_inside(self) -> None:
        """All beside each other."""
        found = _places(context(federation="/f", contract="", out="", server=""))
        assert found == (Path("/f/contract.toml"), Path("/f/bundle"), Path("/f/server"))

    def test_what_is_stated_wins(self) -> None:
        """A contract and folders of one's own."""
        found = _places(context(federation="/f", contract="/c/x.toml", out="/o", server="/s"))
        assert found == (Path("/c/x.toml"), Path("/o"), Path("/s"))

    def test_the_rest_lies_beside_a_contract_that_is_stated(self) -> None:
        """Whatever the federation is."""
        found = _places(context(federation="/f", contract="/c/x.toml"))
        assert found == (Path("/c/x.toml"), Path("/c/bundle"), Path("/c/server"))

    def test_naming_nothing_is_an_error_with_an_example(self) -> None:
        """The message shows what to type."""
        with pytest.raises(RunError, match="--run-config"):
            _places(context(federation="", out=""))


def test_a_run_prints_a_json_line_a_round_and_publishes(
    federate: Federate, contract: Contract, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Round, rounds, cohort and epsilon; then the bundle is there, and checks out."""
    federation = federate(contract, seed=None)
    run_app(federation, write_files(federation, tmp_path))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["round"], line["rounds"], line["cohort"]) for line in lines] == [
        (1, 2, 5),
        (2, 2, 5),
    ]
    assert lines[0]["epsilon"] < lines[1]["epsilon"] < contract.privacy.epsilon
    assert read_bundle(tmp_path / "bundle").contract == contract
    (run,) = (federation.server / "runs").iterdir()
    assert read_bundle(run / "bundle").contract == contract


def test_a_seeded_merchant_marks_a_deployed_bundle(
    federate: Federate, contract: Contract, tmp_path: Path
) -> None:
    """The server learns it from the merchants, not from its own configuration."""
    federation = federate(contract, seed=3)
    run_app(federation, write_files(federation, tmp_path))
    assert "not for release" in (tmp_path / "bundle" / "privacy.json").read_text()


def test_a_missing_contract_ends_the_run(
    federate: Federate, contract: Contract, tmp_path: Path
) -> None:
    """Before anybody is asked."""
    federation = federate(contract)
    with pytest.raises(ContractError, match="no such contract file"):
        run_app(federation, {"federation": str(tmp_path)})
    assert all(untouched(member.worker.ledger) for member in federation.members)


def untouched(ledger: Ledger) -> bool:
    """Tell whether nothing was written into a ledger since it was opened."""
    return len(ledger.entries()) == 1


def test_the_list_of_members_is_needed(
    federate: Federate, contract: Contract, tmp_path: Path
) -> None:
    """Without it nobody is asked, and the file is named; plain sums need the witness's key too."""
    federation = federate(contract)
    config = write_files(federation, tmp_path)
    (tmp_path / "members.toml").unlink()
    with pytest.raises(IdentityError, match=r"members\.toml: there is no list of members"):
        run_app(federation, config)
    assert all(untouched(member.worker.ledger) for member in federation.members)


@pytest.mark.parametrize("key", ["missing", "another"])
def test_the_pinned_coordinators_key_is_needed(
    federate: Federate, contract: Contract, tmp_path: Path, key: str
) -> None:
    """Nobody is asked by one that cannot countersign."""
    federation = federate(contract)
    config = write_files(federation, tmp_path)
    own = federation.server / "identity.key"
    own.unlink()
    if key == "another":
        write_identity(Identity.generate("coordinator"), own)
    with pytest.raises(HansaError, match=r"identity\.key: (there is no|is not the key of the)"):
        run_app(federation, config)
    assert all(untouched(member.worker.ledger) for member in federation.members)


def test_a_failed_run_publishes_nothing(
    federate: Federate, contract: Contract, tmp_path: Path
) -> None:
    """No bundle, not even a part of one."""
    federation = federate(contract, caps=dict.fromkeys(range(5), 0.1))
    with pytest.raises(RunError, match="0 of 5 merchants take part"):
        run_app(federation, write_files(federation, tmp_path))
    assert not list(tmp_path.glob("bundle*"))


class TestStart:
    """A contract that names parameters to start from."""

    @pytest.fixture
    def warm(self, contract: Contract) -> tuple[Contract, bytes]:
        """Give a contract and what it starts from."""
        content = to_bytes(np.linspace(-0.5, 0.5, network_of(contract).size))
        return starting_from(contract, content), content

    @pytest.fixture
    def made(
        self, dataset: Dataset, warm: tuple[Contract, bytes], tmp_path: Path
    ) -> tuple[Federation, dict[str, Any]]:
        """Give merchants, and the configuration that names the server's files."""
        dataset = replace(dataset, start=warm[1])
        federation = assemble(dataset, warm[0], tmp_path / "merchants", 7)
        return federation, write_files(federation, tmp_path)

    def test_the_run_starts_there(
        self, made: tuple[Federation, dict[str, Any]], warm: tuple[Contract, bytes], tmp_path: Path
    ) -> None:
        """The record says so, and keeps what the audit needs; the audit agrees."""
        federation, config = made
        (tmp_path / "contract.start").write_bytes(warm[1])
        run_app(federation, config)
        (run,) = (federation.server / "runs").iterdir()
        first = json.loads((run / "run.jsonl").read_text().splitlines()[0])
        assert first["parameters"] == warm[0].model.start
        assert (run / "contract.start").read_bytes() == warm[1]
        evidence = tmp_path / "server.zip"
        coordinator_evidence(open_archive(federation.server), federation.enrolled, evidence)
        audit = verify([evidence])
        assert [one.replayed for one in audit.runs] == [True]
        assert not [one for one in audit.findings if one.severity == "fail"]

    @pytest.mark.parametrize("content", [None, b"", b"swapped", "zeros", "nan"])
    def test_another_one_ends_the_run(
        self, made: tuple[Federation, dict[str, Any]], tmp_path: Path, content: bytes | str | None
    ) -> None:
        """An operator that swaps it after the contract was signed asks nobody anything."""
        federation, config = made
        size = 8 * network_of(federation.contract).size
        contents = {"zeros": bytes(size), "nan": to_bytes(np.full(size // 8, np.nan))}
        swapped = contents[content] if isinstance(content, str) else content
        if swapped is not None:
            (tmp_path / "contract.start").write_bytes(swapped)
        with pytest.raises(ContractError, match=r"contract\.start: "):
            run_app(federation, config)
        assert all(untouched(member.worker.ledger) for member in federation.members)
        assert not (federation.server / "runs").exists()

    def test_the_coordinator_trusts_no_caller(self, made: tuple[Federation, Any]) -> None:
        """It checks what it is given itself."""
        federation, _ = made
        grid = InProcessGrid(lambda _m, _c: None, 0, {})  # type: ignore[arg-type]
        archive, size = open_archive(federation.server), 8 * network_of(federation.contract).size
        for content in (None, bytes(size)):
            with pytest.raises(ContractError, match=r"model\.start"):
                Coordinator(
                    grid,
                    federation.contract,
                    lambda _report: None,
                    federation.enrolled,
                    archive,
                    start=content,
                )

    def test_what_the_contract_does_not_name_is_not_used(
        self, federate: Federate, contract: Contract, tmp_path: Path
    ) -> None:
        """A file beside a contract that says nothing of it changes nothing."""
        federation = federate(contract)
        config = write_files(federation, tmp_path)
        (tmp_path / "contract.start").write_bytes(b"nonsense")
        run_app(federation, config)
        (run,) = (federation.server / "runs").iterdir()
        assert not (run / "contract.start").exists()
