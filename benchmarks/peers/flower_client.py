"""The ClientApp of `run_flower_ray`, in a module of its own: Ray's processes import it by name."""

from functools import lru_cache

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch_training import PrivateEpoch, model_of
from workload import Workload

client = ClientApp()


@lru_cache(maxsize=1)
def actor(folder: str) -> "tuple[Workload, PrivateEpoch]":
    """Return what an actor's process needs, made once."""
    torch.set_num_threads(1)
    work = Workload(folder)
    return work, PrivateEpoch(model_of(work.layers), work.clip_norm, work.noise_multiplier)


@client.train()
def train(message: Message, context) -> Message:
    """Take one merchant's epoch."""
    work, private = actor(str(message.content["config"]["folder"]))
    private.model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    merchant = int(context.node_config["partition-id"])
    x, y = torch.tensor(work.x[merchant]), torch.tensor(work.y[merchant])
    private(x, y, work.batch, work.steps, work.learning_rate)
    content = {
        "arrays": ArrayRecord(private.model.state_dict()),
        "metrics": MetricRecord({"num-examples": len(x)}),
    }
    return Message(RecordDict(content), reply_to=message)
