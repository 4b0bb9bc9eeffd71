"""Flower's simulation engine on Ray, FedAvg, with Opacus' DP-SGD in its ClientApp."""

import os
import sys

import torch
from flower_client import client
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch_training import layers_of, model_of
from workload import Meter, Workload

FOLDER = sys.argv[1]
server = ServerApp()


@server.main()
def main(grid, context) -> None:
    """Carry out the rounds; no evaluation at merchants."""
    work = Workload(FOLDER)
    rounds, share = len(work.cohorts), work.cohorts.shape[1]
    strategy = FedAvg(
        fraction_train=share / len(work.x), fraction_evaluate=0.0, min_train_nodes=share
    )

    def ended(number: int, arrays: ArrayRecord) -> None:
        if number:
            meter.mark()

    model = model_of(work.layers)
    result = strategy.start(
        grid,
        ArrayRecord(model.state_dict()),
        rounds,
        train_config=ConfigRecord({"folder": FOLDER}),
        evaluate_fn=ended,
    )
    model.load_state_dict(result.arrays.to_torch_state_dict())
    meter.report(work.accuracy(layers_of(model)))


os.environ["PYTHONPATH"] = os.path.dirname(os.path.abspath(__file__))  # for Ray's processes
meter = Meter()
torch.set_num_threads(1)
run_simulation(
    server,
    client,
    len(Workload(FOLDER).x),
    backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
)
