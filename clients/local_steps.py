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
    start = np.stack([task.start for task in tasks])
    tables = [task.table for task in tasks]
    unit = lattice_step(release.event.sensitivity, release.steps)
    scales = np.array([[scale_of(unit, task.batch)] for task in tasks])
    optimizer, sums = OwnOptimizer(training, start), np.empty_like(start)
    steps, length = training.local_steps, start.shape[1]
    sampling = [task.noise.spawn() for task in tasks]
    noise = [iter(_noise_rows(length, task, steps, release)) for task in tasks]
    for _ in range(steps):
        chosen = [
            stream.sampled(len(table), training.sampling_rate)
            for stream, table in zip(sampling, tables, strict=True)
        ]
        kernel.sums(optimizer.theta, tables, chosen, release.event.sensitivity, out=sums)
        for own, drawn in zip(sums, noise, strict=True):
            make_noisy(own, release, next(drawn))
        sums *= scales
        optimizer.step(sums)
    changes: Float64[np.ndarray, "K P"] = np.subtract(optimizer.theta, start, out=start)
    return changes


def _noise_rows(
    length: int, task: Task, steps: int, release: Release
) -> Iterator[Int64[np.ndarray, " P"]]:
    """Yield the noise of one step after the other."""
    left = steps
    while left:
        rows = noise_of_steps(release, length, left, task.noise)
        yield from rows
        left -= len(rows)
