"""One private step beside plain PyTorch and Opacus.

    python -m benchmarks.dp_step --json FILE [--turns 7] [--opacus-turns 3]

One thread, float32, real Poisson batches, in turns within one run. A step is: take the batch's
rows, gradient, and for the private ones clipping, noise and the optimizer's step (SGD). Ours
draws its batch and its noise from a cryptographic stream (integer noise on a lattice, as a
merchant does it, `clients.local_steps`); plain SGD and Opacus draw batches and noise from torch's
generator, which nobody should use for privacy. CPU time, median over steps.

- `worst_ratio_to_plain_sgd`, `median_ratio_to_plain_sgd`: over all settings, ours / plain.
- `worst_speedup_over_opacus`, `median_speedup_over_opacus`: Opacus' fastest mode / ours.
- `noise_share`: of our step, by setting: what the cryptographic noise costs.
"""

import argparse
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import nn

from clients.kernel import Kernel
from clients.local_steps import Task, local_updates
from clients.release import make_noisy, noise_of_steps
from common.contract import Training
from common.events import PoissonGaussianSum
from common.fixed_point import float32_error, local_steps
from common.network import Network
from common.noise import NoiseSource
from common.plan import UPDATE, Release

SHAPES = ((16, 32, 16, 5), (32, 128, 64, 8), (128, 256, 128, 16))
BATCHES = (32, 128, 512, 2048)
RATE = 0.1
SIGMA, CLIP_NORM, LEARNING_RATE = 1.0, 1.0, 0.1
_STEPS = 20  # that one timing takes together

Step = Callable[[], None]


def _module(dims: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inp, out in itertools.pairwise(dims):
        layers += [nn.Linear(inp, out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Setting:
    """Customers of one shape and size, and everybody's step on them."""

    def __init__(self, dims: tuple[int, ...], batch: int) -> None:
        generator = np.random.default_rng(0)
        self.dims, self.batch = dims, batch
        self.rows = int(batch / RATE)
        self.x = generator.uniform(-1, 1, (self.rows, dims[0]))
        self.y = generator.integers(0, dims[-1], self.rows)
        self.inputs = torch.from_numpy(self.x).float()
        self.labels = torch.from_numpy(self.y)

    def _chosen(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows = (torch.rand(self.rows) < RATE).nonzero().flatten()
        return self.inputs.index_select(0, rows), self.labels.index_select(0, rows)

    def plain(self) -> Step:
        """Plain, non-private SGD."""
        module = _module(self.dims)
        optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)

        def step() -> None:
            x, y = self._chosen()
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
            optimizer.step()

        return step

    def opacus(self, mode: str) -> Step:
        """Opacus with per-sample gradients by hooks or functorch."""
        module = GradSampleModule(
            _module(self.dims), loss_reduction="mean", force_functorch=mode == "functorch"
        )
        optimizer = DPOptimizer(
            torch.optim.SGD(module.parameters(), lr=LEARNING_RATE),
            noise_multiplier=SIGMA,
            max_grad_norm=CLIP_NORM,
            expected_batch_size=self.batch,
        )

        def step() -> None:
            x, y = self._chosen()
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
            optimizer.step()

        return step

    def ghost(self) -> Step:
        """Opacus' fast gradient clipping."""
        module = GradSampleModuleFastGradientClipping(
            _module(self.dims),
            loss_reduction="mean",
            max_grad_norm=CLIP_NORM,
            use_ghost_clipping=True,
        )
        optimizer = DPOptimizerFastGradientClipping(
            torch.optim.SGD(module.parameters(), lr=LEARNING_RATE),
            noise_multiplier=SIGMA,
            max_grad_norm=CLIP_NORM,
            expected_batch_size=self.batch,
        )
        criterion = DPLossFastGradientClipping(
            module, optimizer, nn.CrossEntropyLoss(reduction="mean"), "mean"
        )

        def step() -> None:
            x, y = self._chosen()
            optimizer.zero_grad()
            criterion(module(x), y).backward()
            optimizer.step()

        return step

    def ours(self) -> Step:
        """`clients.local_steps`, as many steps a call as are timed together."""
        kernel = Kernel(Network(self.dims), "float32")
        training = Training(
            mode="local",
            local_steps=_STEPS,
            sampling_rate=RATE,
            local_learning_rate=LEARNING_RATE,
        )
        release = self._release()
        start = np.random.default_rng(1).normal(size=release.length) * 0.1
        task = Task(kernel.table(self.x, self.y), start, self.batch, NoiseSource.fresh())
        return lambda: void(local_updates(kernel, [task], training, release))

    def _release(self) -> Release:
        event = PoissonGaussianSum(SIGMA, CLIP_NORM, RATE, _STEPS)
        error, length = float32_error(self.dims), Network(self.dims).size
        return Release(UPDATE, event, length, 1, local_steps(SIGMA), error)

    def noise(self) -> Step:
        """Rounding and the cryptographic noise alone, of as many steps as are timed together."""
        size = Network(self.dims).size
        numbers, stream, release = np.zeros(size), NoiseSource.fresh(), self._release()

        def steps() -> None:
            left = _STEPS
            while left:
                rows = noise_of_steps(release, size, left, stream)
                left -= len(rows)
                for row in rows:
                    make_noisy(numbers, release, row, 1.0)
                    numbers.fill(0.0)

        return steps


def void(_: object) -> None:
    """Forget a result."""


def timed(step: Step, times: int) -> float:
    """Return the CPU seconds of calls."""
    start = time.process_time()
    for _ in range(times):
        step()
    return time.process_time() - start


def measure(dims: tuple[int, ...], batch: int, turns: int, opacus_turns: int) -> dict[str, Any]:
    """Measure one setting: microseconds a step of each, medians over the turns."""
    setting = Setting(dims, batch)
    steps = {
        "plain": (setting.plain(), _STEPS, turns),
        "ours": (setting.ours(), 1, turns),
        "noise": (setting.noise(), 1, turns),
        "opacus_hooks": (setting.opacus("hooks"), _STEPS // 4, opacus_turns),
        "opacus_functorch": (setting.opacus("functorch"), _STEPS // 4, opacus_turns),
        "opacus_ghost": (setting.ghost(), _STEPS // 4, opacus_turns),
    }
    for step, _, _ in steps.values():
        step()
    found: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(max(turns, opacus_turns)):
        for name, (step, times, most) in steps.items():
            if turn < most:
                taken = timed(step, times) / (_STEPS if name in {"ours", "noise"} else times)
                found[name].append(taken * 1e6)
    medians = {name: statistics.median(values) for name, values in found.items()}
    fastest = min(medians[name] for name in medians if name.startswith("opacus"))
    ratios = [own / plain for own, plain in zip(found["ours"], found["plain"], strict=True)]
    return {
        "dims": list(dims),
        "batch": batch,
        "microseconds": {name: round(value, 1) for name, value in medians.items()},
        "ratio_to_plain_sgd": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "speedup_over_opacus": fastest / medians["ours"],
        "noise_share": medians["noise"] / medians["ours"],
    }


def main() -> None:
    """Measure, print, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--opacus-turns", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="the smallest setting only")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # Opacus' hooks warn about inputs without gradients
    settings = [(SHAPES[0], BATCHES[0])] if chosen.quick else itertools.product(SHAPES, BATCHES)
    rows = [measure(*setting, chosen.turns, chosen.opacus_turns) for setting in settings]
    ratios = [row["ratio_to_plain_sgd"] for row in rows]
    speedups = [row["speedup_over_opacus"] for row in rows]
    found = {
        "worst_ratio_to_plain_sgd": max(ratios),
        "median_ratio_to_plain_sgd": statistics.median(ratios),
        "worst_speedup_over_opacus": min(speedups),
        "median_speedup_over_opacus": statistics.median(speedups),
        "settings": rows,
    }
    text = json.dumps(found, indent=1)
    print(text)
    if chosen.json:
        chosen.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
