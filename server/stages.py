"""One stage of the protocol: a message to every member, their answers, and who stayed silent.

Over `Grid.push_messages` and `Grid.pull_messages`; Flower's `send_and_receive` sleeps three
seconds between polls and waits for ever by default.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

_POLL_S = 0.05


@dataclass
class StageResult:
    """What came back, by node id."""

    contents: dict[int, RecordDict] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)  # node -> what Flower reported
    silent: set[int] = field(default_factory=set)


def run_stage(
    grid: Grid,
    message_type: str,
    contents: Mapping[int, RecordDict],
    timeout_s: float,
) -> StageResult:
    """Send each node its message and collect answers until all are in or time is up."""
    result = StageResult()
    end = time.monotonic() + timeout_s
    messages = [
        Message(content, dst_node_id=node, message_type=message_type, ttl=timeout_s + 30)
        for node, content in contents.items()
    ]
    waiting: dict[str, int] = {}
    for message, message_id in zip(messages, grid.push_messages(messages), strict=True):
        node = message.metadata.dst_node_id
        if message_id:
            waiting[message_id] = node
        else:
            result.errors[node] = "Flower did not accept the message"
    while waiting:
        for reply in grid.pull_messages(list(waiting)):
            # errors made by the SuperLink do not carry the node's id: match by the question
            node = waiting.pop(reply.metadata.reply_to_message_id, -1)
            if node == -1:
                continue
            if reply.has_error():
                result.errors[node] = f"{reply.error.code}: {reply.error.reason}"
            else:
                result.contents[node] = reply.content
        if not waiting or time.monotonic() >= end:
            break
        time.sleep(_POLL_S)
    result.silent = set(waiting.values())
    return result
