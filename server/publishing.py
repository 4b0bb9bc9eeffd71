"""A finished run -> its bundle. Everything in it is post-processing of noisy sums."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jaxtyping import Float

from common import statements
from common.accounting import assess, epsilon
from common.bundle import write_bundle
from common.contract import Contract, contract_toml
from common.events import Event, merged, to_document
from common.network import network_of
from common.onnx_model import onnx_bytes
from common.plan import plan_of
from common.scaling import inputs, natural
from server.model_card import model_card
from server.onnx_model import check_parity
from server.outcome import NoisySum, Outcome

_TOO_FEW = 4.0  # standard deviations below which a noisy count says nothing
_TOO_VAGUE = 0.5  # standard deviation of a mean on the scale [-1, 1] that is not worth printing
_CONFIDENCE = 1.96  # 95 % of a normal


def publish(
    outcome: Outcome,
    contract: Contract,
    folder: Path,
    key: Ed25519PrivateKey,
) -> dict[str, dict[str, Any]]:
    """Write the bundle and return its JSON documents by file name.

    Raises:
        BundleError: The ONNX model differs from torch, or the folder cannot be written.
    """
    from safetensors.numpy import save

    network = network_of(contract)
    parameters = outcome.parameters.astype(np.float32)
    model = onnx_bytes(network, parameters.astype(np.float64))
    parity = check_parity(network, parameters.astype(np.float64), model)
    documents: dict[str, dict[str, Any]] = {
        "segments.json": segments_document(outcome.profile, contract),
        "metrics.json": metrics_document(outcome.evaluations[-1], contract),
        "privacy.json": privacy_document(outcome, contract),
    }
    documents["metrics.json"]["onnx_max_difference"] = parity
    files = {
        name: json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        for name, document in documents.items()
    }
    tensors = {"parameters": parameters, **_layers(parameters, contract)}
    files["model.safetensors"] = save(tensors, {"contract": contract.sha256})
    files["model.onnx"] = model
    files["contract.toml"] = contract_toml(contract).encode()
    files["MODEL_CARD.md"] = model_card(outcome, contract, documents).encode()
    write_bundle(folder, files, key)
    return documents


def _layers(parameters: Float[np.ndarray, " P"], contract: Contract) -> dict[str, Any]:
    layers = network_of(contract).layers(parameters)
    weights = {f"layer{i}.weight": np.ascontiguousarray(x[:, :-1]) for i, x in enumerate(layers)}
    biases = {f"layer{i}.bias": np.ascontiguousarray(x[:, -1]) for i, x in enumerate(layers)}
    return {**weights, **biases}


def accuracy_of(counts: Float[np.ndarray, "S S"], stddev: float) -> tuple[float, float] | None:
    """Return accuracy and one standard deviation of the noise in it, from noisy counts.

    The error follows from the counts' noise by the delta method; None where the noisy total is
    too small to divide by.
    """
    segments, total = len(counts), float(counts.sum())
    if total < _TOO_FEW * stddev * segments:
        return None
    accuracy = float(np.trace(counts)) / total
    off = segments**2 - segments
    error = stddev / total * float(np.sqrt(segments * (1 - accuracy) ** 2 + off * accuracy**2))
    return min(max(accuracy, 0.0), 1.0), error


def macro_f1_of(counts: Float[np.ndarray, "S S"]) -> float:
    """Return the mean F1 over segments from noisy counts (negative counts read as zero)."""
    counts = np.clip(counts, 0.0, None)
    hits = np.diag(counts)
    whole = counts.sum(axis=0) + counts.sum(axis=1)
    return float(np.mean(np.divide(2 * hits, whole, out=np.zeros_like(hits), where=whole > 0)))


def metrics_document(evaluation: NoisySum, contract: Contract) -> dict[str, Any]:
    """Return the published metrics: all from one noisy confusion matrix."""
    segments = len(contract.segments.names)
    counts = evaluation.total.reshape(segments, segments)
    accuracy = accuracy_of(counts, evaluation.stddev)
    return {
        "format": "hansa/metrics/1",
        "note": "noisy; rows are true segments, columns predicted ones",
        "segments": list(contract.segments.names),
        "confusion": np.round(counts, 2).tolist(),
        "count_stddev": evaluation.stddev,
        "accuracy": None if accuracy is None else accuracy[0],
        "accuracy_error": None if accuracy is None else accuracy[1],
        "macro_f1": macro_f1_of(counts) if accuracy is not None else None,
    }


def segments_document(profile: NoisySum | None, contract: Contract) -> dict[str, Any]:
    """Return segments with noisy shares and profiles; what noise drowns is suppressed."""
    names, actions = contract.segments.names, contract.segments.actions
    published: list[dict[str, Any]] = [
        {"id": i, "name": name, "action": actions[i] if actions else ""}
        for i, name in enumerate(names)
    ]
    if profile is not None:
        rows = profile.total.reshape(len(names), 1 + contract.inputs)
        error = profile.stddev / np.sqrt(0.5)
        total = max(float(rows[:, 0].sum()) / np.sqrt(0.5), 1.0)
        for segment, row in zip(published, rows, strict=True):
            count = float(row[0]) / np.sqrt(0.5)
            known = count >= _TOO_FEW * error
            share = min(max(count / total, 0.0), 1.0)
            segment["share"] = share if known else None
            # noise of the count, and of the total that it is divided by
            spread = np.sqrt((1.0 - share) ** 2 + (len(names) - 1) * share**2)
            segment["share_error"] = float(error / total * spread) if known else None
            segment["profile"] = _profile(row[1:], count, profile.stddev, contract) if known else {}
    return {
        "format": "hansa/segments/1",
        "note": "noisy; null means suppressed: too few to tell from noise",
        "interval": "95 % of the noise, customers' own spread not included",
        "segments": published,
    }


def _profile(
    sums: Float[np.ndarray, " F"], count: float, stddev: float, contract: Contract
) -> dict[str, dict[str, Any]]:
    scale = np.sqrt(0.5 / contract.inputs)
    means = sums / scale / count
    # noise of the sum, and of the count that it is divided by
    errors = np.sqrt((stddev / scale) ** 2 + (means * stddev / np.sqrt(0.5)) ** 2) / count
    low, typical, high = (
        natural(contract, np.clip(means + z * errors, -1.0, 1.0))
        for z in (-_CONFIDENCE, 0.0, _CONFIDENCE)
    )
    return {
        item.label: {
            "typical": typical[i].value if errors[i] <= _TOO_VAGUE else None,
            "low": low[i].value if errors[i] <= _TOO_VAGUE else None,
            "high": high[i].value if errors[i] <= _TOO_VAGUE else None,
            "unit": item.unit,
        }
        for i, item in enumerate(inputs(contract))
    }


def towards_server(outcome: Outcome, contract: Contract) -> list[tuple[str, Event]]:
    """Return the run's events as seen by whoever sees a merchant's single messages."""
    releases = {(r.stage, r.event): r for r in plan_of(contract).releases()}
    return [
        (stage, releases[stage, event].towards_server(contract.exposed_contributors))
        for stage, event in outcome.events
    ]


def survivors(outcome: Outcome, contract: Contract) -> list[int]:
    """Return the merchants of every sum, the fewest that the contract allows where none came."""
    fewest = contract.min_survivors
    return [fewest if found is None else found for found in outcome.survivors]


def achieved_epsilon(outcome: Outcome, contract: Contract, colluders: int = 0) -> float:
    """Return epsilon by the noise that the sums really held; unbounded where nothing is left.

    In mode 'distributed' each of the n merchants of a sum adds a share of sigma^2 / m, where m is
    the number that the plan counts on. Colluders know and subtract their own shares, so sigma is
    that of the plan times sqrt((n - colluders) / m). In mode 'local' the share of one merchant is
    all of sigma^2, whoever colludes.

    Args:
        outcome: The run.
        contract: Its contract.
        colluders: Merchants in every sum that tell their noise to whoever looks.
    """
    events = [event for _, event in outcome.events]
    if contract.training.mode == "distributed":
        honest = [found - colluders for found in survivors(outcome, contract)]
        if min(honest) < 1:
            return math.inf
        m = contract.noise_contributors
        events = [
            replace(event, noise_multiplier=event.noise_multiplier * math.sqrt(shares / m))
            for event, shares in zip(events, honest, strict=True)
        ]
    return epsilon(events, contract.privacy.delta)


def colluder_counts(merchants: int) -> list[int]:
    """Return for how many colluders of a smallest sum a result tells epsilon.

    None, one, a tenth (rounded up) and the most that secure aggregation withstands in any case:
    just below a third.

    >>> colluder_counts(106), colluder_counts(2)
    ([0, 1, 11, 35], [0, 1])
    """
    return sorted({0, 1, -(-merchants // 10), (merchants - 1) // 3})


def privacy_document(outcome: Outcome, contract: Contract) -> dict[str, Any]:
    """Return everything that was released, and the epsilon of all of it together."""
    delta, mode = contract.privacy.delta, contract.training.mode
    secure = contract.aggregation.secure
    assessment = assess([event for _, event in outcome.events], delta)
    total = assessment.epsilon
    server = epsilon([event for _, event in towards_server(outcome, contract)], delta)
    cohorts = survivors(outcome, contract)
    fewest = min(cohorts)
    notes = [
        statements.sums_statement(mode, secure=secure, merchants=fewest),
        *([statements.NOT_FOR_RELEASE] if outcome.repeatable else []),
        *assessment.notes,
    ]
    colluding = {f: achieved_epsilon(outcome, contract, f) for f in colluder_counts(fewest)}
    return {
        "format": "hansa/privacy/1",
        "run": outcome.run,
        "contract_sha256": contract.sha256,
        "unit_of_privacy": statements.UNIT,
        "neighbouring_relation": statements.RELATION,
        "mechanism": "Gaussian noise on sums of clipped contributions",
        "model": mode,
        "secure_aggregation": secure,
        "epsilon": total,
        "delta": delta,
        "accountant": assessment.accountant,
        "epsilon_towards_server": server,
        "epsilon_cap": contract.privacy.epsilon,
        "noise_contributors": contract.noise_contributors,
        "achieved": {
            "epsilon": colluding[0],
            "survivors_min": fewest,
            "survivors_max": max(cohorts),
        },
        "colluders": [
            {"colluders": f, "epsilon": value if math.isfinite(value) else None}
            for f, value in colluding.items()
        ],
        "merchants": {merchant: total for merchant in outcome.merchants},
        "epsilon_by_stage": epsilon_by_stage(outcome, delta),
        "events": {
            stage: [to_document(event) for event in merged(_of_stage(outcome, stage))]
            for stage in dict.fromkeys(stage for stage, _ in outcome.events)
        },
        "assumptions": [
            *statements.ASSUMPTIONS,
            *(statements.MASKED_ASSUMPTIONS if secure else ()),
        ],
        "not_protected": list(statements.NOT_PROTECTED),
        "notes": notes,
    }


def epsilon_by_stage(outcome: Outcome, delta: float) -> dict[str, float]:
    """Return each stage's epsilon alone; the parts do not add up, because epsilon does not."""
    stages = dict.fromkeys(stage for stage, _ in outcome.events)
    return {stage: epsilon(_of_stage(outcome, stage), delta) for stage in stages}


def _of_stage(outcome: Outcome, stage: str) -> list[Event]:
    return [event for name, event in outcome.events if name == stage]
