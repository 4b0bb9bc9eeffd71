"""Where secrets of a secure sum must not be found, and what is left of them after a restart."""

import logging
import shutil
from base64 import b64encode
from collections import defaultdict
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from flwr.app import Message
from flwr.common.serde import context_to_proto, message_to_proto

from clients import secure_sum
from clients.app import create_app
from clients.secure_sum import MerchantSession, Phase, State
from clients.session_store import FileStore
from common.errors import HansaError, PolicyError, SecureSumError
from common.masks import add_masks
from common.session import (
    Escrow,
    mask_key,
    occasion_hash,
    session_context,
    to_bitmap,
)
from common.shares import SECRET_BYTES
from common.streams import KEY_BYTES
from common.wire import Advertise, Confirm, pack
from server.secure_sum import CoordinatorSession
from simulations.datasets import load
from simulations.federation import assemble
from simulations.grid import FIRST_NODE, InProcessGrid
from simulations.members import Federation
from simulations.run import simulate
from tests.adversary.secure_world import (
    Server,
    Shops,
    both_shares,
    equal_words,
    pair_keys_of,
    planted,
    ready,
    secret_of,
    shops,
    unmasked_alone,
    worker_of,
)
from tests.witnessed import charges_of

VICTIM = 0
TAKEN = "this step of the secure sum was taken before; was the session's file put back?"
Dealt = dict[tuple[str, int], list[bytes]]  # (dealer, step) -> what each member was dealt


@dataclass
class Spy:
    """All secrets of all merchants of a run, and all that was said in it."""

    secrets: dict[str, set[bytes]] = field(default_factory=lambda: defaultdict(set))
    self_shares: Dealt = field(default_factory=dict)
    row_shares: Dealt = field(default_factory=dict)
    told: list[tuple[str, bytes]] = field(default_factory=list)  # (message type, bytes) on the wire
    grid: InProcessGrid | None = None
    drawn: list[np.ndarray] = field(default_factory=list)

    def hear_dealing(self, _escrow: Escrow, session: MerchantSession, step: int, _to: Any) -> None:
        """Remember the two secrets of a step, everybody's shares of them, and the pair keys."""
        secrets, rows = self.drawn[-2:]
        raw = secrets.astype("<u2").tobytes()
        self.add("b", raw[:SECRET_BYTES])
        self.add("z", raw[SECRET_BYTES:])
        shares = [row.astype("<u2").tobytes() for row in rows]
        name = session.state.names[session.state.own]
        self.self_shares[name, step] = [share[:SECRET_BYTES] for share in shares]
        self.row_shares[name, step] = [share[SECRET_BYTES:] for share in shares]
        keys = session.state.next_keys
        self.add("pair key", *(keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)))

    def hear_pairs(self, _raw: bytes, session: MerchantSession, *_: Any) -> None:
        """Remember what a merchant has in common with each other one."""
        for pair in session.state.pairs.values():
            self.add("pair secret", *vars(pair).values())

    def hear_keys(self, session: MerchantSession, *_: Any) -> None:
        """Remember a merchant's private keys of a session."""
        self.add("private key", session.state.transport, session.state.masking)

    def hear_vector(self, _sent: Any, _session: Any, _prepared: Any, vector: np.ndarray) -> None:
        """Remember the start of a vector before it was masked, as it would be sent."""
        self.add("vector", vector.astype("<u4").tobytes()[:64])

    def hear_wire(
        self, reply: Message, grid: InProcessGrid, message: Message, _answer: object
    ) -> None:
        """Remember a message and its answer as they travel."""
        self.grid, kind = grid, reply.metadata.message_type
        self.told.append((f"asked {kind}", message_to_proto(message).SerializeToString()))
        self.told.append((f"told {kind}", message_to_proto(reply).SerializeToString()))

    def add(self, kind: str, *values: bytes) -> None:
        """Remember secrets; leave out what is too short or too plain to be recognised."""
        self.secrets[kind] |= {v for v in values if len(v) >= 16 and len(set(v)) > 4}

    def found_in(self, haystack: bytes, kinds: set[str] | None = None) -> set[str]:
        """Return the kinds of secrets that are in some bytes, raw or written down."""
        return {
            kind
            for kind, values in self.secrets.items()
            if kinds is None or kind in kinds
            for value in values
            if any(form in haystack for form in spellings(value))
        }


def spellings(value: bytes) -> list[bytes]:
    """Return the ways in which bytes are written."""
    return [value, value.hex().encode(), b64encode(value)[:-4], repr(value)[2:-1].encode()]


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    """Listen at every place where a secret is made or used, and on the wire."""
    found = Spy()

    def wrap(target: Any, name: str, listen: Callable[..., None]) -> None:
        plain = getattr(target, name)
        call = plain.__func__ if isinstance(target.__dict__.get(name), classmethod) else plain

        def spied(*args: Any, **kwargs: Any) -> Any:
            result = call(*args, **kwargs)
            listen(result, *args)
            return result

        monkeypatch.setattr(target, name, classmethod(spied) if call is not plain else spied)

    wrap(secure_sum, "random_elements", lambda result, *_: found.drawn.append(result))
    wrap(secure_sum, "split", lambda result, *_: found.drawn.append(result))
    wrap(secure_sum, "mask_key", lambda result, *_: found.add("mask key", result))
    wrap(MerchantSession, "_deal", found.hear_dealing)
    wrap(MerchantSession, "share", found.hear_pairs)
    wrap(MerchantSession, "advertise", found.hear_keys)
    wrap(MerchantSession, "mask", found.hear_vector)
    wrap(InProcessGrid, "_reply", found.hear_wire)
    return found


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    """Assemble four merchants for two rounds."""
    dataset = load("synthetic", preset="smoke", merchants=4)
    contract = dataset.contract.revised(
        federation={"round_timeout_s": 0.01},
        model={"family": "linear"},
        training={"rounds": 2, "spare_rounds": 1},
        aggregation={"secure": True, "min_survivors": 3},
        publication={"evaluate_every": 1},
    )
    return assemble(dataset, contract, tmp_path / "ledgers", None)


def lost_in_round_1(message: Message) -> str | None:
    """Lose the second merchant's first request of an update: it drops out after it dealt."""
    gone = message.metadata.dst_node_id == FIRST_NODE + 1
    return "silent" if gone and message.metadata.message_type == "train.update" else None


@pytest.mark.slow
@pytest.mark.parametrize("fault", [None, lost_in_round_1], ids=["nobody lost", "one lost"])
def test_a_run_tells_no_secret(
    spy: Spy,
    federation: Federation,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    fault: Callable[[Message], str | None] | None,
) -> None:
    """Logs, contexts, files and messages hold no secret; shares are where they may be."""
    caplog.set_level(logging.DEBUG)
    for member in federation.members:
        party, worker = member.worker._party, member.worker
        spy.add("identity", party.identity.key.private_bytes_raw())
        spy.add("customer", *(row.tobytes() for row in worker._everyone))
    out = tmp_path / "out"
    out.mkdir()
    result = simulate(federation, out, lambda _record, _rounds: None, fault)
    cohorts = [4, 4] if fault is None else [3, 3]
    assert [record.cohort for record in result.rounds] == cohorts
    assert {"b", "z", "pair key", "private key", "vector", "mask key"} <= set(spy.secrets)
    assert all(len(values) >= 4 for values in spy.secrets.values())
    assert spy.found_in(caplog.text.encode()) == set()
    assert spy.grid is not None
    for context in spy.grid.contexts.values():
        assert len(context.state) == 0
        assert spy.found_in(context_to_proto(context).SerializeToString()) == set()
    for path in out.rglob("*"):
        if path.is_file() and path.parent.parent != out / "merchants":
            assert spy.found_in(path.read_bytes()) == set(), path
    kept = [path for path in federation.server.parent.rglob("*") if path.is_file()]
    assert {"ledger.sqlite", "witness.sqlite", "run.jsonl"} <= {path.name for path in kept}
    for path in kept:  # ledgers and records are shown to auditors
        assert spy.found_in(path.read_bytes()) == set(), path
    assert spy.found_in(b"\0".join(raw for _, raw in spy.told)) == set()
    check_shares(spy, dropped="" if fault is None else members_name(federation, 1))


def members_name(federation: Federation, number: int) -> str:
    """Return the id of the merchant at a node."""
    return federation.members[number].merchant


def check_shares(spy: Spy, dropped: str) -> None:
    """Check that shares travel in `Revealed` alone, of one kind for each dealer and step."""
    revealed = b"\0".join(raw for kind, raw in spy.told if kind == "told query.reveal")
    others = b"\0".join(raw for kind, raw in spy.told if kind != "told query.reveal")
    both, rows = 0, set()
    for dealer_step, shares in spy.self_shares.items():
        of_self = sum(share in revealed for share in shares)
        of_row = sum(share in revealed for share in spy.row_shares[dealer_step])
        both += bool(of_self) and bool(of_row)
        if of_row:
            rows.add(dealer_step)
        for share in (*shares, *spy.row_shares[dealer_step]):
            assert not any(form in others for form in spellings(share))
    assert both == 0
    assert {dealer for dealer, _ in rows} == ({dropped} if dropped else set())
    assert len(rows) == (1 if dropped else 0)  # who is out stays out
    assert any(share in revealed for shares in spy.self_shares.values() for share in shares)


def test_the_spy_would_notice(spy: Spy) -> None:
    """The search above finds a secret in each of its spellings."""
    secret = bytes(range(100, 132))
    spy.add("b", secret, b"short", bytes(32))
    for told in (secret, secret.hex().encode(), b64encode(secret), repr(secret).encode()):
        assert spy.found_in(b"before " + told + b" after") == {"b"}
    assert spy.found_in(b"before after" + bytes(64)) == set()


def spoiled_confirms() -> Iterator[Confirm]:
    """Yield messages that are refused at every stage."""
    for session, step, survivors in (
        (1, 1, b""),
        (9, 1, b"\x0f"),
        (1, 9, b"\x0f"),
        (1, 1, b"\x01"),
    ):
        yield Confirm(session, step, survivors)


def test_errors_tell_no_secret(
    spy: Spy, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refusals, and failures that nobody foresaw, name neither a secret nor a path."""
    caplog.set_level(logging.DEBUG)
    found, texts = shops(tmp_path, 4, files=True), []
    found.set_up()
    for position in range(4):
        found.ask(position, 1)
    for message in spoiled_confirms():
        with pytest.raises(SecureSumError) as refused:
            found.workers[VICTIM].confirm(message)
        texts.append(str(refused.value))
    codes = found.confirm(1)
    codes[1] = dict.fromkeys(codes[1], bytes(16))
    with pytest.raises(SecureSumError) as refused:
        found.workers[VICTIM].reveal(found.reveal_message(VICTIM, 1, codes))
    texts.append(str(refused.value))
    app = create_app(lambda _context: found.workers[VICTIM])
    grid = InProcessGrid(app, 1, {})

    def broken(*_args: object) -> None:
        raise PolicyError(f"{tmp_path}/m000.sealed: cannot be written (disk full)")

    monkeypatch.setattr(FileStore, "save", broken)
    asked = pack(Advertise("run", found.contract.sha256, 2, b""))
    begin = Message(asked, FIRST_NODE, "query.advertise")
    (reply,) = grid.send_and_receive([begin])
    assert "the merchant's side failed (PolicyError)" in reply.error.reason
    assert str(tmp_path) not in reply.error.reason
    texts.append(reply.error.reason)
    assert "disk full" in caplog.text  # the merchant's own log says why
    assert spy.found_in("\n".join([*texts, caplog.text]).encode()) == set()
    assert len(spy.secrets["b"]) == 8


def test_the_session_file_is_sealed(spy: Spy, tmp_path: Path) -> None:
    """At every stage: no secret and no share in clear, mode 0600, no copy left behind."""
    found = shops(tmp_path, 3, files=True)

    def check() -> None:
        files = [p for p in tmp_path.iterdir() if "sqlite" not in p.name]
        expected = {f"m00{n}.sealed" for n in range(3)}
        assert {p.name for p in files if p.stat().st_size} == expected
        for path in files:
            raw = path.read_bytes()
            assert path.stat().st_mode & 0o077 == 0
            assert spy.found_in(raw) == set()
            shares = [s for dealt in (spy.self_shares, spy.row_shares) for s in dealt.values()]
            assert not any(share in raw for dealt in shares for share in dealt)

    found.set_up()
    check()
    for position in range(3):
        found.ask(position, 1)
    check()
    codes = found.confirm(1)
    check()
    for position, worker in enumerate(found.workers):
        worker.reveal(found.reveal_message(position, 1, codes))
    check()
    other = FileStore(tmp_path / "m000.sealed", found.identities[1])
    with pytest.raises(SecureSumError, match="session file cannot be read"):
        other.load()


def restarted(found: Shops, folder: Path, position: int = VICTIM) -> None:
    """Open a merchant anew, from nothing but its files."""
    name = found.identities[position].merchant
    found.workers[position].ledger.close()
    found.stores[position] = FileStore(folder / f"{name}.sealed", found.identities[position])
    found.workers[position] = worker_of(found, position, folder)


def paid(found: Shops) -> list[tuple[str, int, int]]:
    """Return stage, round and attempt of all that the victim was charged for."""
    return list(charges_of(found.workers[VICTIM].ledger))


def coordinator_for(found: Shops) -> CoordinatorSession:
    """Return an honest coordinator's session over merchants that were set up."""
    context = session_context("run", 1, found.contract.sha256)
    session = CoordinatorSession(context, found.members, 2)
    for position in range(found.size):
        session.take_advert(found.rosters[1][position], found.identities[position].merchant)
    session.close_roster()
    for position in range(found.size):
        session.take_escrow(position, found.escrows[1, 1, position].to_bytes())
    return session


class TestRestart:
    """A merchant that is started anew between two messages, from its files."""

    @pytest.mark.parametrize("when", ["share", "update", "confirm", "always"])
    def test_the_attempt_goes_on(self, tmp_path: Path, when: str) -> None:
        """Every restart between two messages leaves the sum as it would have been."""
        found = shops(tmp_path, 3, files=True)
        found.set_up()
        session = coordinator_for(found)
        parameters = found.request(VICTIM, 1).parameters
        what = occasion_hash("update", 1, 0, 40.0, parameters)
        session.begin(what, len(parameters), np.uint32)
        exact = np.zeros(len(parameters), np.uint32)

        def perhaps(moment: str, position: int) -> None:
            if when in (moment, "always"):
                restarted(found, tmp_path, position)

        for position in range(3):
            perhaps("share", position)
            before = found.stores[position].load()
            answer = found.ask(position, 1)
            exact += found.exact(position, before, found.request(position, 1), answer.vector)
            session.take_masked(position, answer.vector, answer.escrow)
        survivors = session.close_sum()
        for position in range(3):
            perhaps("update", position)
            raw = found.workers[position].confirm(Confirm(1, 1, survivors)).confirmations
            session.take_confirmations(position, raw)
        codes = {p: dict(session._current.confirmations[p]) for p in range(3)}
        for position in range(3):
            perhaps("confirm", position)
            message = found.reveal_message(position, 1, codes)
            shares = found.workers[position].reveal(message).shares
            session.take_shares(position, shares)
            restarted(found, tmp_path, position)
            assert found.workers[position].reveal(message).shares == shares
            other = Confirm(1, 1, to_bitmap((0, 1), 3))
            with pytest.raises(SecureSumError, match="step 1 is not under way"):
                found.workers[position].confirm(other)
        assert np.array_equal(session.total(), exact)

    def test_a_crash_before_the_state_is_stored(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The charge stays, nothing left, and neither occasion nor step is ever answered.

        An attempt of its own is answered in the next session.
        """
        found = shops(tmp_path, 3, files=True)
        found.set_up()
        before = found.stores[VICTIM].load()

        def crash(*_args: object) -> None:
            raise PolicyError("crash")

        with monkeypatch.context() as broken:
            broken.setattr(FileStore, "save", crash)
            with pytest.raises(HansaError, match="crash"):
                found.ask(VICTIM, 1)
        restarted(found, tmp_path)
        assert found.stores[VICTIM].load() == before
        assert "was released before" in found.ask(VICTIM, 1).refusal
        assert TAKEN in found.ask(VICTIM, 1, attempt=1).refusal
        assert found.stores[VICTIM].load() == before
        assert paid(found) == [("update", 1, 0)]
        found.set_up(2)
        assert not found.ask(VICTIM, 1, attempt=1, session=2).refusal
        assert paid(found) == [("update", 1, 0), ("update", 1, 1)]

    def test_a_crash_after_the_state_is_stored(self, tmp_path: Path) -> None:
        """An answer that was lost on its way comes again; to no other question, and unpaid."""
        found = shops(tmp_path, 3, files=True)
        found.set_up()
        first = found.ask(VICTIM, 1)
        kept = found.stores[VICTIM].load()
        restarted(found, tmp_path)
        again = found.ask(VICTIM, 1)
        assert again.vector.tobytes() == first.vector.tobytes()
        assert replace(again, vector=first.vector) == first
        others: list[dict[str, Any]] = [
            {"attempt": 1},
            {"round": 2},
            {"stage": "census"},
            {"customers_per_merchant": 41.0},
            {"parameters": found.request(VICTIM, 1).parameters + 1.0},
            {"active": to_bitmap((0, 1), 3)},
            {"boxes": b""},
        ]
        for changed in others:
            with pytest.raises(SecureSumError, match="an old step is never taken up again"):
                found.ask(VICTIM, 1, **changed)
        assert found.stores[VICTIM].load() == kept
        assert found.stores[VICTIM].load().phase is Phase.MASKED
        assert paid(found) == [("update", 1, 0)]

    def test_a_file_that_is_lost_or_changed(self, tmp_path: Path) -> None:
        """Without its file a merchant has no session; with a spoiled one neither."""
        found = shops(tmp_path, 3, files=True)
        found.set_up()
        path = tmp_path / "m000.sealed"
        raw = path.read_bytes()
        for spoiled in (raw[:-1], raw[:5], b"", raw[:40] + bytes([raw[40] ^ 1]) + raw[41:]):
            path.write_bytes(spoiled)
            with pytest.raises(SecureSumError, match="session file cannot be read"):
                found.ask(VICTIM, 1)
        path.unlink()
        with pytest.raises(SecureSumError, match="no session under way"):
            found.ask(VICTIM, 1)
        with pytest.raises(SecureSumError, match="no session under way"):
            found.workers[VICTIM].share(found.share_message(VICTIM))
        assert paid(found) == []


class TestRollback:
    """A session file that somebody put back, as a backup would."""

    def test_the_same_occasion_is_refused(self, tmp_path: Path) -> None:
        """The ledger, which was not put back, knows that the update left."""
        found = shops(tmp_path, 3, files=True)
        found.set_up()
        path = tmp_path / "m000.sealed"
        shutil.copy(path, tmp_path / "backup")
        first = found.ask(VICTIM, 1)
        shutil.copy(tmp_path / "backup", path)
        restarted(found, tmp_path)
        assert "was released before" in found.ask(VICTIM, 1).refusal
        assert found.stores[VICTIM].load().phase is Phase.READY
        assert first.vector is not None

    def test_another_attempt_leaks_nothing_by_itself(self, tmp_path: Path) -> None:
        """The ledger refuses the step; and without a ledger streams differ, peers do not help."""
        found = shops(tmp_path, 4, files=True)
        found.set_up()
        path = tmp_path / "m000.sealed"
        shutil.copy(path, tmp_path / "backup")
        before = found.stores[VICTIM].load()
        first = found.ask(VICTIM, 1).vector
        for position in range(1, 4):
            found.ask(position, 1)
        codes = found.confirm(1)
        shares = {}
        for position, worker in enumerate(found.workers):
            raw = worker.reveal(found.reveal_message(position, 1, codes)).shares
            shares[position] = raw[:SECRET_BYTES]
        assert secret_of(shares, 3) == before.next_self  # the server knows b of step 1
        first_escrow = found.escrows[1, 2, VICTIM]
        shutil.copy(tmp_path / "backup", path)
        restarted(found, tmp_path)
        request = found.request(VICTIM, 1, attempt=1)
        answer = found.ask(VICTIM, 1, attempt=1)
        assert answer.refusal == TAKEN
        assert (answer.escrow, answer.vector.size) == (b"", 0)
        assert paid(found) == [("update", 1, 0)]
        assert found.stores[VICTIM].load() == before
        party = found.workers[VICTIM]._party  # the same step, with nobody who keeps a ledger
        truth = found.exact(VICTIM, before, found.request(VICTIM, 1), first)
        sent = party.mask(request, party.prepare(request), truth, b"")
        masked, raw = sent.vector, sent.escrow
        assert np.array_equal(found.exact(VICTIM, before, request, masked), truth)
        what = occasion_hash("update", 1, 1, 40.0, request.parameters)
        context = secure_sum.step_context(before.roster_hash, 1, what, frozenset(range(4)))
        less = masked.copy()
        add_masks(less, [], [mask_key(before.next_self, context)])
        for known in (masked, less, masked - first, less - first):
            assert equal_words(known, truth) <= 1
            assert equal_words(known, np.zeros_like(known)) <= 1
        others = frozenset(range(1, 4))
        with pytest.raises(SecureSumError, match="step 1 is not under way"):
            found.workers[1].confirm(Confirm(1, 1, to_bitmap(others, 4)))
        found.workers[VICTIM].confirm(Confirm(1, 1, to_bitmap(range(4), 4)))
        with pytest.raises(SecureSumError, match="did not confirm this step's set"):
            found.workers[VICTIM].reveal(found.reveal_message(VICTIM, 1, codes))
        assert first_escrow.boxes != Escrow.from_bytes(raw, 4).boxes

    @staticmethod
    def rolled_back(count: int, back: int) -> tuple[Server, np.ndarray | None]:
        """Attack a victim after the last `back` members' states were put back in mid-session."""
        server = ready(count)
        for position in range(count):
            server.update(position)
        after_update = {p: deepcopy(server.clients[p].state) for p in range(count)}
        everyone, without = server.everyone, server.everyone - {VICTIM}
        for position in range(count):
            server.confirm(position, 1, everyone)
        own = {p: server.reveal(p, 1, everyone, everyone)[VICTIM] for p in range(count)}
        rows: dict[int, bytes] = {}
        returned = sorted(everyone)[count - back :]
        for position in returned:
            server.clients[position].state = after_update[position]
            server.confirm(position, 1, without)
        for position in returned:
            try:
                rows[position] = server.reveal(position, 1, without, returned)[VICTIM]
            except SecureSumError as refusal:
                assert "confirmations, " in str(refusal)  # noqa: PT017
        return server, server.attacked(VICTIM, 1, own, rows)

    @pytest.mark.parametrize("back", [1, 2, 4])
    def test_few_that_go_back_give_nothing(self, back: int) -> None:
        """Put back between UPDATE and CONFIRM: fewer than the threshold reveal nothing more."""
        assert self.rolled_back(7, back)[1] is None

    def test_a_threshold_that_goes_back_gives_all(self) -> None:
        """The other kind of share leaves a threshold of merchants, and with it the victim's."""
        found = self.rolled_back(7, 5)[1]
        assert found is not None
        assert equal_words(found, planted(VICTIM)) == 512

    def test_a_step_that_was_put_back_is_not_dealt_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The worker refuses it, for whatever occasion, before it draws or seals anything."""
        found = shops(tmp_path, 4, files=True)
        found.set_up()
        path, dealt = tmp_path / "m000.sealed", list[int]()
        raw, deal = path.read_bytes(), MerchantSession._deal

        def noted(session: MerchantSession, step: int, receivers: Any) -> Escrow:
            dealt.append(step)
            return deal(session, step, receivers)

        monkeypatch.setattr(MerchantSession, "_deal", noted)
        assert not found.ask(VICTIM, 1).refusal
        assert dealt == [2]
        path.write_bytes(raw)
        restarted(found, tmp_path)
        for changed in ({"attempt": 1}, {"round": 2}, {"stage": "census", "round": 0}):
            answer = found.ask(VICTIM, 1, **changed)
            assert answer.refusal == TAKEN
            assert (answer.escrow, answer.vector.size) == (b"", 0)
        assert "was released before" in found.ask(VICTIM, 1).refusal
        assert dealt == [2]
        assert path.read_bytes() == raw
        assert paid(found) == [("update", 1, 0)]

    def test_a_roster_is_not_joined_again(self, tmp_path: Path) -> None:
        """A file put back to before SHARE deals nothing for the same roster and keys."""
        found = shops(tmp_path, 4, files=True)
        found.advertise()
        roster = found.share_message(VICTIM)
        path = tmp_path / "m000.sealed"
        raw = path.read_bytes()
        assert found.workers[VICTIM].share(roster).escrow
        path.write_bytes(raw)
        restarted(found, tmp_path)
        for message in (roster, roster, replace(roster, countersigned=b"")):  # ask as you will
            with pytest.raises(SecureSumError, match=r"field 'roster': this step .* taken before"):
                found.workers[VICTIM].share(message)
        assert found.stores[VICTIM].load().phase is Phase.ADVERTISED

    def test_a_file_from_after_the_answer_gives_that_answer(self, tmp_path: Path) -> None:
        """What a file remembers to have sent leaves again, and nothing else does."""
        found = shops(tmp_path, 3, files=True)
        found.advertise()
        roster, path = found.share_message(VICTIM), tmp_path / "m000.sealed"
        first = found.workers[VICTIM].share(roster)
        raw = path.read_bytes()
        for position in (1, 2):
            found.workers[position].share(found.share_message(position))
        found.advertise(2)  # a new session; then the old file is put back
        path.write_bytes(raw)
        restarted(found, tmp_path)
        assert found.workers[VICTIM].share(roster) == first
        fewer = replace(roster, roster=roster.roster[:2])
        with pytest.raises(SecureSumError, match="this session has its roster already"):
            found.workers[VICTIM].share(fewer)

    def test_what_dealing_a_step_again_would_leak(self) -> None:
        """Without the ledger two texts are sealed with one key and nonce."""
        server = ready(4)
        before = deepcopy(server.clients[VICTIM].state)
        server.update(VICTIM)
        first = server.escrows[2, VICTIM]
        server.clients[VICTIM].state = before
        server.update(VICTIM)
        second = server.escrows[2, VICTIM]
        for position in range(1, 4):
            mixed = xor(first.box(position), second.box(position))[: 2 * SECRET_BYTES]
            key = server.clients[position].state.pairs[VICTIM].box_in
            opened = [
                opened_box(key, escrow.box(position), server.clients[position].state)
                for escrow in (first, second)
            ]
            assert mixed == xor(*opened)


def xor(one: bytes, other: bytes) -> bytes:
    """Return the bytes of both, exclusive or."""
    return bytes(a ^ b for a, b in zip(one, other, strict=True))


def opened_box(key: bytes, box: bytes, state: State) -> bytes:
    """Open a box of step 2 as its receiver does."""
    return ChaCha20Poly1305(key).decrypt((2).to_bytes(12, "big"), box, state.roster_hash)


class TestLateCompromise:
    """What a merchant's files give away when they are taken after a step."""

    def test_past_steps_stay_masked_when_the_run_is_over(self, tmp_path: Path) -> None:
        """The secrets of a pair serve for a whole session: no forward secrecy until it is erased.

        All peers' files, taken while the session goes on, unmask what was recorded in it. After
        the run's last sum they hold what was sent, and no key.
        """
        found = shops(tmp_path, 4, files=True)
        found.set_up()

        def step(number: int, **changed: Any) -> tuple[np.ndarray, np.ndarray]:
            """Carry out a step; return what the victim sent, and its vector."""
            before, request = found.stores[VICTIM].load(), found.request(VICTIM, number, **changed)
            sent = [found.ask(position, number, **changed) for position in range(4)]
            assert not any(answer.refusal for answer in sent)
            codes = found.confirm(number)
            for position, worker in enumerate(found.workers):
                worker.reveal(found.reveal_message(position, number, codes))
            return sent[VICTIM].vector, found.exact(VICTIM, before, request, sent[VICTIM].vector)

        state = found.stores[VICTIM].load()
        secret = state.next_self  # the server learns it in REVEAL
        masked, truth = step(1)
        peers = {p: found.stores[p].load() for p in (1, 2, 3)}
        taken = {p: pair_keys_of(peer, 1)[VICTIM] for p, peer in peers.items()}
        parameters = found.request(VICTIM, 2).parameters
        what = occasion_hash("update", 1, 0, 40.0, parameters)
        context = secure_sum.step_context(state.roster_hash, 1, what, frozenset(range(4)))
        assert np.array_equal(unmasked_alone(masked, VICTIM, context, secret, taken), truth)
        fewer = {p: key for p, key in taken.items() if p != 3}  # one peer's file stays its own
        assert equal_words(unmasked_alone(masked, VICTIM, context, secret, fewer), truth) <= 1
        stage, last = found.workers[VICTIM]._plan.last(found.contract.training.rounds)
        step(2, stage=stage, round=last)
        over = [store.load() for store in found.stores]
        for left in over:
            sent = {"question", "vector", "dtype", "escrow", "head", "confirmations", "shares"}
            assert all({*one} <= sent | {"label", "survivors"} for one in left.replies.values())
            assert {*left.replies} == {"update", "confirm", "reveal"}
            empty = State(left.context, 1, Phase.OVER, b"", b"", left.own_advert)
            assert replace(left, replies={}) == empty
        kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
        kept += b"".join(secure_sum.state_to_bytes(state) for state in over)
        pairs = [pair for peer in peers.values() for pair in peer.pairs.values()]
        values = [value for pair in pairs for value in vars(pair).values()]
        assert not any(form in kept for value in values for form in spellings(value))


def test_what_is_held_is_gone_after_the_step() -> None:
    """No merchant keeps a share, a private key or a secret of a step that is over."""
    server = ready(4)
    first = {p: deepcopy(server.clients[p].state) for p in range(4)}
    for position in range(4):
        server.update(position)
    held = {p: both_shares(server.clients[p].state, VICTIM) for p in range(4)}
    for position in range(4):
        server.confirm(position, 1, range(4))
    for position in range(4):
        server.reveal(position, 1, range(4), range(4))
    for position, client in enumerate(server.clients):
        kept = secure_sum.state_to_bytes(client.state)
        gone = [*held[position], first[position].next_self, first[position].next_share]
        assert not any(value.hex().encode() in kept for value in gone)
        assert client.state.transport == client.state.masking == b""
