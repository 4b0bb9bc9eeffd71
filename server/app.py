"""The Flower ServerApp: reads the contract, runs the coordinator, publishes the bundle.

Run configuration: `contract` (path of the contract file) or `federation` (a folder that holds
`contract.toml`), `out` (folder of the bundle; default `bundle` beside the contract) and `server`
(the coordinator's own folder; default `server` beside the contract). The list of enrolled
members, `members.toml`, lies beside the contract. Nothing in either can change what a merchant
spends, or whom it is summed with.
"""

import json
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.contract import Contract, read_contract
from common.errors import RunError
from common.identity import read_members
from server.archive import Archive, open_archive
from server.coordinator import Coordinator, Outcome, RoundReport


def print_round(report: RoundReport) -> None:
    """Print one JSON line for a round; Flower keeps what a ServerApp prints as its log."""
    line = {"round": report.round, "rounds": report.rounds, "cohort": report.cohort}
    print(json.dumps({**line, "epsilon": round(report.epsilon, 6)}), flush=True)


def publish_outcome(outcome: Outcome, contract: Contract, folder: Path, archive: Archive) -> None:
    """Publish, signed by the coordinator, and keep a copy."""
    from server.publishing import publish

    publish(outcome, contract, folder, archive.identity.key)
    archive.keep_bundle(outcome.run, folder)


def create_app(
    on_round: Callable[[RoundReport], None] = print_round,
    on_outcome: Callable[[Outcome, Contract, Path, Archive], None] = publish_outcome,
) -> ServerApp:
    """Return a ServerApp that reports each round and hands over the outcome."""
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        contract_path, folder, own = _paths(context)
        contract = read_contract(contract_path)
        members = read_members(contract_path.parent / "members.toml")
        archive = open_archive(own)
        outcome = Coordinator(grid, contract, on_round, members, archive).run()
        on_outcome(outcome, contract, folder, archive)

    return server_app


def _paths(context: Context) -> tuple[Path, Path, Path]:
    """Return the contract, the bundle's folder and the coordinator's own folder."""
    config = context.run_config
    federation, stated = str(config.get("federation", "")), str(config.get("contract", ""))
    if not federation and not stated:
        raise RunError(
            "the run configuration names no contract; give one, for example: "
            "flwr run . --run-config 'federation=\"/path/of/the/federation\"'"
        )
    contract_path = Path(stated) if stated else Path(federation) / "contract.toml"
    out, own = str(config.get("out", "")), str(config.get("server", ""))
    beside = contract_path.parent
    return (
        contract_path,
        Path(out) if out else beside / "bundle",
        Path(own) if own else beside / "server",
    )


app = create_app()
