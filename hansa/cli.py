"""The `hansa` command: thin wrappers, heavy imports inside each command.

Exit codes: 0 done, 1 the run or check failed, 2 wrong use, 130 interrupted.
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from hansa.commands import audit as audit_commands
from hansa.commands import data as data_commands
from hansa.commands import merchant as merchant_commands
from hansa.commands import server as server_commands

app = typer.Typer(
    name="hansa",
    help="Merchants learn customer segments together; nobody sees another merchant's customer.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)
app.add_typer(data_commands.app, name="data")
app.add_typer(merchant_commands.app, name="merchant")
app.add_typer(server_commands.app, name="server")
app.add_typer(audit_commands.app, name="audit")

DataOption = Annotated[
    str,
    typer.Option(
        "--data",
        help="A built-in data set (`hansa data list`), or the folder of a federation as "
        "`hansa data generate` writes it.",
    ),
]
PartitionOption = Annotated[
    str | None, typer.Option("--partition", help="How customers are divided over merchants.")
]
LabelOption = Annotated[str | None, typer.Option("--label", help="What the segments say.")]
PresetOption = Annotated[
    str | None, typer.Option("--preset", help="Size of the synthetic data set.")
]
MerchantsOption = Annotated[
    int | None,
    typer.Option("--merchants", min=1, help="Number of merchants (cdnow and synthetic)."),
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Also write the result as JSON; - for the terminal.")
]
PlainOption = Annotated[
    bool,
    typer.Option(
        "--insecure-plain-sums",
        help="Sum without masks: the server sees each merchant's single noisy message.",
    ),
]
DataSeedOption = Annotated[
    int, typer.Option("--data-seed", min=0, help="Seed of generated or dealt customers.")
]


@app.command()
def simulate(  # noqa: PLR0913, PLR0917
    contract: Annotated[
        Path | None, typer.Argument(help="A contract file; default the data set's own.")
    ] = None,
    data: DataOption = "synthetic",
    partition: PartitionOption = None,
    label: LabelOption = None,
    preset: PresetOption = None,
    merchants: MerchantsOption = None,
    epsilon: Annotated[
        float | None, typer.Option("--epsilon", help="Epsilon of the whole run.")
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option(
            "--delta", help="Default: 1 / N^1.1, N the pooled training customers of a built-in set."
        ),
    ] = None,
    mode: Annotated[
        str | None, typer.Option("--mode", help="`distributed` or `local` noise.")
    ] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", min=1, help="Training rounds.")] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            min=0,
            help="Makes the run repeatable and its noise guessable: not for release.",
        ),
    ] = None,
    data_seed: DataSeedOption = 0,
    insecure_plain_sums: PlainOption = False,
    engine: Annotated[
        Literal["cohort", "process", "ray"],
        typer.Option(
            "--engine",
            help="`cohort`: all merchants of a stage in one computation. `process`: divided over "
            "processes. `ray`: in Flower's own engine, here or on the cluster at RAY_ADDRESS. All "
            "give the same result.",
        ),
    ] = "cohort",
    processes: Annotated[
        int,
        typer.Option(
            "--processes",
            min=0,
            help="For --engine process and ray; default one for each processor.",
        ),
    ] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the results; default out/<time>.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier simulation in --out.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Run a whole federation on this machine and write a report."""
    from hansa.commands.simulate import Choices, run

    run(
        Choices(
            contract, data, partition, label, preset, merchants, epsilon, delta, mode, rounds,
            seed, data_seed, insecure_plain_sums, engine, processes, out, overwrite, json,
        )
    )  # fmt: skip


@app.command()
def compare(  # noqa: PLR0913, PLR0917
    contract: Annotated[
        Path | None, typer.Argument(help="A contract file; default the data set's own.")
    ] = None,
    data: Annotated[
        str, typer.Option("--data", help="A built-in data set (`hansa data list`).")
    ] = "synthetic",
    partition: PartitionOption = None,
    label: LabelOption = None,
    preset: PresetOption = None,
    merchants: MerchantsOption = None,
    epsilon: Annotated[
        list[float] | None,
        typer.Option("--epsilon", help="Epsilon of the private methods; may be repeated."),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Number of splits.")] = 5,
    data_seed: DataSeedOption = 0,
    insecure_plain_sums: PlainOption = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for comparison.html and .png.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Compare private and open, alone, federated and pooled training: one table, one picture."""
    from hansa.commands.compare import Choices, run

    run(
        Choices(
            contract, data, partition, label, preset, merchants, tuple(epsilon or (1.0,)), seeds,
            data_seed, insecure_plain_sums, out, json,
        )
    )  # fmt: skip


@app.command()
def sweep(  # noqa: PLR0913, PLR0917
    contract: Annotated[
        Path | None, typer.Argument(help="A contract file; default the data set's own.")
    ] = None,
    data: Annotated[
        str, typer.Option("--data", help="A built-in data set (`hansa data list`).")
    ] = "synthetic",
    partition: PartitionOption = None,
    label: LabelOption = None,
    preset: PresetOption = None,
    epsilon: Annotated[
        list[str] | None,
        typer.Option("--epsilon", help="Axis: epsilons of a run, as 0.5,1,2; default 0.5,1,2,4."),
    ] = None,
    clip_norm: Annotated[
        list[str] | None,
        typer.Option("--clip-norm", help="Axis: clip norms; default the contract's."),
    ] = None,
    merchants: Annotated[
        list[str] | None,
        typer.Option("--merchants", help="Axis: numbers of merchants (cdnow and synthetic)."),
    ] = None,
    sampling_rate: Annotated[
        list[str] | None,
        typer.Option(
            "--sampling-rate",
            help="Axis: sampling rates; below 1 with `--mode local` only; default the contract's.",
        ),
    ] = None,
    seeds: Annotated[
        int,
        typer.Option(
            "--seeds", min=1, max=1000, help="Runs of each cell, each with a split of its own."
        ),
    ] = 3,
    delta: Annotated[
        float | None,
        typer.Option("--delta", help="Default: 1 / N^1.1, N the pooled training customers."),
    ] = None,
    mode: Annotated[
        str | None, typer.Option("--mode", help="`distributed` or `local` noise.")
    ] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", min=1, help="Training rounds.")] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            min=0,
            help="Noise of the first runs is drawn from this seed, of the next from the next: "
            "repeatable and guessable, not for release.",
        ),
    ] = None,
    data_seed: DataSeedOption = 0,
    insecure_plain_sums: PlainOption = False,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, help="Runs at a time; default one a core."),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", help="Folder for the results; goes on with what is there.")
    ] = Path("out/sweep"),
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the folder of every run, ledgers included.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Simulate a grid of epsilon, clip norm, merchants and sampling rate; resumable."""
    from hansa.commands.sweep import Choices, run

    run(
        Choices(
            contract, data, partition, label, preset, merchants or (), epsilon or (),
            clip_norm or (), sampling_rate or (), delta, mode, rounds, seeds, seed, data_seed,
            insecure_plain_sums, workers, out, keep, json,
        )
    )  # fmt: skip


@app.command()
def contract(
    path: Annotated[Path, typer.Argument(help="The contract file.")],
) -> None:
    """Check a contract; show its hash, what a run would release and what that costs."""
    from hansa.commands.contract import run

    run(path)


@app.command()
def pretrain(
    path: Annotated[Path, typer.Argument(help="The contract file.")],
    out: Annotated[
        Path, typer.Option("--out", help="Folder for contract.toml and contract.start.")
    ],
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of generated customers.")] = 0,
) -> None:
    """Train a start on generated customers, which costs no privacy; write the contract for it."""
    from hansa.commands.pretrain import run

    run(path, out, seed)


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    typer.echo(installed("hansa"))


def main() -> None:
    """Run the command and turn errors that a person can put right into one clear message."""
    from common.errors import AccountingError, BundleError, HansaError, RunError

    try:
        app()
    except (RunError, AccountingError, BundleError) as error:
        typer.echo(f"hansa: {error}", err=True)
        sys.exit(1)
    except HansaError as error:
        typer.echo(f"hansa: {error}", err=True)
        sys.exit(2)
    except SystemExit as ending:
        if ending.code == 130:  # what Typer makes of Ctrl-C, without a word
            typer.echo("hansa: interrupted", err=True)
        raise


if __name__ == "__main__":
    main()
