"""The Flower ClientApp: hands every message to the merchant's worker.

Which merchant a node speaks for is the node's own matter: `merchant` in its node configuration
names a `merchant.toml`. In Flower's local simulation, where nodes are numbered and all files
belong to one person, node k takes the k-th merchant of the run's `federation` folder.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clients.handling import HANDLERS, answered
from clients.worker import Worker
from common.errors import PolicyError

FindWorker = Callable[[Context], Worker]


def create_app(find_worker: FindWorker) -> ClientApp:
    """Return a ClientApp whose messages are answered by the worker of their context."""
    client_app = ClientApp()

    def handle(message: Message, context: Context) -> Message:
        kind = message.metadata.message_type
        return Message(
            answered(lambda: find_worker(context), kind, message.content), reply_to=message
        )

    for message_type in HANDLERS:
        category, _, name = message_type.partition(".")
        getattr(client_app, category)(name)(handle)
    return client_app


def worker_of_node(context: Context) -> Worker:
    """Return the worker of the merchant that this node speaks for."""
    return _worker(merchant_file(context), simulated="merchant" not in context.node_config)


def merchant_file(context: Context) -> Path:
    """Return the `merchant.toml` of this node.

    Raises:
        PolicyError: The node's configuration names no merchant.
    """
    stated = context.node_config.get("merchant")
    if stated:
        return Path(str(stated))
    number, federation = (
        context.node_config.get("partition-id"),
        context.run_config.get("federation"),
    )
    if number is None or not federation:
        raise PolicyError(
            'this node speaks for no merchant: set merchant="/path/merchant.toml" in its '
            "--node-config (or, in Flower's simulation, federation in the run configuration)"
        )
    folders = sorted(Path(str(federation), "merchants").glob("*/merchant.toml"))
    if not 0 <= int(number) < len(folders):
        raise PolicyError(
            f"{federation}: has {len(folders)} merchants, there is none for node {number}; "
            f"start the simulation with num-supernodes={len(folders)}"
        )
    return folders[int(number)]


@lru_cache(maxsize=256)
def _worker(path: Path, *, simulated: bool) -> Worker:
    from clients.joining import open_worker

    opened = open_worker(path)
    if opened.seed is not None and not simulated:
        raise PolicyError(
            f"{path}: simulation.seed makes the noise guessable; remove it to take part in a run"
        )
    return opened.worker


app = create_app(worker_of_node)
