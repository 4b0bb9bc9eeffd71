"""`hansa merchant`: what a merchant does with its own customers, on its own machine."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from clients.table import CustomerBatch

app = typer.Typer(
    help="Enrol and take part; check your table, see your budget, assign your customers.",
    no_args_is_help=True,
)


def _file(given: Path | None) -> Path | None:
    """Return the merchant.toml of a folder."""
    return given / "merchant.toml" if given is not None and given.is_dir() else given


def _told(batches: Iterable["CustomerBatch"]) -> Iterator["CustomerBatch"]:
    """Say on a terminal how many customers were assigned, while it goes on."""
    rows, seen = 0, sys.stderr.isatty()
    try:
        for batch in batches:
            yield batch
            rows += len(batch.customer_ids)
            if seen:
                typer.echo(f"\r{rows:,} customers", nl=False, err=True)
    finally:
        if seen and rows:
            typer.echo(err=True)


FileArgument = Annotated[
    Path,
    typer.Argument(metavar="MERCHANT", callback=_file, help="Your folder, or your merchant.toml."),
]
FolderArgument = Annotated[Path, typer.Argument(help="Your folder, with merchant.toml.")]
FoldersArgument = Annotated[
    list[Path], typer.Argument(metavar="FOLDER...", help="Your folder, with merchant.toml.")
]
PictureOption = Annotated[
    Path | None, typer.Option(help="Draw it: a name that ends in .png, .svg or .html.")
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Also write it as JSON; - for the terminal.")
]


@app.command()
def init(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER...", help="Your folder; made where there is none."),
    ],
    id: Annotated[
        str | None, typer.Option("--id", help="Your id; default the folder's name.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Your table, .csv or .parquet.")] = None,
    epsilon: Annotated[
        float, typer.Option(help="The most that you spend on a customer's privacy, over all runs.")
    ] = 1.0,
    delta: Annotated[
        float, typer.Option(help="The delta of that cap; well below 1 / customers.")
    ] = 1e-5,
) -> None:
    """Make your keys, which never leave the folder, and a merchant.toml to fill in.

    Keys and a merchant.toml that are there are never overwritten.
    """
    from hansa.commands.enrolment import NewMerchant, merchant_init

    merchant_init(NewMerchant(tuple(folders), id, data, epsilon, delta))


@app.command()
def enrol(
    tokens: Annotated[
        list[str],
        typer.Argument(metavar="TOKEN...", help="The operator's token, or a file that holds it."),
    ],
    folder: Annotated[
        Path | None, typer.Option(help="Your folder; default the one called like your id, here.")
    ] = None,
    inside: Annotated[
        Path | None, typer.Option("--in", help="Where the folder called like your id is.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Join a federation with a one-time token; pin its operator, contract and members.

    Compare the fingerprints that it shows with what the operator told you by another way.
    """
    from hansa.commands.enrolment import merchant_enrol

    merchant_enrol(tuple(tokens), folder, inside, yes=yes)


@app.command()
def members(
    folder: FolderArgument,
    accept: Annotated[bool, typer.Option("--accept", help="Pin the operator's list.")] = False,
) -> None:
    """Compare the operator's list of members with the one that you pinned."""
    from hansa.commands.enrolment import merchant_members

    merchant_members(folder, accept=accept)


@app.command()
def rotate(
    folder: FolderArgument,
    identity: Annotated[
        bool,
        typer.Option("--identity", help="Your identity key instead; your ledger goes on."),
    ] = False,
) -> None:
    """Replace your node's key, with which your machine logs in, or your identity key."""
    if identity:
        from hansa.commands.rotation import merchant_identity

        merchant_identity(folder)
        return
    from hansa.commands.enrolment import merchant_rotate

    merchant_rotate(folder)


@app.command()
def join(
    folders: FoldersArgument,
    background: Annotated[
        bool, typer.Option("--background", help="Return when it runs; default: stay.")
    ] = False,
    accept_members: Annotated[
        bool,
        typer.Option("--accept-members", help="Pin the operator's list of members as it is now."),
    ] = False,
    rehearsal: Annotated[
        bool,
        typer.Option("--rehearsal", help="Accept a seed in merchant.toml: no protection at all."),
    ] = False,
) -> None:
    """Take part in runs from now on, until `leave`."""
    from hansa.commands import taking_part

    taking_part.join(tuple(folders), background, accept_members, rehearsal)


@app.command()
def leave(folders: FoldersArgument) -> None:
    """Stop taking part: end what `join --background` started."""
    from hansa.commands import taking_part

    taking_part.leave(tuple(folders))


@app.command()
def check(
    merchant: Annotated[Path, typer.Argument(help="Your folder, or your merchant.toml.")],
    contract: Annotated[
        Path | None,
        typer.Option(help="The federation's contract; default the one that you pinned."),
    ] = None,
) -> None:
    """Try everything that a run needs, and say what to do about each finding.

    Your table is read as a run would read it; nothing about it is sent. Where you are enrolled,
    the way to the operator is tried too. Exit code 1 where anything would stop a run.
    """
    from hansa.commands.check import run

    run(merchant, contract)


@app.command()
def assign(
    bundle: Annotated[Path, typer.Argument(help="The published bundle.")],
    merchant_file: FileArgument,
    out: Annotated[Path, typer.Option(help="Folder for assignments.parquet and .csv.")],
) -> None:
    """Assign your customers to segments with a published model. Nothing is sent.

    The model must be signed by the coordinator that you pinned. Rows are read, assigned and written
    a batch at a time, so that memory does not grow with their number; transactions are added up
    first, in memory. Where a row is refused, older assignments stay as they were.
    """
    from clients.assignment import check_signer, write_assignments
    from clients.batches import read_batches
    from clients.merchant import read_merchant
    from common.bundle import read_bundle

    published = read_bundle(bundle)
    if not check_signer(published, merchant_file.absolute().parent):
        typer.echo(
            f"{bundle}: signed by {published.signer.hex()[:16]}…; you pinned no coordinator, so "
            "whose key that is was not checked",
            err=True,
        )
    merchant = read_merchant(merchant_file)
    with closing(read_batches(merchant, published.contract)) as batches:
        rows = write_assignments(published, _told(batches), out)
    typer.echo(f"{rows:,} customers assigned, in {out}")


@app.command()
def plan(
    contract: Annotated[Path, typer.Argument(help="The contract that you may join.")],
    merchant: Annotated[
        Path | None,
        typer.Option(
            callback=_file,
            help="Your folder, or your merchant.toml, to see what is left of your cap.",
        ),
    ] = None,
    customers: Annotated[
        int | None, typer.Option(min=1, help="Customers with a segment that you have.")
    ] = None,
    merchants: Annotated[
        int | None,
        typer.Option(min=1, help="Merchants like you; default the contract's min_merchants."),
    ] = None,
    picture: PictureOption = None,
    json: JsonOption = None,
) -> None:
    """Before joining: what a run costs, round by round, and what quality to expect.

    Nothing is sent, and no customer is read.
    """
    from hansa.commands.plan import Choices, run

    run(Choices(contract, merchant, customers, merchants, picture, json))


@app.command()
def budget(
    merchant_file: FileArgument,
    contract: Annotated[
        Path | None,
        typer.Option(help="See how often it fits; default the contract that you pinned."),
    ] = None,
    picture: PictureOption = None,
    json: JsonOption = None,
) -> None:
    """What you spent, by run and by purpose, what is left, and what still fits.

    Only your own ledger is read; nothing is written or sent.
    """
    from hansa.commands.budget import run

    run(merchant_file, contract, picture, json)


@app.command()
def settle(
    merchant_file: FileArgument,
    run: Annotated[str, typer.Argument(help="The run, as `hansa merchant budget` names it.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Close a run that broke off: what it reserved and never released is free again.

    Every release is an entry of the ledger before it is computed, so nothing can have left that
    is not there; after this the run releases nothing more.
    """
    from hansa.commands.settle import run as close_run

    close_run(merchant_file, run, yes=yes)


@app.command()
def evidence(
    merchant_file: FileArgument,
    out: Annotated[Path, typer.Option(help="A name that ends in .zip, or a new folder.")],
    contract: Annotated[
        list[Path] | None,
        typer.Option(help="An earlier contract that the ledger speaks of; may be repeated."),
    ] = None,
) -> None:
    """Write your evidence for an audit: ledger, countersignatures, contracts, caps; signed.

    No customer, no private key and no path is in it.
    """
    from clients.evidence import open_books, write_books

    books, identity = open_books(merchant_file, tuple(contract or ()))
    write_books(books, identity, out)
    typer.echo(f"{out}: {len(books.ledger.entries):,} entries of the ledger of {identity.merchant}")
    for missing in sorted(books.missing):
        typer.echo(
            f"contract {missing[:16]} is not in it: the ledger speaks of it; add it with "
            "--contract, or an auditor cannot check its releases"
        )
    typer.echo(f"next: hansa audit verify {out}")


@app.command()
def head(merchant_file: FileArgument) -> None:
    """Print the anchor of your ledger: one line that commits you to everything in it.

    Leave it with somebody else, and no entry can vanish unseen: `hansa audit verify --anchor`.
    """
    from clients.evidence import head_line, stored_ledger
    from clients.merchant import read_merchant
    from common.identity import read_identity

    merchant = read_merchant(merchant_file)
    identity = read_identity(merchant.merchant.id, merchant.merchant.key)
    typer.echo(head_line(identity, stored_ledger(merchant, identity).entries))
