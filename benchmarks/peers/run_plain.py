"""A plain loop in PyTorch, nothing around it; `--opacus`: with Opacus' DP-SGD."""

import sys
from functools import partial

import torch
from torch_training import PrivateEpoch, epoch, layers_of, model_of
from workload import Meter, Workload


def main() -> None:
    """Carry out the rounds."""
    meter, work = Meter(), Workload(sys.argv[1])
    torch.set_num_threads(1)
    model = model_of(work.layers)
    if "--opacus" in sys.argv:
        private = PrivateEpoch(model, work.clip_norm, work.noise_multiplier)
        train = partial(private, batch=work.batch, steps=work.steps)
    else:
        train = partial(epoch, model, batch=work.batch)
    for cohort in work.cohorts:
        start = [one.detach().clone() for one in model.parameters()]
        total = [torch.zeros_like(one) for one in start]
        for merchant in cohort:
            with torch.no_grad():
                for own, first in zip(model.parameters(), start, strict=True):
                    own.copy_(first)
            x, y = torch.tensor(work.x[merchant]), torch.tensor(work.y[merchant])
            train(x, y, learning_rate=work.learning_rate)
            for added, own in zip(total, model.parameters(), strict=True):
                added.add_(own.detach())
        with torch.no_grad():
            for own, one in zip(model.parameters(), total, strict=True):
                own.copy_(one / len(cohort))
        meter.mark()
    meter.report(work.accuracy(layers_of(model)))


main()
