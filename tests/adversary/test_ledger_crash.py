"""Merchants are killed at any point of a round: nothing leaves that is not an entry.

The parent plays the coordinator and its witness; the merchant is a process of its own with real
files (`ledger_crash`), killed by SIGKILL at a random time, or at a random call of a function.
`HANSA_CRASHES` sets how many times it is killed by the quick test.
"""

# ruff: noqa: S311  # chance that can be repeated

import os
import pickle
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clients.secure_party import SecureParty
from clients.session_store import MemoryStore
from common.accounting import covers, epsilon
from common.budget import Budget
from common.chain import Head, is_signed, signed_head
from common.contract import Contract, parse_contract
from common.identity import Identity, Members
from common.ledger_entries import read_ledger
from common.network import initial_parameters
from common.plan import UPDATE, lattice_of, plan_of
from common.session import occasion_hash, session_context
from common.wire import Advertise, Confirm, Reveal, Share, SumAnswer, SumRequest
from server.secure_sum import CoordinatorSession
from server.witness import Witness
from tests.adversary.ledger_crash import ERROR, READY, Command, Merchant, receive, send

ROOT = Path(__file__).parents[2]
CRASHES = int(os.environ.get("HANSA_CRASHES", "10"))
COORDINATOR = Identity.generate("coordinator")
BUDGET = Budget(1.0, 1e-5)
RUN = "run"
_MEMORY = Path("/dev/shm")  # noqa: S108
A_SHOP = 12  # kills; the plan pays for three attempts after each


def contract_of(*, secure: bool) -> Contract:
    """Return a contract with a tiny model and enough rounds."""
    document: dict[str, Any] = {
        "federation": {"name": "crash", "min_merchants": 3},
        "features": [{"name": "a"}],
        "segments": {"names": ["x", "y"]},
        "model": {"family": "linear"},
        "training": {"rounds": 60},
        "privacy": {"epsilon": 1.0, "delta": 1e-5},
        "aggregation": {"secure": secure, "min_survivors": 2},
    }
    return parse_contract(document, source="crash")


@dataclass
class Killed(Exception):
    """The merchant's process is dead; what it was asked, and what it answered before."""

    method: str
    message: Any
    answer: Any


@dataclass
class Process:
    """A merchant's process."""

    pid: int
    connection: socket.socket

    def kill(self) -> list[Any]:
        """Kill it for certain; return what it had sent."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, 9)
        sent = []
        while (answer := receive(self.connection)) is not None:
            sent.append(answer)
        self.connection.close()
        return sent


class Nursery:
    """The warm process that merchants are forked from."""

    def __init__(self, folder: Path) -> None:
        mine, its = socket.socketpair()
        command = [sys.executable, "-m", "tests.adversary.ledger_crash", str(its.fileno())]
        quiet = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(command, cwd=ROOT, pass_fds=[its.fileno()], env=quiet)
        its.close()
        self._parent = mine
        for secure in (False, True):
            shop = Shop(folder / f"warm {secure}", secure=secure, nursery=self)
            send(mine, pickle.dumps(shop.merchant))
            assert receive(mine) == READY

    def start(self, merchant: Merchant) -> Process:
        """Fork a merchant's process; it may not have opened its files yet."""
        mine, its = socket.socketpair()
        socket.send_fds(self._parent, [pickle.dumps(merchant)], [its.fileno()])
        its.close()
        return Process(receive(self._parent), mine)

    def close(self) -> None:
        """End it."""
        self._parent.close()
        self._process.kill()
        self._process.wait(timeout=20)


@dataclass
class Shop:
    """One merchant, and the coordinator's side of its run."""

    folder: Path
    secure: bool
    nursery: Nursery
    chance: random.Random = field(default_factory=lambda: random.Random(0))

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        identities = [Identity.generate(f"m{number}") for number in range(3)]
        keys = {one.merchant: one.public for one in identities}
        self.members = Members(keys, COORDINATOR.public)
        self.contract = contract_of(secure=self.secure)
        raw = identities[0].key.private_bytes_raw()
        self.merchant = Merchant(
            self.folder, "m0", raw, keys, COORDINATOR.public, self.contract, BUDGET
        )
        self.key = identities[0].public
        self.others = [SecureParty(one, self.members, 2, MemoryStore()) for one in identities[1:]]
        self.witness = Witness(self.folder / "witness.sqlite", COORDINATOR)
        self.parameters = initial_parameters(self.contract)
        self.release = plan_of(self.contract).release_of(UPDATE, 1, 60)
        self.process: Process | None = None
        self.session, self.round, self.attempt = 0, 1, 0
        self.left: dict[tuple[str, int, int], list[bytes]] = {}  # what the coordinator got
        self.calls: dict[str, int] = {}  # functions that a message takes, as far as is known
        self.seconds: dict[str, float] = {}
        self.kill_in: int | None = None  # messages until the process is killed
        self.outcomes: Counter[str] = Counter()

    @property
    def latest(self) -> bytes:
        """Return what the witness saw last."""
        return self.witness.latest(self.key)

    def start(self) -> None:
        """Start the merchant anew; it opens whatever it left behind."""
        self.process = self.nursery.start(self.merchant)
        assert receive(self.process.connection)[0] == READY

    def die_at_the_start(self) -> None:
        """Start and kill it while it opens its files."""
        process = self.nursery.start(self.merchant)
        time.sleep(self.chance.uniform(0, 0.03))
        process.kill()

    def call(self, method: str, message: Any) -> Any:
        """Send a message and return the answer; kill the merchant if it is time."""
        assert self.process is not None
        if self.kill_in is not None:
            self.kill_in -= 1
            if self.kill_in < 0:
                self.kill_in = None
                self._kill_during(method, message)
        began = time.perf_counter()
        send(self.process.connection, Command(method, message))
        answer = receive(self.process.connection)
        assert answer is not None, "it died by itself"
        kind, content, self.calls[method] = answer
        self.seconds[method] = time.perf_counter() - began
        assert kind != ERROR, content
        self.note(method, message, content)
        return content

    def _kill_during(self, method: str, message: Any) -> None:
        assert self.process is not None
        dies_after = 0
        if self.chance.random() < 0.5:
            dies_after = self.chance.randint(1, self.calls.get(method, 400) + 20)
        send(self.process.connection, Command(method, message, dies_after))
        if dies_after:
            for _ in range(200):  # it dies by itself, or answers before
                if _is_over(self.process):
                    break
        else:
            time.sleep(self.chance.uniform(0, 1.2 * self.seconds.get(method, 0.02)))
        answers = self.process.kill()
        self.process = None
        for kind, content, _ in answers:
            assert kind != ERROR, content
            self.note(method, message, content)
        self._classify(method, message, answered=bool(answers))
        raise Killed(method, message, answers[0][1] if answers else None)

    def _classify(self, method: str, message: Any, *, answered: bool) -> None:
        """Count where it was when it died."""
        written = "entry" if self._is_written(message) else "no entry"
        if method != "answer":
            written = method
        self.outcomes[f"{written}, {'answered' if answered else 'no answer'}"] += 1

    def _is_written(self, message: Any) -> bool:
        what = (getattr(message, "stage", ""), getattr(message, "round", 0))
        account = read_ledger(self.merchant.ledger, BUDGET, self.key).account.runs.get(RUN)
        attempt = getattr(message, "attempt", 0)
        return account is not None and (*what, attempt) in account.released

    def note(self, method: str, message: Any, content: Any) -> None:
        """Keep a vector that left, and let the witness see the ledger."""
        if method == "answer" and content.vector.size:
            what = (message.stage, message.round, message.attempt)
            self.left.setdefault(what, []).append(content.vector.tobytes())
        head = getattr(content, "head", b"")
        if head:
            heads = {"m0": (self.key, Head.from_bytes(head))}
            assert self.witness.countersign(heads) == {}, "what it wrote does not extend"

    def set_up(self) -> None:
        """Let it reserve, and join a session where sums are secure."""
        self.session += 1
        sha256, number = self.contract.sha256, self.session if self.secure else 0
        message = Advertise(RUN, sha256, number, self.latest)
        advertised = self.call("advertise", message)
        if not self.secure:
            return
        session = CoordinatorSession(session_context(RUN, number, sha256), self.members, 2)
        session.take_advert(advertised.advert, "m0")
        for party in self.others:
            advert, _ = party.advertise(message, bytes(32), b"")
            session.take_advert(advert, party.identity.merchant)
        roster = session.close_roster()
        share = Share(RUN, sha256, number, self.latest, roster)
        session.take_escrow(0, self.call("share", share).escrow)
        for position, party in enumerate(self.others, start=1):
            escrow, _ = party.share(share, lambda _roster: b"")
            session.take_escrow(position, escrow)
        self.coordinator = session

    def request(self) -> SumRequest:
        """Return the next question, never one that was asked before."""
        self.attempt += 1
        return SumRequest(
            RUN, self.contract.sha256, UPDATE, self.round, self.attempt, 7.0, 0, 0, b"", b"",
            self.latest, self.parameters,
        )  # fmt: skip

    def ask(self) -> None:
        """Ask for one sum, to its end."""
        request = self.request()
        if not self.secure:
            answer = self.call("answer", request)
            assert answer.refusal == ""
            self.round, self.attempt = self.round + 1, 0
            return
        session, parties = self.coordinator, list(enumerate(self.others, start=1))
        length, dtype = self.release.length, lattice_of(self.release, self.contract).dtype
        occasion = occasion_hash(UPDATE, request.round, request.attempt, 7.0, self.parameters)
        step = session.begin(occasion, length, dtype)

        def for_member(position: int) -> SumRequest:
            active, boxes = session.request(position)
            return replace(request, session=self.session, step=step, active=active, boxes=boxes)

        answer = self.call("answer", for_member(0))
        assert answer.refusal == ""
        session.take_masked(0, answer.vector, answer.escrow)
        for position, party in parties:
            prepared = party.prepare(for_member(position))
            sent = party.mask(for_member(position), prepared, np.zeros(length, dtype), b"")
            session.take_masked(position, sent.vector, sent.escrow)
        confirm = Confirm(self.session, step, session.close_sum())
        session.take_confirmations(0, self.call("confirm", confirm).confirmations)
        for position, party in parties:
            session.take_confirmations(position, party.confirm(confirm))
        assert session.confirmed == [0, 1, 2]
        reveal = Reveal(self.session, step, *session.confirmations_for(0))
        session.take_shares(0, self.call("reveal", reveal).shares)
        for position, party in parties:
            own = Reveal(self.session, step, *session.confirmations_for(position))
            session.take_shares(position, party.reveal(own)[0])
        session.total()
        self.round, self.attempt = self.round + 1, 0

    def check(self) -> None:
        """Hold all that left against the ledger, read from its file from the start."""
        stored = read_ledger(self.merchant.ledger, BUDGET, self.key)
        for entry in stored.entries:
            signed = signed_head(self.key, entry.seq, entry.link)
            assert is_signed(self.key, signed, entry.signature)
        documents = [entry.document for entry in stored.entries]
        assert [document["kind"] for document in documents].count("open") == 1
        released = [document for document in documents if document["kind"] == "release"]
        what = [(one["stage"], one["round"], one["attempt"]) for one in released]
        steps = [one["step"] for one in released if one["step"]]
        assert len(set(what)) == len(what), "one occasion, two entries"
        assert len(set(steps)) == len(steps), "one step, two entries"
        assert self.left.keys() <= set(what), "a vector left that was not written down"
        assert all(len({*vectors}) == 1 for vectors in self.left.values()), "answered twice"
        runs = stored.account.runs
        assert sum(document["kind"] == "reserve" for document in documents) == len(runs)
        for run in runs.values():
            taken = [one.event for one in run.released.values()]
            assert covers([one.event for one in run.reserved], taken)
        spent = [one.event for run in runs.values() for one in run.charged]
        assert epsilon(spent, 1e-5) <= 1.0 + 1e-9
        assert self.release is not None
        assert epsilon([self.release.event] * len(self.left), 1e-5) <= 1.0 + 1e-9

    def go_on(self, *, renew: bool) -> None:
        """Ask for two sums, in a new session if it is time for one."""
        if renew:
            self.set_up()
        self.ask()
        self.ask()

    def crash_once(self) -> None:
        """Kill it somewhere in the next messages, check, and let the run go on."""
        if self.chance.random() < 0.1:
            if self.process is not None:
                self.process.kill()
                self.process = None
            self.die_at_the_start()
            self.outcomes["at the start"] += 1
        else:
            if self.process is None:
                self.start()
            renew = self.session == 0 or self.chance.random() < 0.3
            messages = (2 if self.secure else 1) * renew + 2 * (3 if self.secure else 1)
            self.kill_in = self.chance.randrange(messages)
            with pytest.raises(Killed) as killed:
                self.go_on(renew=renew)
            self.start()
            self.ask_again(killed.value)
        if self.left or self.session > 1:
            self.check()
        if self.process is None:
            self.start()
        self.set_up()
        self.ask()  # the run goes on
        self.check()

    def ask_again(self, killed: Killed) -> None:
        """Ask once more what it was asked when it died, and keep what leaves."""
        assert self.process is not None
        before = self._charges()
        send(self.process.connection, Command(killed.method, killed.message))
        kind, content, _ = receive(self.process.connection)
        refusal = content if kind == ERROR else getattr(content, "refusal", "")
        self.outcomes[f"{killed.method} again, {'refused' if refusal else 'answered'}"] += 1
        if killed.answer is not None and killed.method == "answer" and not self.secure:
            assert "released before" in refusal, "a plain answer is kept in memory only"
        elif killed.answer is not None:
            assert not refusal
            assert same(content, killed.answer), "two answers to one question"
        if not refusal:
            self.note(killed.method, killed.message, content)
        if killed.method not in {"answer", "advertise"}:
            assert self._charges() == before

    def _charges(self) -> int:
        account = read_ledger(self.merchant.ledger, BUDGET, self.key).account.runs.get(RUN)
        return 0 if account is None else len(account.released)

    def end(self) -> None:
        """End its process and compare what the witness saw with what is in the file."""
        if self.process is not None:
            self.process.kill()
        self.check()
        links = {e.link.hex() for e in read_ledger(self.merchant.ledger, BUDGET, self.key).entries}
        assert {line["link"] for line in self.witness.log()} <= links


def same(one: Any, other: Any) -> bool:
    """Tell whether two answers are equal, byte for byte."""
    return vars(one).keys() == vars(other).keys() and all(
        np.array_equal(value, vars(other)[name]) for name, value in vars(one).items()
    )


def _is_over(process: Process) -> bool:
    """Wait a little; tell whether the process answered, or is gone."""
    process.connection.settimeout(0.01)
    try:
        process.connection.recv(1, socket.MSG_PEEK)
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    finally:
        process.connection.settimeout(None)
    return True


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Give a warm process."""
    nursery = Nursery(tmp_path_factory.mktemp("nursery"))
    yield nursery
    nursery.close()


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """Give a folder that no disk slows down; to a kill it makes no difference."""
    with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as folder:
        yield Path(folder)


def crash(nursery: Nursery, folder: Path, count: int, seed: int) -> Counter[str]:
    """Kill merchants of plain and of secure sums so many times; return where they were."""
    outcomes: Counter[str] = Counter()
    generator, done = random.Random(seed), 0
    while done < count:
        shop = Shop(folder / str(done), done // A_SHOP % 2 == 1, nursery, generator)
        for _ in range(min(A_SHOP, count - done)):
            shop.crash_once()
            done += 1
        shop.end()
        outcomes += shop.outcomes
    return outcomes


def crash_two(nursery: Nursery, folder: Path, count: int, seed: int) -> Counter[str]:
    """Kill two processes that answer the same question from the same files; as above."""
    outcomes: Counter[str] = Counter()
    generator, done = random.Random(seed), 0
    while done < count:
        shop = Shop(folder / str(done), done // A_SHOP % 2 == 1, nursery, generator)
        for _ in range(min(A_SHOP, count - done)):
            outcomes[str(race(shop))] += 1
            done += 1
        shop.end()
    return outcomes


def race(shop: Shop) -> int:
    """Let two processes race, and kill both; return how many vectors left."""
    shop.start()
    shop.set_up()
    first, shop.process = shop.process, None
    assert first is not None
    second = shop.nursery.start(shop.merchant)
    assert receive(second.connection)[0] == READY
    request = shop.request()
    if shop.secure:
        occasion = occasion_hash(UPDATE, request.round, request.attempt, 7.0, shop.parameters)
        dtype = lattice_of(shop.release, shop.contract).dtype
        step = shop.coordinator.begin(occasion, shop.release.length, dtype)
        active, boxes = shop.coordinator.request(0)
        request = replace(request, session=shop.session, step=step, active=active, boxes=boxes)
    for process in (first, second):
        other = replace(request, attempt=request.attempt + 1)
        same = shop.secure or process is first or shop.chance.random() < 0.7
        send(process.connection, Command("answer", request if same else other))
    time.sleep(shop.chance.uniform(0, 0.06))
    left = 0
    for process in shop.chance.sample([first, second], 2):
        for kind, content, _ in process.kill():
            if kind != ERROR and isinstance(content, SumAnswer) and content.vector.size:
                left += 1
                shop.left.setdefault(_named_by(shop, content, request), []).append(
                    content.vector.tobytes()
                )
    shop.check()
    shop.attempt += 1
    shop.start()
    shop.set_up()
    shop.ask()
    assert shop.process is not None
    shop.process.kill()
    shop.process = None
    return left


def _named_by(shop: Shop, answer: SumAnswer, request: SumRequest) -> tuple[str, int, int]:
    """Return what an answer was for, by the entry that its head ends with."""
    seq = Head.from_bytes(answer.head).seq
    entry = read_ledger(shop.merchant.ledger, BUDGET, shop.key).entries[seq - 1].document
    assert entry["kind"] == "release"
    assert entry["round"] == request.round
    return (entry["stage"], entry["round"], entry["attempt"])


@pytest.mark.slow
def test_killed(nursery: Nursery, tmp_path: Path) -> None:
    """Nothing leaves without an entry, nothing twice, and each run goes on."""
    crash(nursery, tmp_path / "plain", max(CRASHES // 2, 1), 1)
    secure = Shop(tmp_path / "secure", secure=True, nursery=nursery)
    for _ in range(CRASHES - CRASHES // 2):
        secure.crash_once()
    secure.end()


@pytest.mark.slow
def test_two_killed(nursery: Nursery, tmp_path: Path) -> None:
    """Of two processes with the same files at most one answers, and both may die."""
    crash_two(nursery, tmp_path, max(CRASHES // 5, 1), 2)


@pytest.mark.slow
def test_killed_five_hundred_times(nursery: Nursery, in_memory: Path) -> None:
    """The same five hundred times; kills came before, between and after entry and answer."""
    outcomes = crash(nursery, in_memory, 500, 3)
    print(dict(outcomes))
    assert sum(count for where, count in outcomes.items() if "again" not in where) == 500
    assert {"no entry, no answer", "entry, no answer", "entry, answered"} <= outcomes.keys()
    assert {"answer again, answered", "reveal again, answered"} <= outcomes.keys()


@pytest.mark.slow
def test_two_killed_a_hundred_times(nursery: Nursery, in_memory: Path) -> None:
    """The same with two processes for one ledger."""
    outcomes = crash_two(nursery, in_memory, 100, 4)
    print(dict(outcomes))
    assert outcomes.total() == 100
