"""BlazeFL: FedAvg with its serial trainer, the fastest of its modes on two cores; no privacy."""

import sys

import torch
from blazefl.contrib.fedavg import FedAvgBaseClientTrainer, FedAvgBaseServerHandler
from torch.utils.data import DataLoader, TensorDataset
from torch_training import layers_of, model_of
from workload import Meter, Workload

meter, work = Meter(), Workload(sys.argv[1])
torch.set_num_threads(1)


class Models:
    """Gives the one model that there is."""

    def select_model(self, model_name):
        """Return the model."""
        return model_of(work.layers)


class Tables:
    """Gives each merchant's customers."""

    def get_dataset(self, type_, cid):
        """Return one merchant's customers."""
        return TensorDataset(torch.tensor(work.x[cid]), torch.tensor(work.y[cid]))

    def set_dataset(self, type_, cid, dataset):
        """Take nothing: the tables are what they are."""
        raise NotImplementedError

    def get_dataloader(self, type_, cid, batch_size, generator=None):
        """Return shuffled batches of one merchant's customers."""
        return DataLoader(self.get_dataset(type_, cid), batch_size, shuffle=True)


class Server(FedAvgBaseServerHandler):
    """Asks the workload's merchants."""

    def sample_clients(self):
        """Return the merchants of the round."""
        return sorted(work.cohorts[self.round].tolist())


merchants, rounds = len(work.x), len(work.cohorts)
share = work.cohorts.shape[1] / merchants + 1e-9  # BlazeFL rounds down
server = Server(Models(), "mlp", Tables(), rounds, merchants, share, "cpu", work.batch, 0)
trainer = FedAvgBaseClientTrainer(
    Models(), "mlp", Tables(), "cpu", merchants, 1, work.batch, work.learning_rate, 0
)
while not server.if_stop():
    chosen, sent = server.sample_clients(), server.downlink_package()
    trainer.local_process(sent, chosen)
    for package in trainer.uplink_package():
        server.load(package)
    meter.mark()
meter.report(work.accuracy(layers_of(server.model)))
