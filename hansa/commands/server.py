"""`hansa server`: what the coordinator does beside the runs."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Make a coordinator's key, and its evidence.", no_args_is_help=True)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="The federation's folder.")],
) -> None:
    """Make the coordinator's key in FOLDER/server and print what merchants pin.

    A key that is there already is never replaced.
    """
    from server.archive import make_archive

    identity = make_archive(folder / "server")
    typer.echo(f"{folder / 'server'}: made, with a private key that must stay there")
    typer.echo("every merchant adds these lines to its members.toml:\n")
    typer.echo(f'[witness]\nkey = "{identity.public.hex()}"')


@app.command()
def evidence(
    folder: Annotated[
        Path, typer.Argument(help="The federation's folder, with server/ and members.toml.")
    ],
    out: Annotated[Path, typer.Option(help="A name that ends in .zip, or a new folder.")],
) -> None:
    """Write the coordinator's evidence for an audit: runs, bundles, witnessed heads; signed."""
    from server.evidence import federation_evidence
    from simulations.wording import counted

    files = federation_evidence(folder, out)
    runs = sum(name.endswith("/run.jsonl") for name in files)
    heads = files["witness.jsonl"].count(b"\n")
    typer.echo(f"{out}: {counted(runs, 'run')}, {counted(heads, 'head')} of merchants' ledgers")
    typer.echo(f"next: hansa audit verify {out} and the merchants' own evidence")
