"""pfl-research's simulated backend: FedAvg, the Gaussian mechanism on the sum (central noise)."""

import sys

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from pfl.privacy.gaussian_mechanism import GaussianMechanism
from pfl.privacy.privacy_mechanism import CentrallyAppliedPrivacyMechanism
from torch_training import layers_of, model_of
from workload import Meter, Workload

meter, work = Meter(), Workload(sys.argv[1])
torch.set_num_threads(1)


class Classifier(torch.nn.Module):
    """The model, with the two methods that pfl asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.network = model_of(work.layers)

    def loss(self, x, y):
        """Return the cross-entropy of a batch."""
        return torch.nn.functional.cross_entropy(self.network(x), y)

    def metrics(self, x, y):
        """Return nothing: no evaluation is asked for."""
        return {}


class Rounds(TrainingProcessCallback):
    """Marks the end of each round."""

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        """Mark; go on."""
        meter.mark()
        return False, Metrics()


def table(merchant: int) -> Dataset:
    """Return one merchant's customers, shuffled: a pass over them is an epoch."""
    order = torch.randperm(work.rows)
    x, y = torch.tensor(work.x[merchant]), torch.tensor(work.y[merchant])
    return Dataset([x[order], y[order]], user_id=str(merchant))


chosen = iter(work.cohorts.ravel().tolist())
data = FederatedDataset(table, lambda: next(chosen))
mechanism = GaussianMechanism(work.clip_norm, work.noise_multiplier)
backend = SimulatedBackend(data, data, [CentrallyAppliedPrivacyMechanism(mechanism)])
classifier = Classifier()
model = PyTorchModel(classifier, torch.optim.SGD, torch.optim.SGD(classifier.parameters(), lr=1.0))
rounds = len(work.cohorts)
FederatedAveraging().run(
    NNAlgorithmParams(rounds, rounds + 1, work.cohorts.shape[1], 0),
    backend,
    model,
    NNTrainHyperParams(
        local_num_epochs=1, local_learning_rate=work.learning_rate, local_batch_size=work.batch
    ),
    NNEvalHyperParams(local_batch_size=None),
    [Rounds()],
)
meter.report(work.accuracy(layers_of(classifier)))
