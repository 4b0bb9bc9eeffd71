"""Time one round of Flower's own SecAgg+, the yardstick for ours.

Only Flower's functions run here: the stage functions of its client mod and, in the order of its
`SecAggPlusWorkflow`, the functions its server calls. The graph is complete, a secret needs
`2n // 3 + 1` of its n shares, and every other setting is Flower's default. Times are CPU seconds
(`time.process_time`, all threads) of the cryptography and arithmetic alone: messages, the state
record between stages and `Strategy.aggregate_fit` are left out, in Flower's favour.

    python benchmarks/flower_secagg.py --merchants 50 --length 10000
"""

import argparse
import json
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from importlib.metadata import version
from statistics import median
from time import process_time
from typing import Any, Self

import numpy as np
from flwr.app import ConfigRecord
from flwr.client.mod.secure_aggregation.secaggplus_mod import (
    SecAggPlusState,
    _collect_masked_vectors,
    _setup,
    _share_keys,
    _unmask,
)
from flwr.common import (
    Parameters,
    bytes_to_ndarray,
    ndarray_to_bytes,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt, generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_combine,
    factor_extract,
    get_parameters_shape,
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import dequantize, quantize
from flwr.common.secure_aggregation.secaggplus_constants import Key
from flwr.common.secure_aggregation.secaggplus_utils import (
    pseudo_rand_gen,
    share_keys_plaintext_concat,
)
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key

Arrays = list[np.ndarray[Any, Any]]


class Clock:
    """Add up the CPU seconds spent inside its `with` blocks."""

    seconds = 0.0

    def __enter__(self) -> Self:
        self._start = process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += process_time() - self._start


def client_seconds(n: int, length: int, clients: int = 1) -> float:
    """Return the CPU seconds of one client in all four stages of a round; no client drops out.

    Args:
        n: Clients in the round, 4 or more; each is every other's neighbour.
        length: Entries of the update, one float32 array.
        clients: Clients to measure, each in a round of its own; the median is returned.

    The peers' key pairs are real. Their encrypted shares are made from the measured client's
    own, which have the same length: a client stores shares and never looks into them.
    """
    return median(_client_once(n, length) for _ in range(clients))


def server_seconds(n: int, length: int, dropouts: int = 0) -> float:
    """Return the CPU seconds of the server to sum and unmask one round; extrapolated.

    Flower combines all the shares it received, per client: the private seed of each survivor, the
    secret key of each dropout. Every such reconstruction costs the same, so one of each kind is
    measured (median of 2) and multiplied by their number. All else runs in full: decode and add
    the masked vectors, expand and subtract every mask, dequantize. The masked vectors are uniform
    integers, as real ones look; `check` runs the same functions on real ones.

    Args:
        n: Clients in the round, 4 or more; each is every other's neighbour.
        length: Entries of the update.
        dropouts: Clients that shared their keys and then sent no vector.
    """
    workflow, states = _workflow(n), _members(n)
    survivors, dropped = states[dropouts:], states[:dropouts]
    if len(survivors) < workflow.reconstruction_threshold:
        raise ValueError(f"Expected fewer dropouts among {n} clients, got {dropouts}")
    messages = [_uniform_message(length, workflow.modulus_range) for _ in survivors]
    seeds = {state.nid: os.urandom(32) for state in survivors}
    secret_keys = {state.nid: state.sk1 for state in dropped}
    with Clock() as clock:
        total = _sum(messages, workflow)
        total = _without_masks(total, seeds, secret_keys, _first_public_keys(states), workflow)
        _decode(total, len(survivors), workflow)
    seconds = clock.seconds
    for secrets in (seeds, secret_keys):
        if secrets:
            secret = next(iter(secrets.values()))
            seconds += len(secrets) * _reconstruction_seconds(secret, workflow, len(survivors))
    return seconds


def check(n: int = 4, length: int = 7) -> None:
    """Run whole small rounds, without and with a dropout; raise unless the sum is exact.

    All clients run all their stages on each other's real messages. The functions timed in
    `server_seconds` must then give the sum of the survivors' quantized updates to the last bit,
    and their mean to one quantization step.
    """
    for dropouts in (0, 1):
        _check_round(n, length, dropouts)


def _client_once(n: int, length: int) -> float:
    settings, clock = _settings(_workflow(n)), Clock()
    update, state = _update(length), SecAggPlusState(nid=1)
    with clock:
        _setup(state, settings)
    directory = _directory([state, *_members(n)[1:]])
    with clock:
        _share_keys(state, directory)
    inbox = _stand_in_inbox(state)
    with clock:
        _collect_masked_vectors(state, inbox, round(state.max_weight), update)
    request = _unmask_request(range(1, n + 1), [])
    with clock:
        _unmask(state, request)
    return clock.seconds


def _reconstruction_seconds(secret: bytes, workflow: SecAggPlusWorkflow, received: int) -> float:
    shares = create_shares(secret, workflow.reconstruction_threshold, workflow.num_shares)
    times = []
    for _ in range(2):
        with Clock() as clock:
            combined = combine_shares(shares[:received])
        times.append(clock.seconds)
    _require(combined == secret, "a reconstructed secret")
    return median(times)


def _check_round(n: int, length: int, dropouts: int) -> None:
    workflow, states = _workflow(n), _members(n)
    survivors, dropped = states[dropouts:], states[:dropouts]
    inboxes = _exchange(states)
    updates = [_update(length) for _ in survivors]
    vectors = [
        _masked(state, inboxes[state.nid], update)
        for state, update in zip(survivors, updates, strict=True)
    ]
    secrets = _secrets(survivors, dropped)
    seeds = {state.nid: secrets[state.nid] for state in survivors}
    secret_keys = {state.nid: secrets[state.nid] for state in dropped}
    total = _sum(vectors, workflow)
    total = _without_masks(total, seeds, secret_keys, _first_public_keys(states), workflow)
    _check_sum(total, [parameters_to_ndarrays(update) for update in updates], workflow)


def _check_sum(total: Arrays, plain: list[Arrays], workflow: SecAggPlusWorkflow) -> None:
    expected = _quantized_sum(plain, workflow)
    equal = [np.array_equal(a, b) for a, b in zip(total, expected, strict=True)]
    _require(all(equal), "the sum of the quantized updates")
    step = 2 * workflow.clipping_range / workflow.quantization_range
    error = _decode(total, len(plain), workflow)[0] - np.mean([p[0] for p in plain], axis=0)
    _require(float(np.abs(error).max()) <= step, "the mean update")


def _masked(state: SecAggPlusState, inbox: ConfigRecord, update: Parameters) -> list[bytes]:
    """Run the collect stage; the client's weight is Flower's largest, so its factor is one."""
    reply = _seeded(_collect_masked_vectors, state, inbox, round(state.max_weight), update)
    return reply[Key.MASKED_PARAMETERS]


def _quantized_sum(plain: list[Arrays], workflow: SecAggPlusWorkflow) -> Arrays:
    """Sum what every client quantized, its factor before it."""
    clip, steps = workflow.clipping_range, workflow.quantization_range
    parts = [factor_combine(steps, _seeded(quantize, arrays, clip, steps)) for arrays in plain]
    return [np.sum(arrays, axis=0) for arrays in zip(*parts, strict=True)]


def _seeded(work: Callable[..., Any], *arguments: Any) -> Any:
    """Fix numpy's global generator, from which Flower draws its stochastic rounding."""
    np.random.seed(0)
    return work(*arguments)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise RuntimeError(f"The driven round does not give {what}")


def _workflow(n: int) -> SecAggPlusWorkflow:
    return SecAggPlusWorkflow(num_shares=n, reconstruction_threshold=2 * n // 3 + 1)


def _settings(workflow: SecAggPlusWorkflow) -> ConfigRecord:
    """Return what the server sends in the set-up stage."""
    return ConfigRecord(
        {
            Key.SAMPLE_NUMBER: workflow.num_shares,
            Key.SHARE_NUMBER: workflow.num_shares,
            Key.THRESHOLD: workflow.reconstruction_threshold,
            Key.CLIPPING_RANGE: workflow.clipping_range,
            Key.TARGET_RANGE: workflow.quantization_range,
            Key.MOD_RANGE: workflow.modulus_range,
            Key.MAX_WEIGHT: workflow.max_weight,
        }
    )


def _members(n: int) -> list[SecAggPlusState]:
    """Return clients 1 to n after the set-up stage."""
    settings = _settings(_workflow(n))
    states = [SecAggPlusState(nid=nid) for nid in range(1, n + 1)]
    for state in states:
        _setup(state, settings)
    return states


def _directory(states: list[SecAggPlusState]) -> ConfigRecord:
    """Return what the server sends in the share-keys stage: everybody's public keys."""
    return ConfigRecord({str(state.nid): [state.pk1, state.pk2] for state in states})


def _first_public_keys(states: list[SecAggPlusState]) -> dict[int, bytes]:
    return {state.nid: state.pk1 for state in states}


def _exchange(states: list[SecAggPlusState]) -> dict[int, ConfigRecord]:
    """Run the share-keys stage of every client; return each one's inbox."""
    sources, ciphertexts = defaultdict(list), defaultdict(list)
    for state in states:
        reply = _share_keys(state, _directory(states))
        pairs = zip(reply[Key.DESTINATION_LIST], reply[Key.CIPHERTEXT_LIST], strict=True)
        for nid, ciphertext in pairs:
            sources[nid].append(state.nid)
            ciphertexts[nid].append(ciphertext)
    return {s.nid: _inbox(sources[s.nid], ciphertexts[s.nid]) for s in states}


def _stand_in_inbox(state: SecAggPlusState) -> ConfigRecord:
    """Return messages as the peers would send them, holding copies of the client's own shares."""
    own = (state.rd_seed_share_dict[state.nid], state.sk1_share_dict[state.nid])
    ciphertexts = [
        encrypt(key, share_keys_plaintext_concat(nid, state.nid, *own))
        for nid, key in state.ss2_dict.items()
    ]
    return _inbox(list(state.ss2_dict), ciphertexts)


def _inbox(sources: list[int], ciphertexts: list[bytes]) -> ConfigRecord:
    return ConfigRecord({Key.SOURCE_LIST: sources, Key.CIPHERTEXT_LIST: ciphertexts})


def _unmask_request(active: Any, dead: Any) -> ConfigRecord:
    return ConfigRecord({Key.ACTIVE_NODE_ID_LIST: list(active), Key.DEAD_NODE_ID_LIST: list(dead)})


def _update(length: int) -> Parameters:
    update = np.random.default_rng().standard_normal(length, dtype=np.float32)
    return ndarrays_to_parameters([update])


def _uniform_message(length: int, modulus: int) -> list[bytes]:
    """Return a vector that looks masked: the factor and the entries, uniform in the ring."""
    generator = np.random.default_rng()
    return [ndarray_to_bytes(generator.integers(modulus, size=size)) for size in (1, length)]


def _secrets(survivors: list[SecAggPlusState], dropped: list[SecAggPlusState]) -> dict[int, bytes]:
    """Run the unmask stage of every survivor; combine all shares, as the workflow does."""
    request = _unmask_request([s.nid for s in survivors], [s.nid for s in dropped])
    collected = defaultdict(list)
    for state in survivors:
        reply = _unmask(state, request)
        for nid, share in zip(reply[Key.NODE_ID_LIST], reply[Key.SHARE_LIST], strict=True):
            collected[nid].append(share)
    return {nid: combine_shares(shares) for nid, shares in collected.items()}


def _sum(messages: list[list[bytes]], workflow: SecAggPlusWorkflow) -> Arrays:
    """Add the masked vectors as `collect_masked_vectors_stage` does."""
    total: Arrays | None = None
    for message in messages:
        vector = [bytes_to_ndarray(part) for part in message]
        total = vector if total is None else parameters_addition(total, vector)
    return parameters_mod(total or [], workflow.modulus_range)


def _without_masks(
    total: Arrays,
    seeds: Mapping[int, bytes],
    secret_keys: Mapping[int, bytes],
    public_keys: Mapping[int, bytes],
    workflow: SecAggPlusWorkflow,
) -> Arrays:
    """Take the masks off as `unmask_stage` does, given the secrets it has reconstructed."""
    for seed in seeds.values():
        mask = pseudo_rand_gen(seed, workflow.modulus_range, get_parameters_shape(total))
        total = parameters_subtraction(total, mask)
    for nid, secret_key in secret_keys.items():
        for neighbour in public_keys.keys() - {nid}:
            key = generate_shared_key(
                bytes_to_private_key(secret_key), bytes_to_public_key(public_keys[neighbour])
            )
            mask = pseudo_rand_gen(key, workflow.modulus_range, get_parameters_shape(total))
            apply = parameters_addition if nid > neighbour else parameters_subtraction
            total = apply(total, mask)
    return parameters_mod(total, workflow.modulus_range)


def _decode(total: Arrays, survivors: int, workflow: SecAggPlusWorkflow) -> Arrays:
    """Turn the unmasked sum into the weighted mean as `unmask_stage` does."""
    factor, parts = factor_extract(total)
    mean = dequantize(parts, workflow.clipping_range, workflow.quantization_range)
    for index in range(len(mean)):
        mean[index] += -(survivors - 1) * workflow.clipping_range
        mean[index] *= workflow.quantization_range / factor
    return mean


def measure(n: int, length: int, clients: int = 1, dropouts: int = 0) -> dict[str, Any]:
    """Check the driven round, then measure one; return what the command prints."""
    check()
    return {
        "client_s": client_seconds(n, length, clients),
        "server_s": server_seconds(n, length, dropouts),
        "merchants": n,
        "length": length,
        "dropouts": dropouts,
        "server_extrapolated": True,
        "flwr": version("flwr"),
    }


def main() -> None:
    """Print one measurement as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--merchants", type=int, default=50)
    parser.add_argument("--length", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=3, help="clients to measure, each alone")
    parser.add_argument("--dropouts", type=int, default=0)
    wanted = parser.parse_args()
    print(json.dumps(measure(wanted.merchants, wanted.length, wanted.clients, wanted.dropouts)))


if __name__ == "__main__":
    main()
