"""FedJAX: FedAvg with its jitted loop over merchants, no privacy."""

import os
import sys

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import jax
import jax.numpy as jnp
import numpy as np
from workload import Meter, Workload

jax.tree_map = jax.tree_util.tree_map  # which FedJAX 0.0.17 still calls by its old name

import fedjax  # noqa: E402
from fedjax.algorithms import fed_avg  # noqa: E402

meter, work = Meter(), Workload(sys.argv[1])


def forward(params, x):
    """Return the logits of a batch."""
    for weights, bias in params[:-1]:
        x = jax.nn.relu(x @ weights.T + bias)
    weights, bias = params[-1]
    return x @ weights.T + bias


def loss(params, batch, rng):
    """Return the mean cross-entropy of a batch."""
    chosen = jnp.take_along_axis(
        jax.nn.log_softmax(forward(params, batch["x"])), batch["y"][:, None], axis=1
    )
    return -chosen.mean()


algorithm = fed_avg.federated_averaging(
    jax.grad(loss),
    fedjax.optimizers.sgd(work.learning_rate),
    fedjax.optimizers.sgd(1.0),
    fedjax.ShuffleRepeatBatchHParams(batch_size=work.batch, num_epochs=1, drop_remainder=False),
)
state = algorithm.init([(jnp.array(weights), jnp.array(bias)) for weights, bias in work.layers])
for number, cohort in enumerate(work.cohorts):
    keys = jax.random.split(jax.random.PRNGKey(number), len(cohort))
    clients = [
        (
            str(merchant),
            fedjax.ClientDataset(
                {"x": np.array(work.x[merchant]), "y": np.array(work.y[merchant])}
            ),
            key,
        )
        for merchant, key in zip(cohort, keys, strict=True)
    ]
    state, _ = algorithm.apply(state, clients)
    jax.block_until_ready(state.params)
    meter.mark()
meter.report(work.accuracy([(np.array(w), np.array(b)) for w, b in state.params]))
