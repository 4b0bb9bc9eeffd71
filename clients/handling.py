"""From a message to a worker's answer, one table for every way that messages come in.

Flower's ClientApp (`clients.app`, simulations) and the worker's own socket
(`clients.worker_service`, deployments) answer by this table, so that what is tested in one holds
in the other. What goes wrong is told without a word about rows, files or this machine.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.errors import (
    BudgetRefusal,
    ReplayRefusal,
    RunError,
    WireError,
    WitnessRefusal,
)
from common.wire import (
    Advertise,
    Attest,
    Confirm,
    Record,
    Reveal,
    Share,
    SumRequest,
    pack,
    unpack,
)

if TYPE_CHECKING:
    from clients.worker import Worker

logger = logging.getLogger("hansa.merchant")


@dataclass(frozen=True)
class Handler:
    """What a message holds, and which method of the worker answers it."""

    kind: type[Any]
    method: str


HANDLERS: Mapping[str, Handler] = {
    "query.attest": Handler(Attest, "attest"),
    "query.advertise": Handler(Advertise, "advertise"),
    "query.share": Handler(Share, "share"),
    "query.census": Handler(SumRequest, "answer"),
    "train.update": Handler(SumRequest, "answer"),
    "evaluate.confusion": Handler(SumRequest, "answer"),
    "query.profile": Handler(SumRequest, "answer"),
    "query.confirm": Handler(Confirm, "confirm"),
    "query.reveal": Handler(Reveal, "reveal"),
}


def answered(
    find_worker: Callable[[], "Worker"],
    message_type: str,
    content: Record,
    on_message: Callable[[Any], None] = lambda _: None,
) -> Record:
    """Return the answer to a message.

    Args:
        find_worker: Gives the worker that answers.
        message_type: Which message it is.
        content: What it holds.
        on_message: Called with the typed message before it is answered.

    Raises:
        WireError: What is wrong with the message, or a ledger's refusal: both may be told.
        RunError: Anything else failed; the reason is in this merchant's log and nowhere else.
    """
    with _nothing_told():
        handler = HANDLERS.get(message_type)
        if handler is None:
            raise WireError(f"field 'type': a merchant has no answer to '{message_type[:40]}'")
        worker = find_worker()
        message = unpack(handler.kind, content)
        on_message(message)
        reply = getattr(worker, handler.method)(message)
    return pack(reply)


def answered_together(
    message_type: str, asked: Sequence[tuple["Worker", Record]]
) -> list[Callable[[], Record]]:
    """Return, for each merchant of this process, a function that does what `answered` would.

    Requests for a sum are answered by all of them at once (`clients.cohort`).
    """
    handler = HANDLERS.get(message_type)
    if handler is None or handler.kind is not SumRequest:
        return [
            lambda worker=worker, content=content: answered(  # type: ignore[misc]
                lambda: worker, message_type, content
            )
            for worker, content in asked
        ]
    from clients.cohort import answers

    requests: list[SumRequest | Exception] = []
    for _, content in asked:
        try:
            requests.append(unpack(SumRequest, content))
        except WireError as error:
            requests.append(error)
    usable = [
        (worker, request)
        for (worker, _), request in zip(asked, requests, strict=True)
        if isinstance(request, SumRequest)
    ]
    given = iter(answers(usable))
    return [
        _telling(next(given)) if isinstance(request, SumRequest) else _refusing(request)
        for request in requests
    ]


def _telling(give: Callable[[], Any]) -> Callable[[], Record]:
    def tell() -> Record:
        with _nothing_told():
            reply = give()
        return pack(reply)

    return tell


def _refusing(error: Exception) -> Callable[[], Record]:
    def refuse() -> Record:
        raise error

    return refuse


@contextmanager
def _nothing_told() -> Iterator[None]:
    """Keep the text of unexpected errors here: an exception's text reaches the coordinator."""
    try:
        yield
    except (WireError, BudgetRefusal, ReplayRefusal, WitnessRefusal):
        raise  # speak of message and budget alone; other errors name files, rows and columns
    except Exception as error:
        logger.exception("this merchant could not answer")
        raise RunError(
            f"the merchant's side failed ({type(error).__name__}); its own log says why"
        ) from None
