"""The closing words of a simulation and a comparison, for the terminal.

Names are shown as text, never as rich's markup, and without control characters.
"""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from common.statements import epsilon_text
from simulations.result import Comparison, ComparisonRow, MerchantRecord, SimulationResult
from simulations.wording import (
    NOTHING,
    assurance,
    cautions,
    collusion,
    comparison_caution,
    counted,
    duration,
    headline,
    method_name,
    number,
    percent,
    plain,
    spread_text,
    verdict,
)

MAX_MERCHANTS = 25
ENDS = 5  # merchants shown of the smallest, and of the largest, where there are too many
MAX_REFUSED = 10


def merchants_table(result: SimulationResult) -> Table:
    """List the merchants; of many the smallest, the largest and those that refused."""
    shown = _shown(result.merchants)
    table = Table(title="Merchants", title_justify="left", title_style="bold")
    table.add_column("Merchant", overflow="fold", min_width=11, max_width=32)
    headings = ["Customers", "Epsilon", "Delta"]
    if not result.secure:
        headings = ["Customers", "Epsilon", "Towards server", "Delta", "Noisy accuracy"]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    if any(merchant.refused is not None for merchant in shown):
        table.add_column("Refused because", overflow="fold")
    for merchant in shown:
        table.add_row(*_merchant_cells(merchant, result)[: len(table.columns)])
    hidden = len(result.merchants) - len(shown)
    caption = "Customer counts are known to this simulator only; they never travel."
    if result.secure:
        caption += " Do not release this table."
    else:
        caption += (
            " A merchant's noisy\naccuracy is covered by its epsilon towards the server only: "
            "do not release this table."
        )
    if hidden:
        caption = (
            f"{counted(hidden, 'more merchant')} not shown; the report has all "
            f"{len(result.merchants):,}.\n{caption}"
        )
    table.caption, table.caption_justify = caption, "left"
    return table


def summary_lines(result: SimulationResult) -> list[Text]:
    """Sum up a run: cautions first, the gravest in red, then the figures and the notes."""
    lines = [Text(f"{plain(headline(result))}", style="bold")]
    for caution in cautions(result):
        style = "bold red" if caution.grave else "yellow"
        lines.append(Text(f"{caution.title}. {caution.text}", style=style))
    if told := assurance(result):
        lines.append(Text(told))
    lines.extend(Text(plain(note), style="yellow") for note in result.notes)
    refused = sum(merchant.refused is not None for merchant in result.merchants)
    metrics = result.metrics
    towards = "whoever sees sums"
    server = f"{epsilon_text(result.epsilon_server)} towards the server, "
    if result.secure:
        towards, server = f"{towards}, the server included", ""
    figures = [
        (
            "Epsilon",
            f"{epsilon_text(result.epsilon)} towards {towards} "
            f"(recomputed {epsilon_text(result.epsilon_recomputed)} by dp-accounting, at most "
            f"{epsilon_text(result.epsilon_opacus)} by Opacus), "
            f"{server}delta {number(result.delta)}",
        ),
        ("Colluders", collusion(result)),
        (
            "Quality",
            f"noisy accuracy {percent(metrics.get('accuracy'), metrics.get('accuracy_error'))}, "
            f"noisy macro-F1 {number(metrics.get('macro_f1'))}",
        ),
        (
            "Merchants",
            f"{len(result.merchants) - refused:,} took part, {refused:,} refused or left; "
            f"{counted(len(result.rounds), 'training round')}",
        ),
        ("Took", f"{duration(result.seconds)}, peak memory {number(result.peak_mib)} MiB"),
    ]
    lines.extend(Text.assemble((f"{name:<10}", "dim"), told) for name, told in figures)
    return lines


def comparison_table(comparison: Comparison) -> Table:
    """List every method's accuracy, macro-F1 and AUC."""
    table = _methods_table(
        f"{plain(comparison.data)}, {plain(comparison.partition)}: "
        f"{counted(comparison.merchants, 'merchant')}, "
        f"{counted(comparison.customers, 'training customer')}",
        ("Accuracy", "Macro-F1", "AUC"),
    )
    for row in comparison.rows:
        cells = (spread_text(spread) for spread in (row.accuracy, row.macro_f1, row.auc))
        table.add_row(Text(method_name(row)), *cells, style=_style(row))
    table.caption = (
        f"Mean ± standard deviation over {counted(comparison.seeds, 'seed')}; "
        f"delta {number(comparison.delta)} where a method is private.\n"
        "Measured with full sight of the held-out customers: not private, not for release."
    )
    table.caption_justify = "left"
    return table


def comparison_lines(comparison: Comparison) -> list[Text]:
    """Weigh the methods in words: a caution in red first, then the verdict and the notes."""
    caution = comparison_caution(comparison)
    red = [] if caution is None else [Text(f"{caution.title}. {caution.text}", style="bold red")]
    return [*red, *(Text(plain(told)) for told in (*verdict(comparison), *comparison.notes))]


def sizes_table(comparison: Comparison) -> Table:
    """List every method's accuracy by merchant size."""
    table = _methods_table(
        "Accuracy by training customers of the merchant", [plain(size) for size in comparison.sizes]
    )
    for row in comparison.rows:
        cells = [spread_text(spread) for spread in row.by_size]
        table.add_row(Text(method_name(row)), *cells, style=_style(row))
    return table


def _methods_table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=Text(title), title_justify="left", title_style="bold")
    table.add_column("Method", overflow="fold")
    for heading in headings:
        table.add_column(Text(heading), justify="right", no_wrap=True)
    return table


def _style(row: ComparisonRow) -> str:
    return "bold" if row.method == "distributed" and row.epsilon is not None else ""


def _shown(merchants: Sequence[MerchantRecord]) -> list[MerchantRecord]:
    """Choose the merchants to show, small to large, the refused at the end."""
    if len(merchants) <= MAX_MERCHANTS:
        return list(merchants)
    refused = [merchant for merchant in merchants if merchant.refused is not None]
    taking_part = [merchant for merchant in merchants if merchant.refused is None]
    taking_part.sort(key=lambda merchant: (merchant.customers, merchant.id))
    if len(taking_part) > 2 * ENDS:
        taking_part = taking_part[:ENDS] + taking_part[-ENDS:]
    return taking_part + refused[:MAX_REFUSED]


def _merchant_cells(merchant: MerchantRecord, result: SimulationResult) -> list[Text]:
    accuracy = percent(merchant.accuracy, merchant.accuracy_error)
    cells = [
        Text(plain(merchant.id)),
        Text(f"{merchant.customers:,}"),
        Text(epsilon_text(merchant.epsilon)),
        Text(epsilon_text(merchant.epsilon_server)),
        Text(number(result.delta)),
        Text(accuracy, style="dim" if accuracy == NOTHING else ""),
        Text(plain(merchant.refused or ""), style="red"),
    ]
    # what only single messages tell is nowhere to be seen where sums are masked
    return [*cells[:3], cells[4], cells[6]] if result.secure else cells
