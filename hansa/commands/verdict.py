"""What `hansa server run` and `resume` say at the end of a run: the run's own verdict."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from server.following import Ending


def tell_ending(folder: Path, run: str, ending: "Ending") -> None:
    """Say how a run ended; exit code 1 unless it finished."""
    from server.runs import RunState

    if ending.row is not None and ending.state == RunState.FINISHED:
        typer.echo(f"run {run}: finished; bundle {ending.row.bundle}")
        for line in _privacy_lines(Path(ending.row.bundle)):
            typer.echo(line)
        return
    go_on = f"hansa server resume {folder} {run}"
    if ending.row is not None and ending.state is not None:
        typer.echo(f"run {run}: {ending.state.value}: {ending.row.reason}", err=True)
        typer.echo(f"what was reached is kept; go on with: {go_on}", err=True)
    elif ending.row is not None:
        typer.echo(
            f"run {run}: the coordinator ended unexpectedly; continue with: {go_on}", err=True
        )
    else:
        typer.echo(
            f"run {run}: its coordinator ended before it began; why is in {folder / 'logs'} and in "
            "Flower's own log of the run",
            err=True,
        )
    raise typer.Exit(1)


def _privacy_lines(bundle: Path) -> list[str]:
    """Return what the published privacy statement says, in short."""
    import json

    from common.errors import BundleError
    from common.statements import epsilon_text

    path = bundle / "privacy.json"
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        epsilon, delta = float(told["epsilon"]), float(told["delta"])
        return [
            f"privacy: epsilon {epsilon_text(epsilon)} at delta {delta:.3g}, for "
            f"{told['unit_of_privacy']}",
            *(f"  {note}" for note in told["notes"]),
        ]
    except (OSError, ValueError, KeyError, TypeError):
        raise BundleError(f"{path}: cannot be read; is the bundle whole?") from None
