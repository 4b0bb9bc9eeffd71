"""A merchant's own DP-SGD steps (mode `local`), for one merchant or many at once.

A step: choose customers (Poisson), sum their clipped gradients, round the sum to the lattice and
add integer noise, move the parameters (`clients.own_optimizers`). A merchant alone and the K-th
of many take the very same steps, to the last bit.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from clients.kernel import Kernel, Table
from clients.own_optimizers import OwnOptimizer, scale_of
from clients.release import make_noisy, noise_of_steps
from common.contract import Training
from common.fixed_point import lattice_step
from common.noise import NoiseSource
from common.plan import Release


@dataclass(frozen=True, eq=False)
class Task:
    """One merchant's part of a round.

    Attributes:
        table: Its customers, of the kernel's making.
        start: Parameters at the start of the round.
        batch: What a sum is divided by: the noisy average number of customers, times the
            sampling rate; never this merchant's own number.
        noise: Stream of this release alone: for sampling and for noise.
    """

    table: Table
    start: Float64[np.ndarray, " P"]
    batch: float
    noise: NoiseSource


def local_updates(
    kernel: Kernel, tasks: Sequence[Task], training: Training, release: Release
) -> Float64[np.ndarray, "K P"]:
    """Take `training.local_steps` steps for each task; return the parameters' changes.

    Each step's noise is that of `release`, for which the caller has charged the ledger: a change
    is post-processing of noisy sums.

    Args:
        kernel: Of the model's shape.
        tasks: One a merchant.
        training: Sampling rate, steps, and what `OwnOptimizer` reads.
        release: The planned release: clip norm, noise multiplier, lattice.
    """
    changes = np.empty((len(tasks), kernel.network.size))
    for task, change in zip(tasks, changes, strict=True):
        change[:] = task.start
        _take_steps(kernel, task, training, release, change)
    return changes


def _take_steps(
    kernel: Kernel,
    task: Task,
    training: Training,
    release: Release,
    change: Float64[np.ndarray, " P"],
) -> None:
    """Turn a copy of a task's start into what its steps changed.

    One merchant after the other, so that what its steps touch stays in the processor's cache.
    """
    optimizer = OwnOptimizer(training, task.start[None])
    sums, sampling = np.empty_like(optimizer.theta), task.noise.spawn()
    clip_norm = release.event.sensitivity
    scale = scale_of(lattice_step(clip_norm, release.steps), task.batch)
    for noise in _noise_rows(change.size, task, training.local_steps, release):
        chosen = sampling.sampled(len(task.table), training.sampling_rate)
        kernel.sums(optimizer.theta, [task.table], [chosen], clip_norm, out=sums)
        make_noisy(sums[0], release, noise, scale)
        optimizer.step(sums)
    np.subtract(optimizer.theta[0], change, out=change)


def _noise_rows(
    length: int, task: Task, steps: int, release: Release
) -> Iterator[Int64[np.ndarray, " P"]]:
    """Yield the noise of one step after the other."""
    left = steps
    while left:
        rows = noise_of_steps(release, length, left, task.noise)
        yield from rows
        left -= len(rows)
