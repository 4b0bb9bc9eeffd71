"""The Flower ServerApp: reads the contract, runs the coordinator, publishes the bundle.

Run configuration: `contract` (path of the contract file) or `federation` (a folder that holds
`contract.toml`), `out` (folder of the bundle; default `bundle` beside the contract) and `server`
(the coordinator's own folder; default `server` beside the contract). The list of enrolled
members, `members.toml`, lies beside the contract, and so does what it starts from
(`common.start`). Nothing in either can change what a merchant
spends, or whom it is summed with. A simulation that made its merchants sets `durable` to false:
then neither they nor the coordinator wait for the disk.

A deployed run has `store` (URL of the run store), `run` (its name) and `wait` (seconds to wait
for merchants) too: it is checkpointed, and a second process with the same name takes it up.
"""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.contract import Contract, read_contract
from common.errors import HansaError, RunError
from common.identity import read_members
from common.start import read_start
from server.archive import Archive, open_archive
from server.circumstances import Circumstances, Stopped, go_on
from server.coordinator import Coordinator
from server.outcome import Outcome, RoundReport

if TYPE_CHECKING:
    from server.runs import RunLease

logger = logging.getLogger("hansa.coordinator")

_RESEND_S = 10.0
_WAIT_S = 300.0  # for merchants, where nobody says otherwise


def print_round(report: RoundReport) -> None:
    """Print one JSON line for a round; Flower keeps what a ServerApp prints as its log."""
    line = {"round": report.round, "rounds": report.rounds, "cohort": report.cohort}
    print(json.dumps({**line, "epsilon": round(report.epsilon, 6)}), flush=True)


def publish_outcome(outcome: Outcome, contract: Contract, folder: Path, archive: Archive) -> None:
    """Publish, signed by the coordinator, and keep a copy."""
    from server.publishing import publish

    publish(outcome, contract, folder, archive.identity.key)
    archive.keep_bundle(outcome.run, folder)


OnOutcome = Callable[[Outcome, Contract, Path, Archive], None]


def create_app(
    on_round: Callable[[RoundReport], None] = print_round,
    on_outcome: OnOutcome = publish_outcome,
) -> ServerApp:
    """Return a ServerApp that reports each round and hands over the outcome."""
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        places = _places(context)
        if context.run_config.get("store"):
            _deployed(grid, context, places, on_round, on_outcome)
        else:
            durable = bool(context.run_config.get("durable", True))
            _simulated(grid, places, on_round, on_outcome, durable=durable)

    return server_app


class _Places(NamedTuple):
    contract: Path
    out: Path
    own: Path


def _simulated(
    grid: Grid,
    places: _Places,
    on_round: Callable[[RoundReport], None],
    on_outcome: OnOutcome,
    *,
    durable: bool,
) -> None:
    contract = read_contract(places.contract)
    members = read_members(places.contract.parent / "members.toml")
    archive = open_archive(places.own, durable=durable)
    start = read_start(places.contract, contract)
    outcome = Coordinator(grid, contract, on_round, members, archive, start=start).run()
    on_outcome(outcome, contract, places.out, archive)


def _deployed(
    grid: Grid,
    context: Context,
    places: _Places,
    on_round: Callable[[RoundReport], None],
    on_outcome: OnOutcome,
) -> None:
    """Run with checkpoints; how it ends is in the run store, whatever Flower says."""
    from common.logs import set_up
    from server.keeping import LeaseKeeper, registered
    from server.patient_grid import PatientGrid

    set_up("coordinator", places.contract.parent / "logs" / "coordinator.jsonl")
    contract = read_contract(places.contract)
    config = context.run_config
    with _lease(config, contract, context.run_id) as lease:
        members = read_members(places.contract.parent / "members.toml")
        archive = open_archive(places.own)
        keeper = LeaseKeeper(lease, contract.training.rounds)
        circumstances = Circumstances(
            keeper,
            registered(places.contract.parent),
            float(config.get("wait", _WAIT_S)),
            _RESEND_S,
        )
        patient = PatientGrid(grid, partial(go_on, keeper))
        start = read_start(places.contract, contract)
        outcome = Coordinator(
            patient, contract, on_round, members, archive, circumstances, start
        ).run()
        bundle = places.out / outcome.run
        on_outcome(outcome, contract, bundle, archive)
        lease.finish(str(bundle))


@contextmanager
def _lease(config: dict[str, Any], contract: Contract, flower_run: int) -> Iterator["RunLease"]:
    """Give the right to carry on a run; note in the store how it ends.

    Raises:
        RunError: Another process carries it on.
    """
    from server.runs import RunStore

    store, run = RunStore(str(config["store"])), str(config["run"])
    if any(row.run == run for row in store.rows()):
        lease = store.resume(run, str(flower_run))
    else:
        lease = store.begin(run, contract.sha256, contract.training.rounds, str(flower_run))
    about = {"run": run}
    try:
        yield lease
        logger.info("finished", extra=about)
    except Stopped as reason:
        logger.info("stopped: %s", reason, extra=about)
        lease.stop(str(reason))
        raise
    except HansaError as reason:
        logger.error("failed: %s", reason, extra=about)  # noqa: TRY400 - our own words say it all
        lease.fail(str(reason))
        raise
    except Exception as error:
        logger.exception("failed", extra=about)
        lease.fail(f"the coordinator failed ({type(error).__name__}: {error})")
        raise


def _places(context: Context) -> _Places:
    """Return the contract, the bundle's folder and the coordinator's own folder."""
    config = context.run_config
    federation, stated = str(config.get("federation", "")), str(config.get("contract", ""))
    if not federation and not stated:
        raise RunError(
            "the run configuration names no contract; give one, for example: "
            "flwr run . --run-config 'federation=\"/path/of/the/federation\"'"
        )
    contract = Path(stated) if stated else Path(federation) / "contract.toml"
    out, own = str(config.get("out", "")), str(config.get("server", ""))
    beside = contract.parent
    default = "bundles" if config.get("store") else "bundle"
    return _Places(
        contract,
        Path(out) if out else beside / default,
        Path(own) if own else beside / "server",
    )


app = create_app()
