"""Every field of every message of a secure sum, spoiled in every way, thrown at both halves.

Claims, for each message that differs from the honest one:

- A merchant either refuses it with an error that names a field, and remembers exactly what it
  did before; or what it sends and remembers is bound to what the message said: a context, a
  roster or a statement that is the honest one only if the message says the same. Boxes, codes
  and shares that it acts on are the honest ones. A countersignature that it has need not come
  again; none but the witness's own, of its own ledger, is taken.
- The coordinator either refuses it, naming a field, or the sum in the end is right, or it is
  lost with a reason. The one exception is a masked vector, which nobody could know to be wrong:
  what was changed in it, modulo the ring, is changed in the sum, and nothing else.
"""

import random
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from clients.app import create_app
from clients.secure_sum import State, state_to_bytes
from common.chain import Head
from common.errors import HansaError, SecureSumError, WireError
from common.ledger import Ledger
from common.session import (
    Advert,
    Roster,
    from_bitmap,
    occasion_hash,
    session_context,
    step_context,
    survivors_statement,
    to_bitmap,
)
from common.wire import (
    Advertise,
    Advertised,
    Attest,
    Attested,
    Confirm,
    Confirmed,
    Reveal,
    Revealed,
    Share,
    Shared,
    SumAnswer,
    SumRequest,
    pack,
    unpack,
)
from server.secure_sum import CoordinatorSession
from simulations.grid import FIRST_NODE, InProcessGrid
from tests.adversary.secure_world import (
    CONTEXT,
    LABEL,
    LENGTH,
    Server,
    Shops,
    advertised,
    occasion,
    planted,
    shops,
)
from tests.wire_fields import closed, opened
from tests.witnessed import still_head, witness

EACH = 200  # spoiled messages a field
MERCHANTS = 4
ASKED: dict[type[Any], str] = {
    Attest: "query.attest",
    Advertise: "query.advertise",
    Share: "query.share",
    SumRequest: "train.update",
    Confirm: "query.confirm",
    Reveal: "query.reveal",
}
COUNTED: dict[str, int] = {}  # test -> messages thrown

Generator = random.Random
Pool = dict[str, list[Any]]  # values of the same field, of other members and steps


def some_bytes(generator: Generator, count: int) -> bytes:
    """Return repeatable bytes."""
    return generator.randbytes(count)


def spoiled_bytes(generator: Generator, raw: bytes, pool: list[Any]) -> Any:
    """Return other bytes."""
    changed = bytearray(raw)
    kind = generator.randrange(8)
    if kind <= 2 and raw:
        for _ in range(generator.choice([1, 1, 1, 2, 9])):
            changed[generator.randrange(len(raw))] ^= 1 << generator.randrange(8)
        return bytes(changed)
    if kind == 3:
        return raw[: generator.randrange(len(raw) + 1)]
    if kind == 4:
        return raw + some_bytes(generator, generator.choice([1, 2, 16, 33, 80]))
    if kind == 5 and pool:
        return generator.choice(pool)
    if kind == 6:
        return some_bytes(generator, len(raw))
    return generator.choice([b"", bytes(len(raw)), b"\xff" * len(raw), raw[::-1], raw[1:]])


def spoiled_text(generator: Generator, text: str, pool: list[Any]) -> Any:
    """Return another text."""
    at = generator.randrange(len(text) + 1)
    odd = generator.choice(["\0", "'", "é", "\u202e", "x", " ", "\n", "%s", "../", "{}"])
    return generator.choice(
        [
            text[:at],
            text[:at] + odd + text[at:],
            text[at:] + text[:at],
            "",
            odd,
            text * 50,
            text.upper(),
            str(generator.random()),
            *pool,
        ]
    )


def spoiled_whole(generator: Generator, value: int, pool: list[Any]) -> Any:
    """Return another whole number."""
    return generator.choice(
        [
            value + 1,
            value - 1,
            value + generator.randrange(2, 99),
            -1,
            0,
            2**31 - 1,
            2**31,
            2**62,
            -(2**62),
            1 << generator.randrange(62),
            generator.randrange(2**40),
            *pool,
        ]
    )


def spoiled_number(generator: Generator, value: float, pool: list[Any]) -> Any:
    """Return another number."""
    return generator.choice(
        [
            float("nan"),
            float("inf"),
            -float("inf"),
            -1.0,
            0.0,
            -0.0,
            1e308,
            value * 2,
            generator.uniform(0, 100),
            float(np.nextafter(value, 99.0)),
            *pool,
        ]
    )


def spoiled_parts(generator: Generator, parts: list[bytes], pool: list[Any]) -> Any:
    """Return another list of bytes."""
    at, other = generator.randrange(len(parts)), generator.randrange(len(parts))
    changed = list(parts)
    kind = generator.randrange(8)
    if kind <= 3:
        changed[at] = spoiled_bytes(generator, parts[at], pool)
    elif kind == 4:
        del changed[at]
    elif kind == 5:
        changed[at], changed[other] = changed[other], changed[at]
    elif kind == 6:
        changed.insert(at, parts[other])
    else:
        changed = generator.choice([[], parts * 300, parts[::-1], parts[:1], [b""]])
    return changed


SPOIL: dict[type[Any], Callable[[Generator, Any, list[Any]], Any]] = {
    bytes: spoiled_bytes,
    str: spoiled_text,
    int: spoiled_whole,
    float: spoiled_number,
    list: spoiled_parts,
    bool: lambda _generator, value, _pool: not value,
}
OTHER_TYPES: list[Any] = [
    1, 0, -5, 1.5, True, False, "text", b"bytes", [1, 2], [1.5], ["a"], [b"a"], [True], [],
]  # fmt: skip


def spoil_vector(generator: Generator, config: dict[str, Any]) -> None:
    """Change a message's vector, its description, or take one of them away."""
    kind = generator.randrange(7)
    if kind <= 1:
        config["vector"] = spoiled_bytes(generator, config["vector"], [])
    elif kind == 2:
        known = ["float32", "float64", "uint32", "uint64", "int64", "object", "", "<f8", "O"]
        config["vector_dtype"] = generator.choice(known)
    elif kind == 3:
        del config[generator.choice(["vector", "vector_dtype"])]
    elif kind == 4:
        config[generator.choice(["vector", "vector_dtype"])] = generator.choice(OTHER_TYPES)
    else:
        values = np.frombuffer(config["vector"], dtype=config["vector_dtype"]).copy()
        chosen = generator.randrange(len(values))
        if values.dtype.kind == "f":
            values[chosen] = generator.choice([np.nan, np.inf, 1e9, 1e308, 0.5, -1e-300])
        else:
            values[chosen] ^= values.dtype.type(generator.randrange(1, 2**31))
        cut = generator.choice([values, values, values[:-1], np.tile(values, 2), values[:0]])
        config["vector"] = cut.tobytes()


def spoiled_records(
    message: Any, field: str, generator: Generator, pool: list[Any]
) -> Iterator[RecordDict]:
    """Yield records without end in which one field differs from the honest message's."""
    huge = 0
    while True:
        config = opened(pack(message))
        if field in ("vector", "parameters"):
            spoil_vector(generator, config)
            yield closed(config)
            continue
        value = config[field]
        kind = generator.randrange(12)
        if kind == 0:
            del config[field]
        elif kind == 1:
            config[field] = generator.choice(
                [other for other in OTHER_TYPES if type(other) is not type(value)]
            )
        elif kind == 2 and isinstance(value, bytes | str) and huge < 3:
            huge += 1
            config[field] = (b"\0" if isinstance(value, bytes) else "x") * (2**20 + 1)
        else:
            config[field] = SPOIL[type(value)](generator, value, pool)
        if config.get(field) == value and type(config.get(field)) is type(value):
            continue
        yield closed(config)


def different(records: Iterator[RecordDict], honest: RecordDict) -> Iterator[RecordDict]:
    """Leave out records that are the honest one, and those that came before."""
    seen = {fingerprint(honest)}
    for record in islice(records, 6 * EACH):
        mark = fingerprint(record)
        if mark not in seen:
            seen.add(mark)
            yield record


def fingerprint(record: RecordDict) -> str:
    """Return what tells two records apart."""
    return repr(opened(record))


def fields_of(message: Any) -> list[str]:
    """Return the names of all fields, and of the two of every message."""
    return ["protocol", "type", *vars(message)]


class FreeLedger:
    """Takes every charge, so that no limit stands between a message and the session.

    What the witness says is checked by a real ledger, which stays as it was opened.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def accept(self, countersigned: bytes) -> None:
        """Check what the witness says."""
        self._ledger.accept(countersigned)

    def reserve(self, *about: object) -> Head:
        """Check what the witness says, which comes last; return the head as it always is."""
        countersigned = about[-1]
        assert isinstance(countersigned, bytes)
        self.accept(countersigned)
        (entry,) = self._ledger.entries()
        return Head(entry.seq, entry.link, entry.signature, entry.seq, ())

    join = release = reserve

    def check_affordable(self, *_about: object) -> None:
        """Allow it."""

    def note_sum(self, *_about: object) -> None:
        """Forget it."""


@dataclass
class Moment:
    """A message that a merchant waits for, and what it remembers then."""

    message: Any
    before: State | None
    pool: Pool


def moments(found: Shops) -> list[Moment]:
    """Lead real merchants through a session and a half; stop before each message to the first."""
    sha256, everyone = found.contract.sha256, to_bitmap(range(MERCHANTS), MERCHANTS)
    kept: list[Moment] = [Moment(Attest("run", sha256), None, {"run": ["run2"]})]
    first = found.workers[0]

    def remember(message: Any, **pool: list[Any]) -> None:
        kept.append(Moment(message, deepcopy(found.stores[0].load()), pool))

    found.set_up(1, "old")
    old_roster = found.rosters[1]
    old_escrows = dict(found.escrows)
    seen = [found.countersigned(position) for position in range(MERCHANTS)]
    begin = Advertise("run", sha256, 1, seen[0])
    remember(begin, run=["old"], contract=["0" * 64], countersigned=seen[1:])
    found.advertise()
    remember(found.share_message(0), roster=old_roster, run=["old"], countersigned=seen[1:])
    found.share()
    others = [found.request(position, 1).boxes for position in range(1, MERCHANTS)]
    old = b"".join(old_escrows[1, 1, p].box(0) for p in range(1, MERCHANTS))
    remember(
        found.request(0, 1),
        boxes=[*others, old],
        run=["old"],
        countersigned=seen[1:],
        stage=["census", "evaluation", "profile", "update"],
        active=[to_bitmap(chosen, MERCHANTS) for chosen in ([0, 1, 2], [0, 1], [1, 2, 3], [0])],
    )
    for position in range(MERCHANTS):
        assert not found.ask(position, 1).refusal
    fewer = [to_bitmap(chosen, MERCHANTS) for chosen in ([0, 1, 2], [0, 2, 3], [0, 1], [1, 2, 3])]
    remember(Confirm(1, 1, everyone), survivors=fewer)
    codes = found.confirm(1)
    messages = [found.reveal_message(position, 1, codes) for position in range(MERCHANTS)]
    remember(
        messages[0],
        confirmations=[m.confirmations for m in messages[1:]] + [messages[0].confirmations[:32]],
        confirmed=fewer,
    )
    assert first.reveal(messages[0]).shares
    return kept


class Merchant:
    """The first merchant behind a real grid; put back to a moment before every message."""

    def __init__(self, found: Shops) -> None:
        self.found = found
        app = create_app(lambda _context: found.workers[0])
        self.grid = InProcessGrid(app, 1, {})

    def at(self, moment: Moment) -> None:
        """Go back to a moment."""
        self.found.stores[0].erase()
        if moment.before is not None:
            self.found.stores[0].save(deepcopy(moment.before))

    def remembers(self) -> bytes:
        """Return all that the merchant remembers."""
        try:
            return state_to_bytes(self.found.stores[0].load())
        except SecureSumError:
            return b""

    def state(self) -> State:
        """Return what the merchant remembers."""
        return self.found.stores[0].load()

    def send(self, kind: type[Any], record: RecordDict) -> Message:
        """Deliver one message over the wire and return the reply."""
        message = Message(record, FIRST_NODE, ASKED[kind])
        (reply,) = self.grid.send_and_receive([message])
        return reply


ERROR = re.compile(r"<class 'common\.errors\.(Wire|SecureSum)Error'>:<[\"']field '\w+'")


def check_bound(kind: type[Any], record: RecordDict, merchant: Merchant, honest: "Outcome") -> None:
    """Check that an accepted message changed what the merchant is bound to, or nothing."""
    said, state = unpack(kind, record), merchant.state()
    if getattr(said, "countersigned", b"") != getattr(honest.message, "countersigned", b""):
        check_unwitnessed(said, state, honest.state)
    elif kind is Advertise:
        context = session_context(said.run, said.session, said.contract)
        advert = Advert.from_bytes(state.own_advert)
        members = merchant.found.members
        assert state.context == context
        assert members.verify("m000", advert.signed(context), advert.signature)
        assert not members.verify("m000", advert.signed(honest.state.context), advert.signature)
    elif kind is Share:
        roster = Roster(state.context, tuple(Advert.from_bytes(raw) for raw in said.roster))
        assert state.roster_hash == roster.hash != honest.state.roster_hash
        assert set(said.roster) < set(honest.message.roster)  # signed adverts, fewer of them
    elif kind is SumRequest:
        check_request(said, state, honest)
    elif kind is Confirm:
        assert state.step is not None
        chosen = from_bitmap(said.survivors, MERCHANTS, "survivors")
        assert frozenset(state.step.survivors) == chosen != frozenset(range(MERCHANTS))
        statement = survivors_statement(state.step.context, chosen)
        assert statement != survivors_statement(state.step.context, frozenset(range(MERCHANTS)))
    else:
        assert state == honest.state  # a merchant need not be told that it confirmed itself


def check_unwitnessed(said: Any, state: State, honest: State) -> None:
    """Check that the witness's word is the honest one or none, and that nothing else changed."""
    assert said.countersigned == b""  # the ledger holds what it accepted before
    assert (state.context, state.roster_hash) == (honest.context, honest.roster_hash)
    steps = [None if one.step is None else one.step.context for one in (state, honest)]
    assert steps[0] == steps[1]


def check_request(said: SumRequest, state: State, honest: "Outcome") -> None:
    """Check that an accepted step is masked for just what the request said."""
    chosen = from_bitmap(said.active, MERCHANTS, "active")
    occasion_said = occasion_hash(
        said.stage, said.round, said.attempt, said.customers_per_merchant, said.parameters
    )
    assert state.step is not None
    assert honest.state.step is not None
    context = step_context(state.roster_hash, said.step, occasion_said, chosen)
    assert state.step.context == context != honest.state.step.context
    assert state.step.shares == {p: honest.state.step.shares[p] for p in chosen}


@dataclass
class Outcome:
    """What the honest message led to."""

    message: Any
    state: State
    record: RecordDict


def honest_outcome(merchant: Merchant, moment: Moment) -> Outcome:
    """Send the honest message."""
    merchant.at(moment)
    reply = merchant.send(type(moment.message), pack(moment.message))
    assert not reply.has_error()
    state = State(b"", 0, "", b"", b"", b"")  # type: ignore[arg-type]
    if moment.before is not None:
        state = deepcopy(merchant.state())
    return Outcome(moment.message, state, reply.content)


def throw_at_merchant(merchant: Merchant, moment: Moment, number: int) -> tuple[int, int]:
    """Throw spoiled messages of one kind; return how many, and how many were accepted."""
    kind, thrown, accepted = type(moment.message), 0, 0
    honest = honest_outcome(merchant, moment)
    merchant.at(moment)
    before = merchant.remembers()
    for field in fields_of(moment.message):
        generator = Generator(f"{number} {kind.__name__} {field}")
        records = spoiled_records(moment.message, field, generator, moment.pool.get(field, []))
        for record in islice(different(records, pack(moment.message)), EACH):
            reply = merchant.send(kind, record)
            thrown += 1
            if reply.has_error():
                assert ERROR.match(reply.error.reason), reply.error.reason
                assert merchant.remembers() == before
                continue
            refusal = opened(reply.content).get("refusal", "")
            if refusal:
                assert str(refusal).startswith("field '"), refusal
                assert merchant.remembers() == before
            elif kind is Attest:
                assert unpack(Attest, record).contract == moment.message.contract
            else:
                accepted += 1
                check_bound(kind, record, merchant, honest)
                merchant.at(moment)
    return thrown, accepted


@pytest.fixture(scope="module")
def merchant(tmp_path_factory: pytest.TempPathFactory) -> Merchant:
    """Open four merchants whose ledgers take every charge."""
    found = shops(tmp_path_factory.mktemp("shops"), MERCHANTS)
    for worker in found.workers:
        worker.ledger = FreeLedger(worker.ledger)  # type: ignore[assignment]
    return Merchant(found)


@pytest.fixture(scope="module")
def waiting(merchant: Merchant) -> dict[str, Moment]:
    """Give the moments by the name of the message."""
    return {type(moment.message).__name__: moment for moment in moments(merchant.found)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ASKED, ids=lambda kind: kind.__name__)
def test_merchants(merchant: Merchant, waiting: dict[str, Moment], kind: type[Any]) -> None:
    """A merchant takes no spoiled message for an honest one, and never fails otherwise."""
    thrown, accepted = throw_at_merchant(merchant, waiting[kind.__name__], 1)
    COUNTED[kind.__name__] = thrown
    assert thrown > 100 * len(vars(waiting[kind.__name__].message))
    assert accepted < thrown / 3


def throw_after(merchant: Merchant, moment: Moment, number: int) -> tuple[int, int]:
    """Throw spoiled messages at a merchant that answered the honest one; as above."""
    kind, thrown, same = type(moment.message), 0, 0
    merchant.at(moment)
    honest = merchant.send(kind, pack(moment.message))
    after = Moment(moment.message, deepcopy(merchant.state()), moment.pool)
    before = merchant.remembers()
    again = merchant.send(kind, pack(moment.message))
    assert fingerprint(again.content) == fingerprint(honest.content)
    assert merchant.remembers() == before
    for field in fields_of(moment.message):
        generator = Generator(f"after {number} {kind.__name__} {field}")
        records = spoiled_records(moment.message, field, generator, moment.pool.get(field, []))
        for record in islice(different(records, pack(moment.message)), EACH // 4):
            reply = merchant.send(kind, record)
            thrown += 1
            refused = reply.has_error() or str(opened(reply.content).get("refusal", ""))
            if not refused and kind is Advertise and field != "countersigned":
                merchant.at(after)  # a new session; this one is forgotten
                continue
            assert merchant.remembers() == before
            if not refused:
                same += 1
                assert field == "countersigned" or kind is Reveal, field
                assert fingerprint(reply.content) == fingerprint(honest.content)
    return thrown, same


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*ASKED][1:], ids=lambda kind: kind.__name__)
def test_merchants_that_answered(
    merchant: Merchant, waiting: dict[str, Moment], kind: type[Any]
) -> None:
    """The same question gets the same bytes; no other question of an old step gets any."""
    thrown, same = throw_after(merchant, waiting[kind.__name__], 2)
    assert thrown > 25 * len(vars(waiting[kind.__name__].message))
    assert same < thrown / 2


def test_a_record_that_is_missing(merchant: Merchant, waiting: dict[str, Moment]) -> None:
    """Messages without any field of ours are refused as a whole."""
    for kind in ASKED:
        merchant.at(waiting[kind.__name__])
        for record in (RecordDict(), RecordDict({"other": ConfigRecord({"a": 1})})):
            reply = merchant.send(kind, record)
            assert "field 'hansa': the message has no such record" in reply.error.reason


class Play:
    """A step of honest merchants and a coordinator, where one merchant's answer is replaced."""

    def __init__(self) -> None:
        self.world = advertised(MERCHANTS)
        self.fresh = CoordinatorSession(CONTEXT, self.world.members, 2)
        self.adverts = [client.advert for client in self.world.clients]
        self.signed = deepcopy(self.fresh)
        for identity, raw in zip(self.world.identities[1:], self.adverts[1:], strict=True):
            self.signed.take_advert(raw, identity.merchant)
        self.session = deepcopy(self.signed)
        self.session.take_advert(self.adverts[0], "m000")
        roster = self.session.close_roster()
        self.escrows = [client.share(roster) for client in self.world.clients]
        self.public = self.world.identities[0].public
        self.heads = [still_head(identity).to_bytes() for identity in self.world.identities]

    def dealt(self, escrow: bytes) -> tuple[Server, CoordinatorSession]:
        """Return the world after set-up, with the first merchant's escrow replaced."""
        session = deepcopy(self.session)
        for position, raw in enumerate([escrow, *self.escrows[1:]]):
            session.take_escrow(position, raw)
        return deepcopy(self.world), session


def masked(world: Server, session: CoordinatorSession, out: int = -1) -> dict[int, Any]:
    """Begin a step; return each merchant's vector and escrow, or its refusal."""
    session.begin(occasion(session._next), LENGTH, np.uint32)
    found: dict[int, Any] = {}
    for position in session.active:
        if position == out:
            continue
        client, step = world.clients[position], session.step
        try:
            prepared = client.prepare(step, occasion(step), *session.request(position), LABEL)
            found[position] = client.mask(prepared, planted(position))
        except SecureSumError as refusal:
            assert re.match("field 'boxes': 'm000' left a box for step", str(refusal))  # noqa: PT017
            found[position] = None
    return found


def finished(world: Server, session: CoordinatorSession, found: dict[int, Any]) -> Any:
    """Carry a step to its end; return the sum, or why there is none."""
    try:
        for position, sent in found.items():
            if sent is not None:
                session.take_masked(position, *sent)
        survivors = session.close_sum()
        for position in session.survivors:
            raw = world.clients[position].confirm(session.step, survivors)
            session.take_confirmations(position, raw)
        for position in session.confirmed:
            confirmations = session.confirmations_for(position)
            session.take_shares(
                position, world.clients[position].reveal(session.step, *confirmations)
            )
        return session.survivors, session.total()
    except SecureSumError as error:
        return str(error)


def check_sum(outcome: Any, changed: np.ndarray | None = None) -> None:
    """Check that a sum is right (up to what was changed in a vector), or lost with a reason."""
    if isinstance(outcome, str):
        named = re.match(r"field '(shares|row|confirmations)'", outcome)
        assert named or re.search("masked vectors came|members can take part|good shares", outcome)
        return
    survivors, total = outcome
    expected = np.sum([planted(position) for position in survivors], axis=0, dtype=np.uint32)
    if changed is not None:
        expected += changed
    assert np.array_equal(total, expected)


def shown(answer: Any, honest: Any, public: bytes) -> bool:
    """Tell whether the witness takes an answer's head: it takes none but the honest one."""
    if not hasattr(answer, "head"):
        return True
    try:
        refused = witness().countersign({"m000": (public, Head.from_bytes(answer.head))})
    except WireError as error:
        assert str(error).startswith("field 'head'"), error  # noqa: PT017
        return False
    assert refused or answer.head == honest.head
    return not refused


def answers(
    message: Any, number: int, pool: Pool, public: bytes = b""
) -> Iterator[tuple[str, Any]]:
    """Yield (field, spoiled answer), or (field, None) where it was refused, naming a field."""
    for field in fields_of(message):
        generator = Generator(f"{number} {type(message).__name__} {field}")
        records = spoiled_records(message, field, generator, pool.get(field, []))
        for record in islice(different(records, pack(message)), EACH):
            try:
                answer = unpack(type(message), record)
            except HansaError as error:
                assert str(error).startswith("field '"), error  # noqa: PT017
                yield field, None
                continue
            # what the coordinator checks next, before anything else: see `server.sums`
            usable = answer.merchant == message.merchant and shown(answer, message, public)
            yield field, answer if usable else None


def refused(action: Callable[[], object]) -> bool:
    """Tell whether an action was refused, with a reason that names a field."""
    try:
        action()
    except WireError as error:
        assert str(error).startswith("field '"), error  # noqa: PT017
        return True
    return False


def test_attested_and_advertised() -> None:
    """An advert is the honest one, or is not taken."""
    play, thrown = Play(), 0
    for _field, _answer in answers(Attested("m000", "", False, 0), 1, {}):
        thrown += 1
    pool = {"advert": play.adverts[1:], "merchant": ["m001"], "head": play.heads[1:]}
    honest = Advertised("m000", play.adverts[0], play.heads[0])
    for _field, answer in answers(honest, 1, pool, play.public):
        thrown += 1
        if answer is None:
            continue
        session = deepcopy(play.signed)
        assert refused(lambda s=session, a=answer: s.take_advert(a.advert, "m000"))
    COUNTED["Advertised"] = thrown
    assert thrown > 900


def test_shared() -> None:
    """A spoiled escrow is refused by the coordinator, by a receiver, or does no harm."""
    play, thrown, lost = Play(), 0, 0
    other = Play()
    pool = {"escrow": [*play.escrows[1:], *other.escrows], "merchant": ["m001"]}
    pool["head"] = play.heads[1:]
    honest = Shared("m000", play.escrows[0], play.heads[0])
    for _field, answer in answers(honest, 1, pool, play.public):
        thrown += 1
        if answer is None or refused(
            lambda a=answer: deepcopy(play.session).take_escrow(0, a.escrow)
        ):
            continue
        for out in (-1, 0, 3):
            world, session = play.dealt(answer.escrow)
            outcome = finished(world, session, masked(world, session, out))
            check_sum(outcome)
            lost += isinstance(outcome, str)
    COUNTED["Shared"] = thrown
    assert thrown > 300
    assert lost > 20


@pytest.mark.slow
def test_sum_answer() -> None:
    """A spoiled vector spoils its own place only; a spoiled escrow is noticed in the next step."""
    play, thrown, noticed = Play(), 0, 0
    world, session = play.dealt(play.escrows[0])
    sent = masked(world, session)
    vector, escrow = sent[0]
    pool = {"escrow": [sent[p][1] for p in (1, 2, 3)] + [play.escrows[0]], "merchant": ["m001"]}
    pool["head"] = play.heads[1:]
    honest = SumAnswer("m000", "", False, escrow, play.heads[0], vector)
    for field, answer in answers(honest, 1, pool, play.public):
        thrown += 1
        if answer is None or answer.refusal:
            continue
        took = deepcopy(session)
        if refused(lambda t=took, a=answer: t.take_masked(0, a.vector, a.escrow)):
            assert took.survivors == []
            assert not took.ready
            continue
        there, took = deepcopy(world), deepcopy(session)
        outcome = finished(there, took, {**sent, 0: (answer.vector, answer.escrow)})
        check_sum(outcome, answer.vector - vector)
        if field == "escrow":
            assert not isinstance(outcome, str)
            after = finished(there, took, masked(there, took))
            check_sum(after)
            noticed += isinstance(after, str)
    COUNTED["SumAnswer"] = thrown
    assert thrown > 800
    assert noticed > 5


def test_confirmed() -> None:
    """On a spoiled confirmation nobody reveals; a receiver of an honest one does."""
    play, thrown, silent = Play(), 0, 0
    world, session = play.dealt(play.escrows[0])
    for position, sent in masked(world, session).items():
        session.take_masked(position, *sent)
    survivors = session.close_sum()
    codes = [client.confirm(1, survivors) for client in world.clients]
    for position in (1, 2, 3):
        session.take_confirmations(position, codes[position])
    pool = {"confirmations": codes[1:], "merchant": ["m001"]}
    for _field, answer in answers(Confirmed("m000", codes[0]), 1, pool):
        thrown += 1
        took = deepcopy(session)
        if answer is None or refused(
            lambda t=took, a=answer: t.take_confirmations(0, a.confirmations)
        ):
            continue
        for position in (1, 2, 3):
            client = world.clients[position]
            before = state_to_bytes(client.state)
            own = answer.confirmations[16 * (position - 1) : 16 * position]
            kept = deepcopy(client.state)
            if own == codes[0][16 * (position - 1) : 16 * position]:
                client.reveal(1, *took.confirmations_for(position))
                client.state = kept
                continue
            silent += 1
            with pytest.raises(SecureSumError, match="'m000' did not confirm this step's set"):
                client.reveal(1, *took.confirmations_for(position))
            assert state_to_bytes(client.state) == before
    COUNTED["Confirmed"] = thrown
    assert thrown > 300
    assert silent > 100


def revealing(play: Play, out: int) -> tuple[CoordinatorSession, dict[int, bytes]]:
    """Lead a step to where the first merchant's shares alone are missing."""
    world, session = play.dealt(play.escrows[0])
    for position, sent in masked(world, session, out).items():
        session.take_masked(position, *sent)
    survivors = session.close_sum()
    for position in session.survivors:
        session.take_confirmations(position, world.clients[position].confirm(1, survivors))
    shares = {
        p: world.clients[p].reveal(1, *session.confirmations_for(p)) for p in session.survivors
    }
    for position in session.survivors[1:]:
        session.take_shares(position, shares[position])
    return session, shares


@pytest.mark.parametrize("out", [-1, 3], ids=["nobody lost", "one lost"])
def test_revealed(out: int) -> None:
    """A spoiled share is noticed, whoever dealt it; enough others restore the sum."""
    thrown, named = 0, 0
    session, shares = revealing(Play(), out)
    pool = {"shares": [shares[p] for p in session.survivors[1:]], "merchant": ["m001"]}
    for _field, answer in answers(Revealed("m000", shares[0]), out, pool):
        thrown += 1
        took = deepcopy(session)
        if answer is None or refused(lambda t=took, a=answer: t.take_shares(0, a.shares)):
            continue
        try:
            total = took.total()
        except SecureSumError as error:
            assert out == 3  # then every share is needed
            assert re.match("field 'shares': 2 good shares of", str(error))  # noqa: PT017
        else:
            check_sum((session.survivors, total))
        named += any("m000" in name for name in took.blamed)
    COUNTED[f"Revealed {out}"] = thrown
    assert thrown > 300
    assert named > 50


def test_enough_were_thrown() -> None:
    """All of the above together are more than ten thousand messages."""
    kinds = {kind.__name__ for kind in ASKED}
    kinds |= {"Advertised", "Shared", "SumAnswer", "Confirmed", "Revealed -1", "Revealed 3"}
    if set(COUNTED) != kinds:
        pytest.skip("counts what the other tests of this file threw; run the whole file")
    assert sum(COUNTED.values()) >= 10_000, COUNTED
