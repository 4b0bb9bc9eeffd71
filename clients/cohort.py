"""Many merchants of one process answer together: charged one by one, computed at once.

For simulations. Every merchant charges its own ledger, draws from its own streams, and gives the
very answer that it would give alone; only the gradients of all of them are one call.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from clients.kernel import kernel_of
from clients.local_steps import local_updates
from clients.worker import Charged, Worker
from common.network import network_of
from common.plan import UPDATE
from common.wire import SumAnswer, SumRequest

AT_ONCE = 32  # merchants; more gain nothing, and take memory

Given = Callable[[], SumAnswer]  # raises what `Worker.answer` would
Part = tuple[Worker, Charged]


def answers(asked: Sequence[tuple[Worker, SumRequest]]) -> list[Given]:
    """Return, for each merchant, a function that gives its answer or raises its error."""
    given: list[Given | None] = []
    together: list[tuple[int, Part]] = []
    for place, (worker, request) in enumerate(asked):
        try:
            charged = worker.charge(request)
        except Exception as error:  # noqa: BLE001  # told as the merchant alone would tell it
            given.append(_raising(error))
            continue
        if isinstance(charged, SumAnswer):
            given.append(_returning(charged))
        else:
            given.append(None)
            together.append((place, (worker, charged)))
    for start in range(0, len(together), AT_ONCE):
        group = together[start : start + AT_ONCE]
        for (place, _), one in zip(group, _computed([p for _, p in group]), strict=True):
            given[place] = one
    return [one for one in given if one is not None]


def _computed(parts: list[Part]) -> list[Given]:
    """Compute what was charged for: gradients together, everything else merchant by merchant."""
    alike = [part for part in parts if _has_gradients(part) and _alike(part, parts[0])]
    if len(alike) < len(parts):
        return [_alone(part) for part in parts]
    try:
        vectors = _vectors(parts)
    except Exception as error:  # noqa: BLE001  # all were charged, none can answer
        return [_raising(error) for _ in parts]
    return [_giving(part, vector) for part, vector in zip(parts, vectors, strict=True)]


def _has_gradients(part: Part) -> bool:
    worker, charged = part
    return charged.request.stage == UPDATE and worker.contract.training.engine == "fused"


def _alike(one: Part, other: Part) -> bool:
    """Tell whether two have the same contract, which each worker has checked."""
    return one[1].request.contract == other[1].request.contract


def _vectors(parts: Sequence[Part]) -> list[Int[np.ndarray, " P"]]:
    contract, release = parts[0][0].contract, parts[0][1].release
    network, training = network_of(contract), contract.training
    if training.mode == "local":
        kernel = kernel_of(network, "float32")
        tasks = [worker.task(charged, kernel) for worker, charged in parts]
        changes = local_updates(kernel, tasks, training, release)
        return [worker.update_of(one) for (worker, _), one in zip(parts, changes, strict=True)]
    kernel = kernel_of(network, "float64")
    exact = kernel.sums(
        np.stack([charged.request.parameters for _, charged in parts]),
        [worker.table(kernel) for worker, _ in parts],
        [None] * len(parts),
        release.event.sensitivity,
    )
    return [worker.noisy(charged, one) for (worker, charged), one in zip(parts, exact, strict=True)]


def _alone(part: Part) -> Given:
    worker, charged = part
    try:
        return _giving(part, worker.computed(charged))
    except Exception as error:  # noqa: BLE001  # told as the merchant alone would tell it
        return _raising(error)


def _giving(part: Part, vector: Int[np.ndarray, " P"]) -> Given:
    worker, charged = part
    return lambda: worker.give(charged, vector)


def _returning(answer: SumAnswer) -> Given:
    return lambda: answer


def _raising(error: Exception) -> Given:
    def give() -> SumAnswer:
        raise error

    return give
