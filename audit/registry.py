"""An entry for the OpenDP deployment registry, from an audit's report.

Follows `schemas/deployments-schema.yaml` of github.com/opendp/deployments-registry-data (MIT) as
it stood in October 2026: `url_slug` and `deployment` with `basic`, `dp_variant`, `privacy_loss`,
`deployment_model`, `implementation` and `administrative`. The entry is a draft: what nobody filed
is marked, or left out where the registry knows fixed words only, and listed on top.
"""

import re
from collections.abc import Mapping
from datetime import date
from typing import Any, Final

from audit.filing import MISSING
from audit.plain import Measure, shown_epsilon, size, words

Report = Mapping[str, Any]
Entry = dict[str, Any]

SECTORS: Final = ("Technology", "Healthcare", "Education", "Government", "Energy", "Finance")
CURATORS: Final = ("Government", "Industry", "Nonprofit")
TO_BE_FILLED: Final = MISSING.capitalize()


def registry_entry(report: Report) -> Entry:
    """Return the entry; it is complete when `registry_gaps` is empty."""
    filed = _Filed(report)
    return {
        "url_slug": _slug(filed.text("product", "name"), report["made_at"]),
        "deployment": {
            "basic": _basic(filed),
            "dp_variant": {
                "variant_name": "Approximate DP",
                "data_domain": "Tables with one row for each customer of a merchant; values are "
                "clipped to bounds that the federation's contract makes public.",
                "unprotected_quantities": _points(report["not_protected"]),
            },
            "privacy_loss": _privacy_loss(report),
            "deployment_model": _model(report, filed),
            "implementation": _implementation(report, filed),
            "administrative": {
                "evidence_sources": {
                    "audit_report": {
                        "evidence_source_type": "Authorized organizational attestation",
                        "misc": {
                            "title": "Hansa audit report",
                            "note": filed.text("registry", "sources"),
                            "year": (report["made_at"] or "")[:4],
                        },
                    }
                },
                "status": "Draft",
                "registry_authors": [filed.text("registry", "authors")],
                "tier": 3,
            },
        },
    }


def registry_gaps(report: Report) -> list[str]:
    """List the fields of the entry that people have to fill in, by their names in the registry."""
    entry = registry_entry(report)
    gaps = [path for path, value in _leaves("", entry) if value == TO_BE_FILLED]
    basic = entry["deployment"]["basic"]
    for name in ("publication_date", "data_product_sector"):
        if name not in basic:
            gaps.append(f"deployment.basic.{name}")
    if "data_curator_type" not in basic["data_curators"][0]:
        gaps.append("deployment.basic.data_curators.0.data_curator_type")
    if "data_source_type" not in entry["deployment"]["deployment_model"]:
        gaps.append("deployment.deployment_model.data_source_type")
    if "epsilon" not in entry["deployment"]["privacy_loss"]["privacy_parameters"]:
        gaps.append("deployment.privacy_loss.privacy_parameters.epsilon")
    return sorted(gaps)


def registry_yaml(report: Report) -> str:
    """Write the entry as YAML, with what is to be filled in as a comment on top."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Writes texts of several lines as the registry wants them."""

    def text(dumper: Any, value: str) -> Any:
        style = "|" if "\n" in value else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    gaps = registry_gaps(report)
    head = ["# Draft entry for the OpenDP deployment registry, made by `hansa audit report`."]
    if report["verdict"]["outcome"] != "pass":
        head.append(f"# The audit did not pass: {words(report['verdict']['headline'])}")
    head += ["# To be filled in by people before it is handed in:"] if gaps else []
    head += [f"#   {gap}" for gap in gaps]
    body = yaml.dump(
        registry_entry(report), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1000
    )
    return "\n".join(head) + "\n" + str(body)


class _Filed:
    """What people filed, or the mark of what they did not."""

    def __init__(self, report: Report) -> None:
        self._filing = report["filing"]

    def text(self, section: str, name: str) -> str:
        return str(self._filing.get(section, {}).get(name) or TO_BE_FILLED)

    def word(self, section: str, name: str, known: tuple[str, ...]) -> str | None:
        """Return one of the words that the registry knows, or nothing."""
        said = self.text(section, name).strip().casefold()
        return next((word for word in known if word.casefold() == said), None)


def _leaves(path: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        items: list[tuple[Any, Any]] = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return [(path, value)]
    return [leaf for name, inner in items for leaf in _leaves(f"{path}.{name}".lstrip("."), inner)]


def _slug(name: str, made_at: str | None) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", name.casefold()).strip("-")[:80]
    return f"{slug or 'hansa'}-{(made_at or '')[:4]}".strip("-")


def _points(items: list[str]) -> str:
    return "\n".join(f"- {item[:1].upper()}{item[1:]}." for item in items)


def _basic(filed: _Filed) -> Entry:
    curator: Entry = {"data_curator_name": filed.text("controller", "name")}
    kind = filed.word("controller", "kind", CURATORS)
    curator |= {"data_curator_type": kind} if kind else {}
    entry: Entry = {
        "name": filed.text("product", "name"),
        "data_curators": [curator],
        "description": filed.text("product", "description"),
        "intended_use": filed.text("product", "intended_use"),
        "data_product_type": "Machine learning model",
        "data_product_region": filed.text("product", "region"),
    }
    sector = filed.word("product", "sector", SECTORS)
    entry |= {"data_product_sector": sector} if sector else {}
    published = _date(filed.text("product", "publication_date"))
    entry |= {"publication_date": published} if published else {}
    return entry


def _date(text: str) -> str | None:
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        return None


def _privacy_loss(report: Report) -> Entry:
    told = [m for m in report["merchants"] if m["lifetime"] is not None]
    worst = max(told, key=lambda m: size(m["lifetime"]), default=None)
    parameters: Entry = {}
    if worst is not None and isinstance(worst["lifetime"], int | float):
        parameters["epsilon"] = float(shown_epsilon(worst["lifetime"]))
    if worst is not None and worst["delta"] is not None:
        parameters["delta"] = worst["delta"]
    return {
        "privacy_unit": "One customer of one merchant",
        "privacy_unit_details": (
            f"The unit is {report['unit']}. Adjacent tables of a merchant: {report['relation']}. "
            "A person who is a customer of several merchants is protected as each of them; for the "
            "person the parts compose."
        ),
        "privacy_parameters": parameters,
        "privacy_parameters_details": _parameters(report, worst),
    }


def _parameters(report: Report, worst: Mapping[str, Any] | None) -> str:
    if worst is None:
        return "No ledger was audited, so that no epsilon is confirmed."
    count = len(report["merchants"]) + report["merchants_left_out"]
    refresh = worst["refresh_days"]
    cap = f"its own cap is {_told(worst['cap'])}" + (
        f" in any {refresh:g} days." if refresh is not None else " for ever."
    )
    return (
        f"The largest lifetime epsilon of {count:,} audited merchants, over everything that each "
        f"of them ever released, rounded up: {_told(worst['lifetime'])}; {cap} Recomputed from the "
        f"events in its signed ledger with an accountant of the auditor's own."
    )


def _told(value: Measure) -> str:
    return shown_epsilon(value)


def _model(report: Report, filed: _Filed) -> Entry:
    refreshed = any(m["refresh_days"] is not None for m in report["merchants"])
    many = len(report["runs"]) + report["runs_left_out"] != 1
    source = filed.word("product", "data_source", ("Static", "Dynamic"))
    return {
        "model_name": "Federated",
        "model_name_details": _federated(report),
        "trust_assumptions": _points(report["assumptions"]),
        "actors": "\n".join(
            f"- {row['who']}. Sees: {row['sees']}. Protection: {row['protection']}"
            for row in report["threats"]
        ),
        "release_type": "Many releases" if many else "One release",
        "release_type_details": (
            "Each merchant's ledger outlives the runs; its lifetime epsilon composes all of them. "
            + (
                "Some policies let the cap start afresh after a period. "
                if refreshed
                else "No policy lets the cap start afresh. "
            )
            + f"Further use of the same data: {filed.text('product', 'further_releases')}"
        ),
        **({"data_source_type": source} if source else {}),
        "access_type": "Non-interactive",
        "access_type_details": "The model, noisy metrics and profiles are published as a bundle; "
        "nobody queries the data.",
    }


def _federated(report: Report) -> str:
    modes = {run["mode"] for run in report["runs"]}
    plain = any(run["masked"] is False for run in report["runs"])
    sums = (
        "Some runs were not masked, so that the coordinator saw single messages."
        if plain
        else "Secure aggregation shows the coordinator sums over several merchants only."
    )
    noise = {
        frozenset({"distributed"}): "Noise is added in shares by the merchants of a sum.",
        frozenset({"local"}): "Every merchant's own noise gives the whole guarantee.",
    }.get(frozenset(modes), "Noise is added by the merchants before anything leaves them.")
    return f"Merchants keep their customers' rows. {noise} {sums}"


def _implementation(report: Report, filed: _Filed) -> Entry:
    return {
        "preprocessing_and_hyperparameter_tuning": (
            "Bounds of all features are public knowledge in the contract; scaling uses them alone. "
            f"Tuning: {filed.text('product', 'tuning')}"
        ),
        "mechanisms": "\n".join(
            (
                "- Gaussian noise on sums of contributions clipped in L2, drawn as integers from "
                "the discrete Gaussian on a lattice, so that no floating-point digits leak.",
                "- Randomness from AES-256 in counter mode, keyed by the operating system.",
                "- Poisson sampling with secret coin flips where a rate below 1 is stated; no "
                "shuffled batches.",
                f"- Library: hansa {report['hansa']}; code SHA-256 {_codes(report)}.",
                "- Rows never leave a merchant; ledgers are signed, chained and countersigned.",
                "- Time to answer is not protected.",
            )
        ),
        "composition": "Exact composition of Gaussian mechanisms; privacy-loss distributions where "
        "sums are sampled. Lifetime figures compose every charge of a ledger, over all runs.",
        "post_processing": "Optimizer steps, averaging, metrics, segment shares and profiles are "
        "computed from the noisy sums; cells that noise drowns are suppressed.",
        "justification": filed.text("product", "justification"),
        "utility": filed.text("product", "utility"),
        "additional_information": _audited(report),
    }


def _codes(report: Report) -> str:
    codes = list(dict.fromkeys(item["code"] for item in report["evidence"] if item["code"]))
    more = f" and {len(codes) - 3:,} others" if len(codes) > 3 else ""
    return (", ".join(codes[:3]) or "unknown") + more


def _audited(report: Report) -> str:
    tried = report["empirical"]
    attack = (
        "No attack on the code was part of it."
        if tried is None or tried["lower_bound"] is None
        else f"An attack on the code showed an epsilon of at least {_told(tried['lower_bound'])} "
        f"where at most {_told(tried['claimed_epsilon'])} is claimed."
    )
    return (
        f"Audited on {(report['made_at'] or '')[:10]} from signed evidence: "
        f"{report['verdict']['headline']} {attack}"
    )
