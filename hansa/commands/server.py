"""`hansa server`: what the operator of a federation does."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Make a federation, invite merchants, run it; the coordinator's evidence.",
    no_args_is_help=True,
)

FolderArgument = Annotated[
    Path, typer.Argument(help="The federation's folder, as `hansa server init` made it.")
]


@app.command()
def init(  # noqa: PLR0913, PLR0917
    folder: Annotated[Path, typer.Argument(help="The federation's folder; made here.")],
    contract: Annotated[
        Path | None,
        typer.Option(help="The contract; default the contract.toml that is in the folder."),
    ] = None,
    host: Annotated[
        list[str] | None,
        typer.Option(
            help="Name or address by which merchants reach this machine, default 127.0.0.1. "
            "Repeated: further names in its certificate."
        ),
    ] = None,
    bind: Annotated[
        str | None,
        typer.Option(
            help="Address that the gateway listens at; default 127.0.0.1 if --host is this "
            "machine alone, else 0.0.0.0 (everywhere)."
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port of the gateway, the only one seen outside.")
    ] = 8443,
    superlink_port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port of Flower's SuperLink, on 127.0.0.1.")
    ] = 8444,
    metrics_port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port of metrics and health, on 127.0.0.1.")
    ] = 8445,
    database: Annotated[
        str | None,
        typer.Option(
            help="SQLAlchemy URL of the run store, such as PostgreSQL's; default "
            "runs.sqlite in the folder."
        ),
    ] = None,
) -> None:
    """Make a federation: certificate authority, identity, signed contract, configuration.

    Nothing that is there is overwritten; an identity key that is there is kept.
    """
    from hansa.commands.federation import NewServer, server_init

    server_init(
        NewServer(
            folder, contract, tuple(host or ()), bind, port, superlink_port, metrics_port, database
        )
    )


@app.command()
def invite(
    folder: FolderArgument,
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Ids of merchants.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Write NAME.token files here, not to the screen."),
    ] = None,
    hours: Annotated[float, typer.Option(min=0.1, max=8760, help="How long a token is good.")] = 72,
) -> None:
    """Make a one-time token for each merchant; give it to that merchant and to nobody else."""
    from hansa.commands.federation import server_invite

    server_invite(folder, tuple(names), out, hours)


@app.command()
def members(folder: FolderArgument) -> None:
    """Who is enrolled, with which keys, since when; who was invited or revoked."""
    from hansa.commands.federation import server_members

    server_members(folder)


@app.command()
def revoke(
    folder: FolderArgument,
    name: Annotated[str, typer.Argument(help="Id of the merchant.")],
) -> None:
    """Take a merchant off the list; its node is refused from now on."""
    from hansa.commands.federation import server_revoke

    server_revoke(folder, name)


@app.command()
def rotate(
    folder: FolderArgument,
    tls: Annotated[
        bool, typer.Option("--tls", help="A new server certificate; merchants notice nothing.")
    ] = False,
    ca: Annotated[
        bool,
        typer.Option(
            "--ca",
            help="A new certificate authority: the first call announces it, the second switches.",
        ),
    ] = False,
    identity: Annotated[
        bool,
        typer.Option(
            "--identity",
            help="A new identity key, where members were listed by hand and nobody enrolled.",
        ),
    ] = False,
    anyway: Annotated[
        bool,
        typer.Option("--anyway", help="Switch though some merchants did not hear of it yet."),
    ] = False,
) -> None:
    """Replace the server's certificate, its certificate authority, or the identity key."""
    from hansa.commands.federation import server_rotate

    server_rotate(folder, tls=tls, ca=ca, identity=identity, anyway=anyway)


@app.command()
def start(
    folder: FolderArgument,
    background: Annotated[
        bool, typer.Option("--background", help="Return when it runs; default: stay.")
    ] = False,
) -> None:
    """Start gateway, SuperLink and coordinator, and keep them running."""
    from hansa.commands import operate

    operate.start(folder, background)


@app.command()
def stop(folder: FolderArgument) -> None:
    """Stop what `hansa server start` started; a run that goes on can be resumed."""
    from hansa.commands import operate

    operate.stop(folder)


@app.command()
def run(
    folder: FolderArgument,
    wait: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds to wait for enough merchants, then give up."),
    ] = None,
) -> None:
    """Start a run, follow it, and end with its own verdict."""
    from hansa.commands import operate

    operate.run(folder, wait)


@app.command()
def status(
    folder: FolderArgument,
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew until interrupted.")] = False,
    json: Annotated[
        Path | None,
        typer.Option("--json", help="Also write it as JSON; - for the terminal."),
    ] = None,
) -> None:
    """What runs, who takes part, round, epsilon, last error."""
    from hansa.commands import operate

    operate.status(folder, watch, json)


@app.command()
def resume(
    folder: FolderArgument,
    run: Annotated[
        str | None, typer.Argument(help="The run, as `status` names it; default the last one.")
    ] = None,
) -> None:
    """Go on with a run that broke off, from its last checkpoint."""
    from hansa.commands import operate

    operate.resume(folder, run)


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
