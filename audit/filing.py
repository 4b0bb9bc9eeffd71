"""Facts that only people know, for records of processing: a TOML file with fixed fields.

Evidence says what was computed; it cannot say who is responsible, on which legal ground, or for
how long. What is not filed is shown as "to be filled in": a report never invents a fact.
"""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any, Final

from audit.plain import words
from common.errors import HansaError

MISSING: Final = "to be filled in"
MAX_BYTES = 1_000_000

Filing = dict[str, dict[str, str]]  # section -> field -> text


@dataclass(frozen=True)
class Field:
    """One fact to be filed.

    Attributes:
        section: Table of the file.
        name: Key in that table.
        asks: What to write there.
        laws: Where it is asked for; empty: for the deployment registry only.
    """

    section: str
    name: str
    asks: str
    laws: tuple[str, ...] = ()


FIELDS = (
    Field("product", "name", "What the published model is called"),
    Field("product", "description", "What it is, in two sentences"),
    Field("product", "intended_use", "What it is meant for, and what it is not"),
    Field("product", "region", "Where the customers are, and whose law applies"),
    Field(
        "product",
        "sector",
        "Technology, Healthcare, Education, Government, Energy or Finance; leave out if none fits",
    ),
    Field("product", "publication_date", "First publication, YYYY-MM-DD"),
    Field("product", "utility", "How good it is, and how that was measured"),
    Field("product", "justification", "Who chose epsilon and delta, and why these"),
    Field("product", "tuning", "How settings were chosen, and what that cost in privacy"),
    Field("product", "data_source", "Static, or Dynamic where new data come in over time"),
    Field("product", "further_releases", "Whether the same data will be used again"),
    Field("controller", "name", "Who decides on purposes and means", ("GDPR 30(1)(a)",)),
    Field("controller", "contact", "Address and telephone or e-mail", ("GDPR 30(1)(a)",)),
    Field("controller", "kind", "Government, Industry or Nonprofit"),
    Field("controller", "joint", "Joint controllers and their contact", ("GDPR 30(1)(a)",)),
    Field("controller", "representative", "In the Union, where one is needed", ("GDPR 30(1)(a)",)),
    Field("controller", "officer", "Data protection officer and contact", ("GDPR 30(1)(a)",)),
    Field("controller", "processors", "Who runs the coordinator, and under which contract"),
    Field(
        "processing", "purposes", "What the processing is for", ("GDPR 30(1)(b)", "GDPR 35(7)(a)")
    ),
    Field(
        "processing",
        "lawful_basis",
        "Ground, with the legitimate interest if it is that one",
        ("GDPR 6", "GDPR 35(7)(a)"),
    ),
    Field(
        "processing",
        "people",
        "Categories of people: customers of whom, since when",
        ("GDPR 30(1)(c)",),
    ),
    Field(
        "processing", "data", "Categories of personal data behind the features", ("GDPR 30(1)(c)",)
    ),
    Field("processing", "recipients", "Who is given the model and the figures", ("GDPR 30(1)(d)",)),
    Field(
        "processing",
        "third_countries",
        "Transfers, to whom, and their safeguards",
        ("GDPR 30(1)(e)",),
    ),
    Field("processing", "retention", "When which data are erased", ("GDPR 30(1)(f)",)),
    Field(
        "processing",
        "security",
        "Organisational measures; the technical ones stand beside",
        ("GDPR 30(1)(g)",),
    ),
    Field("processing", "rights", "How people are told, object and are left out", ("GDPR 13-22",)),
    Field(
        "processing",
        "automated_decisions",
        "Whether segments decide anything by themselves",
        ("GDPR 22", "PIPL 24", "PIPL 55(2)"),
    ),
    Field(
        "assessment",
        "reference",
        "Number and date of the DPIA, or why none is needed",
        ("GDPR 35(1)",),
    ),
    Field("assessment", "necessity", "Why it is necessary and in proportion", ("GDPR 35(7)(b)",)),
    Field("assessment", "risks", "Risks to the rights and freedoms of people", ("GDPR 35(7)(c)",)),
    Field("assessment", "measures", "What is done about these risks", ("GDPR 35(7)(d)",)),
    Field(
        "assessment",
        "advice",
        "The officer's advice, and people's views",
        ("GDPR 35(2)", "GDPR 35(9)"),
    ),
    Field(
        "assessment",
        "anonymity",
        "Whether the model counts as anonymous, and why",
        ("EDPB Opinion 28/2024",),
    ),
    Field(
        "assessment", "review", "When it is looked at again, and at which change", ("GDPR 35(11)",)
    ),
    Field("assessment", "signed_by", "Who answers for the assessment, and when"),
    Field("pipl", "handler", "Personal information handler and contact", ("PIPL 52",)),
    Field("pipl", "basis", "Consent or another ground of Article 13", ("PIPL 13",)),
    Field(
        "pipl", "sensitive", "Whether sensitive personal information is handled", ("PIPL 55(1)",)
    ),
    Field("pipl", "sharing", "Entrusting, providing to others, disclosing", ("PIPL 55(3)",)),
    Field(
        "pipl",
        "abroad",
        "Providing abroad, and by which way of Article 38",
        ("PIPL 38", "PIPL 55(4)"),
    ),
    Field(
        "pipl",
        "purpose",
        "Why purpose and method are lawful, legitimate and necessary",
        ("PIPL 56(1)",),
    ),
    Field("pipl", "influence", "Influence on people's rights, and security risks", ("PIPL 56(2)",)),
    Field(
        "pipl",
        "measures",
        "Why the measures are lawful, effective and fit the risk",
        ("PIPL 56(3)",),
    ),
    Field("pipl", "assessment", "Number and date of the impact assessment", ("PIPL 55",)),
    Field(
        "pipl", "retention", "Where report and records are kept: three years at least", ("PIPL 56",)
    ),
    Field("incident", "contact", "Whom to tell of a suspected leak", ("GDPR 33", "PIPL 57")),
    Field("incident", "monitoring", "What is watched after publication, and by whom"),
    Field("incident", "replaces", "Releases that this one replaces or withdraws"),
    Field("registry", "authors", "Who wrote the entry in the deployment registry"),
    Field("registry", "sources", "Papers, pages or reports that describe the deployment"),
)


def sections() -> Iterator[tuple[str, tuple[Field, ...]]]:
    """Yield every table of the file with its fields."""
    for section in dict.fromkeys(field.section for field in FIELDS):
        yield section, tuple(field for field in FIELDS if field.section == section)


def filing_template() -> str:
    """Return a file that has every field, empty, with what to write there."""
    lines = ["# What evidence cannot know. Leave out or empty what is not known."]
    for section, fields in sections():
        lines += ["", f"[{section}]"]
        for field in fields:
            laws = f" ({', '.join(field.laws)})" if field.laws else ""
            lines.append(f'{field.name} = ""  # {field.asks}{laws}')
    return "\n".join(lines) + "\n"


def read_filing(path: Path) -> Filing:
    """Read what people filed.

    A list becomes a text with commas, a date or a truth value its words.

    Raises:
        HansaError: The file cannot be read, is no TOML, or has a field that is not known.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise HansaError(f"{path}: is larger than {MAX_BYTES:,} bytes")
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HansaError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise HansaError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise HansaError(f"{path}: is not valid TOML: {error}") from None
    return filing_of(document, source=str(path))


def filing_of(document: Mapping[str, Any], *, source: str = "filing") -> Filing:
    """Return the texts of a filing that is already a dictionary.

    Raises:
        HansaError: A field is not known or holds a table; `source` starts the message.
    """
    known = {(field.section, field.name) for field in FIELDS}
    found: Filing = {}
    for section, values in document.items():
        if not isinstance(values, Mapping):
            raise HansaError(f"{source}: {words(section, 80)}: expected a table of this name")
        for name, value in values.items():
            where = f"{words(section, 80)}.{words(name, 80)}"
            if (section, name) not in known:
                raise HansaError(f"{source}: {where}: this field is not known; check its spelling")
            text = _text(value, f"{source}: {where}")
            if text:
                found.setdefault(section, {})[name] = text
    return found


def _text(value: Any, where: str) -> str:
    if isinstance(value, list):
        return ", ".join(_text(item, where) for item in value)
    if isinstance(value, datetime | date):
        return value.isoformat()
    if not isinstance(value, str | bool | int | float):
        raise HansaError(f"{where}: expected a text")
    return words(value).strip()
