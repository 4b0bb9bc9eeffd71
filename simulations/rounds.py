"""A federation in one process -> the outcome of a run's rounds, carried out through Flower."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict
from flwr.serverapp import ServerApp

from clients.app import create_app as create_client_app
from clients.worker import Worker
from common.contract import Contract, contract_toml
from common.identity import write_members
from common.start import START
from server.app import create_app as create_server_app
from server.archive import Archive
from server.outcome import Outcome, RoundReport
from simulations.engines import COHORT, Computing, running
from simulations.grid import Fault, run_in_process
from simulations.members import SESSION, Federation

_ALLOCATIONS = 20_000  # between two looks at the youngest objects; Python's own figure is 700


def run_rounds(
    federation: Federation,
    out: Path,
    on_round: Callable[[RoundReport], None],
    fault: Fault | None = None,
    computing: Computing = COHORT,
) -> Outcome:
    """Carry out the contract through Flower, publish nothing.

    Raises:
        RunError: Too few merchants take part or answer.
        ValueError: Faults are for engines whose messages this process carries.
    """
    if fault is not None and computing.engine == "ray":
        raise ValueError("expected no fault with the engine ray, whose messages Flower carries")
    outcomes: list[Outcome] = []
    (out / "contract.toml").write_text(contract_toml(federation.contract), encoding="utf-8")
    if federation.start is not None:
        (out / START).write_bytes(federation.start)
    write_members(federation.enrolled, out / "members.toml")

    def finish(outcome: Outcome, _contract: Contract, _folder: Path, _archive: Archive) -> None:
        outcomes.append(outcome)

    def worker_of(context: Context) -> Worker:
        return federation.members[int(context.node_config["partition-id"])].worker

    server_app = create_server_app(on_round, finish)
    run_config = {
        "contract": str(out / "contract.toml"),
        "out": str(out / "bundle"),
        "server": str(federation.server),
        "durable": federation.durable,
    }
    if computing.engine == "ray":
        _run_in_ray(federation, server_app, run_config, computing.processes)
        return outcomes[0]
    workers = [member.worker for member in federation.members]
    with _seldom_collected(), running(computing.engine, workers, computing.processes) as answers:

        def together(
            kind: str, asked: list[tuple[Context, RecordDict]]
        ) -> list[Callable[[], RecordDict]]:
            merchants = [int(context.node_config["partition-id"]) for context, _ in asked]
            contents = [content for _, content in asked]
            return answers(kind, list(zip(merchants, contents, strict=True)))

        run_in_process(
            server_app,
            create_client_app(worker_of),
            len(federation.members),
            run_config,
            fault,
            together,
        )
    return outcomes[0]


@contextmanager
def _seldom_collected() -> Iterator[None]:
    """Look for unreachable cycles less often; processes that are started meanwhile do so too.

    Messages make next to none of them, and Python would look through all of a federation again
    and again, for 5 to 7 % of a run.
    """
    before = gc.get_threshold()
    if 0 < before[0] < _ALLOCATIONS:  # 0: the caller wants no collection at all
        gc.set_threshold(_ALLOCATIONS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _run_in_ray(
    federation: Federation, server_app: ServerApp, run_config: dict[str, Any], processes: int
) -> None:
    """Run in Flower's own engine; sessions of merchants that were made are not left behind."""
    from simulations.ray_engine import run_in_ray

    for member in federation.members:
        member.worker.ledger.close()
    try:
        run_in_ray(
            server_app, [member.elsewhere for member in federation.members], run_config, processes
        )
    finally:
        if not federation.durable:
            for member in federation.members:
                for path in member.worker.ledger.path.parent.glob(f"*{SESSION}*"):
                    path.unlink()
