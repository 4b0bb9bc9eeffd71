"""The in-process grid: real serialisation, one context a node, errors as a SuperNode sends them."""

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from simulations.grid import InProcessGrid, run_in_process


def make_app() -> ClientApp:
    """Make an app that doubles a vector, counts its calls, or fails."""
    app = ClientApp()

    @app.query("double")
    def double(message: Message, context: Context) -> Message:
        vector = message.content["arrays"]["x"].numpy()
        records = RecordDict({"arrays": ArrayRecord({"x": Array(vector * 2)})})
        return Message(records, reply_to=message)

    @app.query("count")
    def count(message: Message, context: Context) -> Message:
        seen = int(context.state.get("seen", ConfigRecord({"n": 0}))["n"]) + 1
        context.state["seen"] = ConfigRecord({"n": seen})
        told = {"n": seen, "node": int(context.node_config["partition-id"])}
        return Message(RecordDict({"told": ConfigRecord(told)}), reply_to=message)

    @app.query("fail")
    def fail(message: Message, context: Context) -> Message:
        raise ValueError("what went wrong")

    return app


def question(node: int, kind: str, **arrays: Any) -> Message:
    """Make a message."""
    records = RecordDict({"arrays": ArrayRecord({k: Array(v) for k, v in arrays.items()})})
    return Message(records, dst_node_id=node, message_type=kind)


def test_vectors_come_back_exactly() -> None:
    """Large integers survive both ways."""
    grid = InProcessGrid(make_app(), 1, {})
    vector = np.array([2**61, -(2**61), 1], dtype=np.int64)
    (reply,) = grid.send_and_receive([question(2, "query.double", x=vector)])
    np.testing.assert_array_equal(reply.content["arrays"]["x"].numpy(), vector * 2)


def test_the_app_gets_a_copy() -> None:
    """Nothing is shared between coordinator and merchant: a real wire shares nothing."""
    grid = InProcessGrid(lambda m, _c: Message(m.content, reply_to=m), 1, {})  # type: ignore[arg-type]
    sent = question(2, "query.x", x=np.zeros(3))
    (reply,) = grid.send_and_receive([sent])
    assert reply.content["arrays"]["x"] is not sent.content["arrays"]["x"]


def test_every_node_has_a_state_of_its_own() -> None:
    """State is kept between messages, and not shared."""
    grid = InProcessGrid(make_app(), 2, {})
    told = []
    for node in (2, 3, 2):
        (reply,) = grid.send_and_receive([question(node, "query.count")])
        told.append((reply.content["told"]["node"], reply.content["told"]["n"]))
    assert told == [(0, 1), (1, 1), (0, 2)]


def test_an_exception_becomes_an_error_reply() -> None:
    """With its text, as from a SuperNode."""
    grid = InProcessGrid(make_app(), 1, {})
    (reply,) = grid.send_and_receive([question(2, "query.fail")])
    assert reply.has_error()
    assert "what went wrong" in reply.error.reason


def test_an_unknown_message_type_becomes_an_error_reply() -> None:
    """Nothing else happens."""
    grid = InProcessGrid(make_app(), 1, {})
    (reply,) = grid.send_and_receive([question(2, "query.unknown")])
    assert reply.has_error()


def test_a_lost_message_has_no_reply_and_was_not_delivered() -> None:
    """Silence."""
    grid = InProcessGrid(make_app(), 1, {}, lambda _message: "silent")
    assert list(grid.send_and_receive([question(2, "query.count")])) == []
    assert len(grid.contexts[2].state) == 0


def test_a_reply_names_the_question() -> None:
    """Answers and errors alike are matched by it."""
    fates = iter([None, "broken"])
    grid = InProcessGrid(make_app(), 2, {}, lambda _message: next(fates))
    ids = list(grid.push_messages([question(2, "query.count"), question(3, "query.count")]))
    replies = list(grid.pull_messages(ids))
    assert [reply.metadata.reply_to_message_id for reply in replies] == ids
    assert [reply.has_error() for reply in replies] == [False, True]


def test_a_reply_is_given_once() -> None:
    """A second pull finds nothing, and unknown ids are no error."""
    grid = InProcessGrid(make_app(), 1, {})
    ids = list(grid.push_messages([question(2, "query.count")]))
    assert len(list(grid.pull_messages(ids))) == 1
    assert list(grid.pull_messages([*ids, "unknown"])) == []


def test_flowers_older_interface_is_there() -> None:
    """Runs and messages can be made and set."""
    grid = InProcessGrid(make_app(), 1, {})
    message = grid.create_message(RecordDict(), "query.count", 2, "group", 5.0)
    assert message.metadata.group_id == "group"
    run = grid.run
    grid.set_run(run)
    assert grid.run is run


def test_apps_meet_in_one_process() -> None:
    """The server's app sees every node and the run configuration."""
    seen = []
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        replies = grid.send_and_receive(
            [question(node, "query.count") for node in grid.get_node_ids()]
        )
        seen.extend([len(list(replies)), context.run_config["x"]])

    run_in_process(server_app, make_app(), 3, {"x": 7})
    assert seen == [3, 7]


def test_an_interruption_is_not_swallowed() -> None:
    """Ctrl-C ends the run, it is not an error reply."""

    def interrupted(message: Message, context: Context) -> Message:
        raise KeyboardInterrupt

    grid = InProcessGrid(interrupted, 1, {})  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        grid.send_and_receive([question(2, "query.x")])
