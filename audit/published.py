"""What a run published, held against the sums that the coordinator recorded for it."""

import json
import math
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from audit import fields
from audit.codes import Flaw, Notebook
from audit.replay import Replay, sha256_of
from audit.runs import RecordedSum, RunRecord, release_of
from audit.spending import SLACK, TOLERANCE, epsilon_of, understated
from common import statements
from common.bundle import Bundle, read_bundle
from common.errors import AccountingError, BundleError, ContractError
from common.events import Event, PoissonGaussianSum, from_document, merged
from common.fixed_point import lattice_sensitivity
from common.plan import EVALUATION, PROFILE
from common.scaling import natural

_FOLDER = "bundle/"
_FILES = frozenset(
    {
        "MODEL_CARD.md",
        "contract.toml",
        "manifest.json",
        "metrics.json",
        "model.onnx",
        "model.safetensors",
        "privacy.json",
        "segments.json",
    }
)
_CLOSE = 1e-6  # relative; figures that are printed from the same numbers
_TOO_FEW = 4.0  # standard deviations; nothing is told of a count below it


@dataclass(frozen=True)
class Published:
    """A bundle that was read, and its documents."""

    bundle: Bundle
    documents: Mapping[str, Mapping[str, Any]]  # file -> JSON object


def read_published(files: Mapping[str, bytes]) -> Published | None:
    """Read a run's bundle; None if the evidence holds none.

    Raises:
        Flaw: The bundle is incomplete or was changed.
    """
    inside = {n.removeprefix(_FOLDER): c for n, c in files.items() if n.startswith(_FOLDER)}
    if not inside:
        return None
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "bundle"
        folder.mkdir()
        for name, content in inside.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        try:
            bundle = read_bundle(folder)
        except (BundleError, ContractError) as error:
            raise Flaw("bundle-invalid", str(error).replace(str(folder), "bundle")) from None
    foreign = sorted(inside.keys() - _FILES)
    if foreign:
        raise Flaw("bundle-invalid", f"bundle/{foreign[0]}: is no file of a bundle")
    if not _is_layered(inside["model.safetensors"], bundle):
        raise Flaw("bundle-invalid", "bundle/model.safetensors: tells layers of another model")
    return Published(bundle, {n: _object(c) for n, c in inside.items() if n.endswith(".json")})


def _is_layered(content: bytes, bundle: Bundle) -> bool:
    """Tell whether every tensor of a model's file is a part of its parameters."""
    from safetensors.numpy import load

    layers = bundle.network.layers(bundle.parameters)
    expected = {"parameters": bundle.parameters}
    expected |= {f"layer{i}.weight": layer[:, :-1] for i, layer in enumerate(layers)}
    expected |= {f"layer{i}.bias": layer[:, -1] for i, layer in enumerate(layers)}
    return all(
        name in expected and np.array_equal(tensor, expected[name])
        for name, tensor in load(content).items()
    )


def _object(content: bytes) -> dict[str, Any]:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        document = None
    return document if isinstance(document, dict) else {}


def check_published(
    record: RunRecord, replayed: Replay, published: Published, where: str, notes: Notebook
) -> None:
    """Check that a bundle is this run's, and that each of its figures follows from the sums."""
    place, found = f"{where}, bundle", published.documents
    same = published.bundle.contract.sha256 == record.contract.sha256
    told = "the bundle holds another contract than the run's"
    if not notes.check(same, "bundle-differs", place, told):
        return
    for problem in _privacy(record, found.get("privacy.json", {})):
        notes.add("privacy-differs", f"{place}/privacy.json", problem)
    notes.count("published figures", 3)
    for name, problem in (
        ("metrics.json", _metrics(record, found.get("metrics.json", {}))),
        ("segments.json", _segments(record, found.get("segments.json", {}))),
    ):
        if problem:
            notes.add("published-differs", f"{place}/{name}", problem)
    listed = found.get("privacy.json", {}).get("notes")
    seeded = isinstance(listed, list) and statements.NOT_FOR_RELEASE in listed
    told = "by its own word its noise was seeded: whoever knows the seed can subtract it"
    notes.check(not seeded, "noise-seeded", place, told)
    if not replayed.problem:
        _check_model(record, replayed, published.bundle, place, notes)


def _check_model(
    record: RunRecord, replayed: Replay, bundle: Bundle, place: str, notes: Notebook
) -> None:
    final = replayed.model.published(record.contract.training.averaging)
    rounded = final.astype(np.float32).astype(np.float64)
    notes.check(
        np.array_equal(rounded, bundle.parameters),
        "replay-differs",
        f"{place}/model.safetensors",
        f"the published model is not what the sums of {replayed.model.steps} rounds give",
    )


def check_end(record: RunRecord, replayed: Replay, where: str, notes: Notebook) -> None:
    """Check that every recorded model follows from the sums before it."""
    final = sha256_of(replayed.model.published(record.contract.training.averaging))
    wanted = record.contract.training.rounds
    problem = replayed.problem
    if not problem and record.start["parameters"] != sha256_of(record.first):
        problem = "the record starts from another model than the contract says"
    elif not problem and record.end is not None and replayed.model.steps != wanted:
        problem = f"the run ended after {replayed.model.steps} of {wanted} rounds"
    elif not problem and record.end not in {None, final}:
        problem = f"the final model, after round {wanted}, is not what the sums give"
    notes.count("sums replayed", replayed.rounds)
    notes.check(not problem, "replay-differs", where, problem)


def _privacy(record: RunRecord, document: Mapping[str, Any]) -> list[str]:
    """Return what of `privacy.json` does not follow from the recorded sums."""
    contract = record.contract
    expected: dict[str, Any] = {
        "run": record.run,
        "contract_sha256": contract.sha256,
        "delta": contract.privacy.delta,
        "epsilon_cap": contract.privacy.epsilon,
        "model": contract.training.mode,
        "secure_aggregation": contract.aggregation.secure,
        "noise_contributors": contract.noise_contributors,
    }
    stated = {"unit_of_privacy": statements.UNIT, "neighbouring_relation": statements.RELATION}
    expected |= stated
    wrong = [
        f"'{name}' is not {value!r}"
        for name, value in expected.items()
        if document.get(name) != value
    ]
    try:
        told = {stage: _events(listed) for stage, listed in document["events"].items()}
        merchants = set(document["merchants"].keys())
    except (AccountingError, KeyError, TypeError, AttributeError):
        return [*wrong, "'events' or 'merchants' cannot be read"]
    stages = dict.fromkeys(one.stage for one in record.sums)
    asked = {s: merged(one.event for one in record.sums if one.stage == s) for s in stages}
    wrong += ["'events' are not those of the recorded sums"] if told != asked else []
    wrong += ["'merchants' are not those of the run"] if merchants != {*record.merchants} else []
    same = all(told == document.get("epsilon") for told in document["merchants"].values())
    wrong += [] if same else ["'merchants' tells another epsilon of a merchant than of the run"]
    return wrong + [problem for problem in _epsilons(record, document) if problem]


def _events(listed: Iterable[dict[str, Any]]) -> tuple[Event, ...]:
    return merged(from_document(event) for event in listed)


def _epsilons(record: RunRecord, document: Mapping[str, Any]) -> Iterable[str]:
    """Yield what is wrong with each epsilon of `privacy.json`."""
    delta = record.contract.privacy.delta
    everything = [one.event for one in record.sums]
    yield _compared("epsilon", document.get("epsilon"), everything, delta)
    server = _towards_server(record)
    yield _compared("epsilon_towards_server", document.get("epsilon_towards_server"), server, delta)
    achieved = document.get("achieved")
    told = achieved if isinstance(achieved, dict) else {}
    counts = _survivors(record)
    if (told.get("survivors_min"), told.get("survivors_max")) != (min(counts), max(counts)):
        yield f"'achieved' tells other numbers of merchants than {min(counts)} to {max(counts)}"
    yield _compared("achieved.epsilon", told.get("epsilon"), _achieved(record, 0), delta)
    yield from _colluding(record, document.get("colluders"), min(counts))
    alone = document.get("epsilon_by_stage")
    stages = dict.fromkeys(one.stage for one in record.sums)
    if not isinstance(alone, dict) or {*alone} != {*stages}:
        yield "'epsilon_by_stage' does not tell the stages of the recorded sums"
        return
    for stage in stages:
        events = [one.event for one in record.sums if one.stage == stage]
        yield _compared(f"epsilon_by_stage.{stage}", alone[stage], events, delta)


def _colluding(record: RunRecord, listed: object, fewest: int) -> Iterable[str]:
    """Yield what is wrong with what is told of colluders: none, one, a tenth, and a third."""
    told = set()
    for row in listed if isinstance(listed, list) else []:
        colluders = row.get("colluders") if isinstance(row, dict) else None
        if not fields.whole(colluders) or not isinstance(colluders, int):
            yield "'colluders' cannot be read"
            continue
        told.add(colluders)
        events, delta = _achieved(record, colluders), record.contract.privacy.delta
        yield _compared(f"epsilon with {colluders} colluders", row.get("epsilon"), events, delta)
    missing = sorted({0, 1, -(-fewest // 10), (fewest - 1) // 3} - told)
    if missing:
        yield f"'colluders' does not tell epsilon with {missing[-1]} of them"


def _compared(name: str, claimed: object, events: list[Event] | None, delta: float) -> str:
    """Return what is wrong with an epsilon that is told for events; None: no noise is left.

    Where sums are sampled, an upper bound may be larger than the auditor's.
    """
    found = math.inf if events is None else epsilon_of(events, delta)
    if claimed is None and not math.isfinite(found):
        return ""
    if not fields.number(claimed) or not isinstance(claimed, int | float):
        return f"'{name}' is no number; the recorded sums give {found:.4g}"
    sampled = any(isinstance(event, PoissonGaussianSum) for event in events or ())
    over = not sampled and claimed > found * (1 + TOLERANCE) + SLACK
    if understated(float(claimed), found) or over:
        return f"'{name}' says {claimed:.4g}, the recorded sums give {found:.4g}"
    return ""


def _survivors(record: RunRecord) -> list[int]:
    """Return the merchants of every sum, the contract's fewest where none came of it."""
    fewest = record.contract.min_survivors
    return [fewest if one.fewest is None else one.fewest for one in record.sums] or [fewest]


def _towards_server(record: RunRecord) -> list[Event]:
    """Return the run's events as seen by whoever sees a merchant's single messages."""
    found = []
    for one in record.sums:
        release = release_of(record.contract, one.stage, one.round)
        shares = record.contract.exposed_contributors
        found.append(one.event if release is None else release.towards_server(shares))
    return found


def _achieved(record: RunRecord, colluders: int) -> list[Event] | None:
    """Return the events with the noise that the sums really held; None if none is left."""
    events = [one.event for one in record.sums]
    if record.contract.training.mode != "distributed":
        return events
    honest = [count - colluders for count in _survivors(record)]
    if min(honest) < 1:
        return None
    planned = record.contract.noise_contributors
    return [
        replace(event, noise_multiplier=event.noise_multiplier * math.sqrt(shares / planned))
        for event, shares in zip(events, honest, strict=False)
    ]


def _last(record: RunRecord, stage: str) -> RecordedSum | None:
    found = [one for one in record.sums if one.stage == stage and one.total is not None]
    return found[-1] if found else None


def _metrics(record: RunRecord, document: Mapping[str, Any]) -> str:
    """Return why the published confusion matrix is not the last noisy one, or nothing."""
    last, segments = _last(record, EVALUATION), len(record.contract.segments.names)
    if last is None or last.values.size != segments**2:
        return "there is no recorded evaluation that it could come from"
    counts = last.values.reshape(segments, segments)
    if document.get("confusion") != np.round(counts, 2).tolist():
        return "is not the last recorded evaluation"
    expected = _figures(counts, _stddev(record, last))
    wrong = [name for name, value in expected.items() if not _same(document.get(name), value)]
    return f"'{wrong[0]}' does not follow from the last recorded evaluation" if wrong else ""


def _stddev(record: RunRecord, one: RecordedSum) -> float:
    """Return the standard deviation of the noise in each number of a sum."""
    contract = record.contract
    release = release_of(contract, one.stage, one.round)
    if release is None or not one.merchants:
        return math.inf
    sensitivity = lattice_sensitivity(
        one.event.sensitivity, release.length, release.steps, release.error
    )
    shares = len(one.merchants) / contract.noise_contributors
    return one.event.noise_multiplier * sensitivity * math.sqrt(shares)


def _figures(counts: np.ndarray, stddev: float) -> dict[str, float | None]:
    """Return accuracy, its error by the delta method, and F1, of a noisy confusion matrix."""
    segments, total = len(counts), float(counts.sum())
    if total < _TOO_FEW * stddev * segments:
        return {"count_stddev": stddev, "accuracy": None, "accuracy_error": None, "macro_f1": None}
    accuracy = float(np.trace(counts)) / total
    spread = segments * (1 - accuracy) ** 2 + segments * (segments - 1) * accuracy**2
    known = np.maximum(counts, 0.0)
    whole = known.sum(axis=0) + known.sum(axis=1)
    hits = [2 * known[i, i] / n if n > 0 else 0.0 for i, n in enumerate(whole)]
    return {
        "count_stddev": stddev,
        "accuracy": min(max(accuracy, 0.0), 1.0),
        "accuracy_error": stddev / total * math.sqrt(spread),
        "macro_f1": float(np.mean(hits)),
    }


def _same(told: object, expected: float | None) -> bool:
    """Tell whether a figure is the expected one; one that is suppressed must be missing."""
    return told is None if expected is None else told is not None and _close(told, expected)


def _segments(record: RunRecord, document: Mapping[str, Any]) -> str:
    """Return why the published shares and profiles are not the noisy ones, or nothing."""
    listed, contract = document.get("segments"), record.contract
    names = contract.segments.names
    if not isinstance(listed, list) or len(listed) != len(names):
        return f"does not tell {len(names)} segments"
    last = _last(record, PROFILE)
    if last is None:
        known = any(isinstance(s, dict) and s.get("share") is not None for s in listed)
        return "tells shares, and no profile was recorded" if known else ""
    rows = last.values
    if rows.size != len(names) * (1 + contract.inputs):
        return "the recorded profile has another size"
    expected = _expected_segments(record, rows.reshape(len(names), -1))
    fits = all(map(_segment_fits, listed, expected))
    return "" if fits else "shares or profiles are not those of the recorded profile"


def _expected_segments(record: RunRecord, rows: np.ndarray) -> list[tuple[float, list[float]]]:
    """Return each segment's share and typical values, before anything is suppressed."""
    contract = record.contract
    counts = rows[:, 0] / np.sqrt(0.5)
    total = max(float(counts.sum()), 1.0)
    scale = np.sqrt(0.5 / contract.inputs)
    found = []
    with np.errstate(all="ignore"):
        for row, count in zip(rows, counts, strict=True):
            means = np.clip(row[1:] / scale / count, -1.0, 1.0)
            typical = [math.nan if q.value is None else q.value for q in natural(contract, means)]
            found.append((min(max(float(count) / total, 0.0), 1.0), typical))
    return found


def _segment_fits(told: object, expected: tuple[float, list[float]]) -> bool:
    """Tell whether everything that is told of a segment is what its sums give."""
    if not isinstance(told, dict):
        return False
    profile = told.get("profile") or {}
    cells = list(profile.values()) if isinstance(profile, dict) else [None]
    share, typical = expected
    if cells and len(cells) != len(typical):
        return False
    return _close(told.get("share"), share) and all(
        isinstance(cell, dict) and _close(cell.get("typical"), value)
        for cell, value in zip(cells, typical, strict=False)
    )


def _close(told: object, expected: float) -> bool:
    """Tell whether a figure is the expected one, or suppressed."""
    if told is None:
        return True
    try:
        return math.isclose(told, expected, rel_tol=_CLOSE, abs_tol=_CLOSE)  # type: ignore[arg-type]
    except (TypeError, OverflowError):
        return False
