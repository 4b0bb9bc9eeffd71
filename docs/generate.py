"""Fill the generated blocks of the pages in `docs/`; everything else in them is written by hand.

A block lies between `<!-- generated: NAME ARGUMENT -->` and `<!-- end -->`. Its text comes from the
program itself (pydantic models, the command, JSON schemas, the catalogue), so that it cannot go
stale: `tests/test_docs.py` fails where a page differs from what this script would write.

    python docs/generate.py            # write
    python docs/generate.py --check    # only say which pages are stale; exit 1 if there are any
"""

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, get_type_hints

import click
import typer

DOCS = Path(__file__).parent
_BLOCK = re.compile(
    r"(?P<start><!-- generated: (?P<name>[a-z-]+)(?: (?P<argument>[^>]*?))? -->\n)"
    r"(?P<text>.*?)(?P<end><!-- end -->)",
    re.DOTALL,
)

Schema = dict[str, Any]


def filled(page: str) -> str:
    """Return a page with every generated block written anew."""

    def block(match: re.Match[str]) -> str:
        text = BLOCKS[match["name"]](match["argument"] or "")
        return f"{match['start']}\n{text.strip()}\n\n{match['end']}"

    return _BLOCK.sub(block, page)


def pages() -> list[Path]:
    """List every page of the documentation."""
    return sorted(DOCS.rglob("*.md"))


def commands() -> Iterator[tuple[str, click.Command]]:
    """Yield every command that does something, with its full name after `hansa`."""
    from hansa.cli import app

    yield from _leaves("", typer.main.get_command(app))


def argument_help(command: click.Command) -> dict[str, str]:
    """Return what a command says about its arguments, by name.

    Read from the annotations of the command's function: not every pair of versions of typer and
    click keeps an argument's help.
    """
    function = inspect.unwrap(command.callback) if command.callback else command.main
    return {
        name: str(info.help or "")
        for name, hint in get_type_hints(function, include_extras=True).items()
        for info in getattr(hint, "__metadata__", ())
        if isinstance(info, typer.models.ArgumentInfo)
    }


def _leaves(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        yield name, command
        return
    for part, child in command.commands.items():
        yield from _leaves(f"{name} {part}".strip(), child)


def _table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    cells = (tuple(cell.replace("|", "\\|").replace("\n", " ") for cell in row) for row in rows)
    lines += ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join(lines)


def _options(name: str) -> str:
    """Describe one command: usage, arguments, options."""
    command = dict(commands())[name]
    said = argument_help(command)
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    words = [_argument_word(p) for p in arguments] + (["[OPTIONS]"] if options else [])
    parts = [f"```text\n{' '.join(['hansa', name, *words])}\n```"]
    if arguments:
        rows = [
            (f"`{_argument_word(p)}`", said.get(p.name or "", ""), "yes" if p.required else "no")
            for p in arguments
        ]
        parts.append(_table(("Argument", "Meaning", "Required"), rows))
    if options:
        parts.append(_table(("Option", "Value", "Meaning", "Default"), list(_rows(options))))
    return "\n\n".join(parts)


def _argument_word(parameter: click.Parameter) -> str:
    stated = str(getattr(parameter, "metavar", None) or (parameter.name or "").upper())
    word = stated.removesuffix("...") + ("..." if parameter.nargs == -1 else "")
    return word if parameter.required else f"[{word}]"


def _rows(options: list[click.Parameter]) -> Iterator[tuple[str, ...]]:
    for option in options:
        names = ", ".join(f"`{name}`" for name in option.opts)
        if option.required:
            default = "required"
        elif option.default is None or option.default is False or "UNSET" in repr(option.default):
            default = ""
        else:
            default = f"`{option.default}`"
        said = str(getattr(option, "help", None) or "").replace("<", "&lt;")
        names += " (may be repeated)" if option.multiple else ""
        yield names, _value(option), said, default


def _value(option: click.Parameter) -> str:
    if getattr(option, "is_flag", False):
        return ""
    kind = option.type
    lowest, highest = getattr(kind, "min", None), getattr(kind, "max", None)
    word = {"integer": "whole number", "integer range": "whole number", "float": "number"}.get(
        kind.name, kind.name
    )
    if highest is not None:
        return f"{word}, {lowest:,} to {highest:,}"
    return f"{word}, {lowest} or more" if lowest is not None else word


def _model(name: str) -> str:
    """Describe every section and key of a file that a pydantic model validates."""
    schema = _schema_of(name)
    top = [(key, part) for key, part in schema["properties"].items() if not _section(part)]
    parts = []
    if top:
        parts.append("### Top level\n\n" + _keys(dict(top), schema.get("required", []), schema))
    for key, part in schema["properties"].items():
        if _section(part):
            parts += _section_text(key, part, schema, key not in schema.get("required", []))
    return "\n\n".join(parts)


def _schema_of(name: str) -> Schema:
    """Return the JSON schema of a file that people write."""
    if name == "contract":
        from common.contract import Contract

        return Contract.model_json_schema()
    if name == "server":
        from server.settings import Settings

        schema = Settings.model_json_schema()
        del schema["properties"]["folder"]  # is known, not read
        return schema
    from clients.merchant import Merchant

    return Merchant.model_json_schema()


def _section(part: Schema) -> str | None:
    """Return the name of the definition that a property refers to, if it is a section."""
    for candidate in (part, part.get("items", {}), *part.get("anyOf", [])):
        if "$ref" in candidate:
            return str(candidate["$ref"]).rpartition("/")[2]
    return None


def _section_text(key: str, part: Schema, schema: Schema, optional: bool) -> list[str]:
    definition = schema["$defs"][_section(part)]
    title = f"[[{key}]]" if part.get("type") == "array" else f"[{key}]"
    words = definition.get("description", "").split("\n")[0]
    note = " May be left out." if optional else " Required."
    if part.get("type") == "array":
        note = f" Required; {part['minItems']} to {part['maxItems']} of them."
    own = {k: p for k, p in definition["properties"].items() if not _section(p)}
    text = [
        f"### `{title}`\n\n{words}{note}\n\n" + _keys(own, definition.get("required", []), schema)
    ]
    for inner, child in definition["properties"].items():
        if _section(child):
            text += _section_text(f"{key}.{inner}", child, schema, optional=True)
    return text


def _keys(properties: Mapping[str, Schema], required: list[str], schema: Schema) -> str:
    rows = []
    for key, part in properties.items():
        default = part.get("default")
        if key in required:
            shown = "required"
        elif default is None or default in ("", []):
            shown = ""
        else:
            shown = f"`{json.dumps(default)}`"
        rows.append((f"`{key}`", _type(part, schema), shown, part.get("description", "")))
    return _table(("Key", "Type and allowed values", "Default", "Meaning"), rows)


def _type(part: Schema, schema: Schema) -> str:
    """Say in words what values a JSON schema lets through."""
    if "anyOf" in part:
        return " or ".join(_type(p, schema) for p in part["anyOf"] if p.get("type") != "null")
    if named := _named(part):
        return named
    if "prefixItems" in part:
        return "[" + ", ".join(_type(p, schema) for p in part["prefixItems"]) + "]"
    if part.get("type") == "array":
        least = f", {part['minItems']} or more" if "minItems" in part else ""
        return f"list of ({_type(part['items'], schema)}){least}"
    if part.get("type") == "object":
        return f"table of {_type(part['additionalProperties'], schema)}"
    return _plain(part)


def _named(part: Schema) -> str:
    """List the values of a schema that names them one by one; empty for others."""
    values = [part["const"]] if "const" in part else part.get("enum", [])
    return ", ".join(f"`{json.dumps(value)}`" for value in values)


def _plain(part: Schema) -> str:
    names = {"integer": "whole number", "boolean": "`true` or `false`", "string": "text"}
    kind = str(part.get("type", "anything"))
    word = {"date": "date", "path": "path", "password": "text, kept secret"}.get(
        part.get("format", ""), names.get(kind, kind)
    )
    limits = [
        f"{sign} {part[key]:g}"
        for key, sign in (
            ("exclusiveMinimum", ">"),
            ("minimum", "≥"),
            ("exclusiveMaximum", "<"),
            ("maximum", "≤"),
        )
        if key in part
    ]
    if "pattern" in part:
        limits.append(f"matching `{part['pattern']}`")
    if "maxLength" in part:
        limits.append(f"{part.get('minLength', 0)} to {part['maxLength']} characters")
    elif "minLength" in part:
        limits.append("not empty")
    return ", ".join([word, *limits])


def _measures(_argument: str) -> str:
    """List the measures that a feature can ask for."""
    from common.contract import MEASURES

    rows = [(f"`{name}`", meaning) for name, meaning in MEASURES.items()]
    return _table(("Measure", "Meaning"), rows)


def _fields(name: str) -> str:
    """List every field of a JSON document, from its schema."""
    text = (files("hansa") / "schemas" / f"{name}.schema.json").read_text(encoding="utf-8")
    schema = json.loads(text)
    rows = list(_field_rows("", schema, schema))
    return f"{schema['description']}\n\n" + _table(("Field", "Type", "Meaning"), rows)


def _field_rows(prefix: str, node: Schema, schema: Schema) -> Iterator[tuple[str, ...]]:
    for key, found in node.get("properties", {}).items():
        part = found
        if "$ref" in part:
            part = schema["$defs"][part["$ref"].rpartition("/")[2]]
        path = f"{prefix}{key}"
        yield f"`{path}`", _json_type(part), found.get("description") or part.get("description", "")
        inner = part.get("items", part) if part.get("type") == "array" else part
        if "$ref" in inner:
            inner = schema["$defs"][inner["$ref"].rpartition("/")[2]]
        if "properties" in inner:
            dots = f"{path}[]." if part.get("type") == "array" else f"{path}."
            yield from _field_rows(dots, inner, schema)


def _json_type(part: Schema) -> str:
    if named := _named(part):
        return named
    kind = part.get("type", "anything")
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def _data_sets(_argument: str) -> str:
    """List the built-in data sets with partitions, labels and presets."""
    from simulations.catalogue import CATALOGUE

    parts = []
    for entry in CATALOGUE:
        needs = f"Needs `pip install '{entry.extra}'`." if entry.extra else "Needs nothing more."
        about = [("partition", entry.partitions), ("label", entry.labels)]
        rows = [
            (f"`--{kind} {name}`" + (" (default)" if not place else ""), meaning)
            for kind, choices in about
            for place, (name, meaning) in enumerate(choices.items())
        ]
        sizes = [
            (f"`{name}`", f"{count:,}", f"{entry.rows[name]:,}")
            for name, count in entry.merchants.items()
        ]
        what = "Preset" if entry.presets else "Partition"
        parts.append(
            f"### {entry.name}\n\n{entry.description}\n\n{entry.provenance}\n\n{needs}\n\n"
            + _table(("Option", "Meaning"), rows)
            + "\n\n"
            + _table((what, "Merchants", "Customers, about"), sizes)
        )
    return "\n\n".join(parts)


def _person_table(_argument: str) -> str:
    """Show what record-level (1, 1e-4) comes to for a person with several merchants."""
    from common.accounting import person_table

    rows = [(f"{k:g}", f"{shared:.1f}", f"{own:.1f}") for k, shared, own in person_table(1.0, 1e-4)]
    return _table(
        ("Merchants of the person", "Epsilon, one shared sum", "Epsilon, independent noise"), rows
    )


def _exit_codes(_argument: str) -> str:
    """List the exit codes and the errors behind them."""
    from common import errors

    failed = (errors.RunError, errors.AccountingError, errors.BundleError)
    kinds = [
        (name, kind)
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.HansaError)
    ]
    rows = [("0", "", "Done.")]
    for code, chosen in ((1, True), (2, False)):
        rows += [
            (str(code), f"`{name}`", str(kind.__doc__))
            for name, kind in kinds
            if issubclass(kind, failed) is chosen and name != "HansaError"
        ]
    rows += [
        ("2", "", "Wrong use: an unknown command or option, or a value that does not fit."),
        ("130", "", "Interrupted with Ctrl-C."),
    ]
    return _table(("Exit code", "Error", "Meaning"), rows)


BLOCKS: dict[str, Callable[[str], str]] = {
    "model": _model,
    "measures": _measures,
    "command": _options,
    "fields": _fields,
    "data-sets": _data_sets,
    "person-table": _person_table,
    "exit-codes": _exit_codes,
}


def main(arguments: list[str]) -> int:
    """Write the pages, or with `--check` only tell which are stale."""
    stale = 0
    for path in pages():
        page = path.read_text(encoding="utf-8")
        fresh = filled(page)
        if fresh != page:
            stale += 1
            sys.stdout.write(f"{path.relative_to(DOCS.parent)}: generated text is stale\n")
            if "--check" not in arguments:
                path.write_text(fresh, encoding="utf-8")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
