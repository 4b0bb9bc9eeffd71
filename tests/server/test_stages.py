"""One stage: every node is asked once, answers are matched to questions, silence ends in time."""

import time
from collections.abc import Callable, Iterable

from flwr.app import ConfigRecord, Context, Message, RecordDict

from server.stages import Patience, StageResult, run_stage
from simulations.grid import Fault, InProcessGrid


def echo(message: Message, context: Context) -> Message:
    """Answer with the node's number."""
    number = int(context.node_config["partition-id"])
    return Message(RecordDict({"answer": ConfigRecord({"node": number})}), reply_to=message)


def ask(
    fault: Fault | None = None,
    client: Callable[[Message, Context], Message] = echo,
    grid_type: type[InProcessGrid] = InProcessGrid,
    timeout_s: float = 0.05,
) -> StageResult:
    """Ask four nodes."""
    grid = grid_type(client, 4, {}, fault)  # type: ignore[arg-type]
    contents = {node: RecordDict() for node in sorted(grid.get_node_ids())}
    return run_stage(grid, "query.x", contents, Patience(timeout_s))


def test_every_node_answers_under_its_own_id() -> None:
    """Contents are kept by the node that was asked."""
    result = ask()
    told = {node: content["answer"]["node"] for node, content in result.contents.items()}
    assert told == {2: 0, 3: 1, 4: 2, 5: 3}
    assert not result.errors
    assert not result.silent


def test_every_node_gets_a_message_of_its_own() -> None:
    """Contents differ from node to node, and a node that has none is not asked."""

    def repeat(message: Message, _context: Context) -> Message:
        return Message(message.content, reply_to=message)

    grid = InProcessGrid(repeat, 4, {})  # type: ignore[arg-type]
    contents = {node: RecordDict({"x": ConfigRecord({"secret": 10 * node})}) for node in (2, 4)}
    result = run_stage(grid, "query.x", contents, Patience(0.05))
    told = {node: content["x"]["secret"] for node, content in result.contents.items()}
    assert told == {2: 20, 4: 40}
    assert not result.silent


def test_a_lost_message_is_silence_after_the_timeout() -> None:
    """The others' answers are kept, and the wait ends."""
    began = time.monotonic()
    result = ask(lambda message: "silent" if message.metadata.dst_node_id == 4 else None)
    assert result.silent == {4}
    assert sorted(result.contents) == [2, 3, 5]
    assert time.monotonic() - began < 2.0


def test_an_error_reply_is_kept_with_its_text() -> None:
    """What Flower reports of a node is told, under the node that was asked."""
    result = ask(lambda message: "no such node" if message.metadata.dst_node_id == 3 else None)
    assert list(result.errors) == [3]
    assert "no such node" in result.errors[3]


def test_an_exception_of_the_client_app_is_an_error_reply() -> None:
    """It does not reach the coordinator as an exception."""

    def failing(message: Message, context: Context) -> Message:
        raise ZeroDivisionError("oh")

    result = ask(client=failing)
    assert sorted(result.errors) == [2, 3, 4, 5]
    assert all("ZeroDivisionError" in reason for reason in result.errors.values())


def test_answers_that_come_late_and_one_by_one_are_collected() -> None:
    """The stage goes on pulling until all are in."""

    class SlowGrid(InProcessGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            return super().pull_messages(list(message_ids)[:1])

    result = ask(grid_type=SlowGrid, timeout_s=5.0)
    assert sorted(result.contents) == [2, 3, 4, 5]


def test_a_message_that_flower_does_not_take_is_an_error_at_once() -> None:
    """An empty message id means that nothing was sent."""

    class RefusingGrid(InProcessGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            first, *others = super().push_messages(messages)
            self.pull_messages([first])
            return ["", *others]

    result = ask(grid_type=RefusingGrid)
    assert list(result.errors) == [2]
    assert sorted(result.contents) == [3, 4, 5]


def test_an_answer_to_another_question_is_not_counted() -> None:
    """A reply is matched by the question it names, not by who sent it."""

    class ConfusedGrid(InProcessGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            replies = list(super().pull_messages(message_ids))
            for reply in replies[1:]:
                reply.metadata.__dict__["_reply_to_message_id"] = "another question"
            return replies

    result = ask(grid_type=ConfusedGrid)
    assert list(result.contents) == [2]
    assert result.silent == {3, 4, 5}


def test_a_second_answer_to_one_question_is_not_counted() -> None:
    """The first answer stands."""

    class TwiceGrid(InProcessGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            replies = list(super().pull_messages(message_ids))
            return [*replies, *replies]

    assert sorted(ask(grid_type=TwiceGrid).contents) == [2, 3, 4, 5]


def test_nobody_to_ask_ends_at_once() -> None:
    """An empty cohort is an empty result."""
    grid = InProcessGrid(echo, 0, {})  # type: ignore[arg-type]
    assert run_stage(grid, "query.x", {}, Patience(60.0)) == StageResult()
