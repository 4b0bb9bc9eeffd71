"""Secure sums against Flower's SecAgg+ and against plain sums: the same work, in one run.

    python -m benchmarks.secure_sum --json FILE

CPU seconds (`time.process_time`), medians of alternating repeats. What is measured:

- `n50`: 50 merchants, 10,000 numbers, one round with its set-up. A client's part in all stages,
  and what the server does to unmask, here and with Flower's own functions.
- `mask`: one merchant of ten, 1,000,000 numbers: ten masks against ten plain uint32 additions.
- `rounds`: whole sums over the in-process grid, messages included, all parties together, after
  set-up; the same over plain sums.
"""

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks import flower_secagg
from clients.app import create_app
from clients.secure_party import SecureParty
from clients.secure_sum import Label, MerchantSession
from clients.session_store import MemoryStore
from common.chain import NO_LINK, Head, body_bytes, link_after, signed_head
from common.contract import Contract, parse_contract
from common.fixed_point import Lattice
from common.identity import Identity, Members
from common.masks import add_masks
from common.session import session_context
from common.wire import (
    Advertise,
    Advertised,
    Confirm,
    Confirmed,
    Reveal,
    Revealed,
    Share,
    Shared,
    SumAnswer,
    SumRequest,
)
from server.archive import Archive, make_archive, open_archive
from server.asking import Run
from server.cohort import Cohort
from server.plain_sums import PlainSums
from server.secure_sum import CoordinatorSession
from server.stages import Patience
from server.sums import SecureSums
from simulations.grid import FIRST_NODE, InProcessGrid

_LATTICE = Lattice(1.0, 32)
_LABEL = Label("run", "census", 0, 0)
_OCCASION = bytes(32)


def cpu(action: Callable[[], Any]) -> tuple[float, Any]:
    """Return the CPU seconds that an action took, and its result."""
    start = time.process_time()
    result = action()
    return time.process_time() - start, result


@dataclass(frozen=True)
class OneRound:
    """What a set-up and one round cost, in CPU seconds and bytes of one merchant."""

    client_s: float  # median over merchants, set-up included
    client_setup_s: float
    server_s: float  # to unmask
    bytes_up: int  # largest over merchants, without set-up
    setup_bytes_up: int


class _Merchants:
    """Merchants whose work and messages are measured one by one."""

    def __init__(self, count: int) -> None:
        identities = [Identity.generate(f"m{i:03}") for i in range(count)]
        members = Members({identity.merchant: identity.public for identity in identities})
        context = session_context("run", 1, "contract")
        self.server = CoordinatorSession(context, members, 2)
        self.spent, self.sent = np.zeros(count), np.zeros(count, dtype=np.int64)
        self.sessions: list[MerchantSession] = []
        for i, identity in enumerate(identities):
            session = self.timed(
                i, partial(MerchantSession.advertise, identity, members, 2, context), 0
            )
            self.sent[i] += len(session.advert)
            self.sessions.append(session)
            self.server.take_advert(session.advert, identity.merchant)
        roster = self.server.close_roster()
        for i, session in enumerate(self.sessions):
            self.server.take_escrow(i, self.timed(i, partial(session.share, roster)))

    def timed(self, who: int, action: Callable[[], Any], size: int | None = None) -> Any:
        """Do something for a merchant and count what it costs it."""
        seconds, result = cpu(action)
        self.spent[who] += seconds
        self.sent[who] += len(result) if size is None else size
        return result

    def update(self, who: int, step: int, vector: np.ndarray) -> None:
        """Let a merchant mask a vector, and the server take it."""
        message = self.server.request(who)

        def masked() -> tuple[np.ndarray, bytes]:
            session = self.sessions[who]
            return session.mask(session.prepare(step, _OCCASION, *message, _LABEL), vector)

        values, escrow = self.timed(who, masked, 0)
        self.sent[who] += values.nbytes + len(escrow)
        self.server.take_masked(who, values, escrow)


def one_round(count: int, length: int, absent: int = 0) -> OneRound:
    """Carry out set-up and one round without the first `absent` merchants."""
    merchants = _Merchants(count)
    server, sessions = merchants.server, merchants.sessions
    setup_s, setup_bytes = merchants.spent.copy(), merchants.sent.copy()
    vectors = np.random.default_rng(0).integers(0, 2**32, (count, length), dtype=np.uint32)
    step, present = server.begin(_OCCASION, length, np.uint32), range(absent, count)
    for i in present:
        merchants.update(i, step, vectors[i])
    survivors = server.close_sum()
    for i in present:
        codes = merchants.timed(i, partial(sessions[i].confirm, step, survivors))
        server.take_confirmations(i, codes)
    for i in present:
        message = server.confirmations_for(i)
        server.take_shares(i, merchants.timed(i, partial(sessions[i].reveal, step, *message)))
    seconds, total = cpu(server.total)
    if not np.array_equal(total, vectors[absent:].sum(axis=0, dtype=np.uint32)):
        raise SystemExit("the sum is wrong")
    return OneRound(
        float(np.median(merchants.spent[absent:])),
        float(np.median(setup_s)),
        seconds,
        int((merchants.sent - setup_bytes).max()),
        int(setup_bytes.max()),
    )


def mask_over_plain_add(merchants: int, length: int, repeats: int) -> dict[str, float]:
    """Compare a merchant's masking with as many plain additions of ready vectors."""
    values = np.zeros(length, dtype=np.uint32)
    others = np.random.default_rng(1).integers(0, 2**32, (merchants, length), dtype=np.uint32)
    keys = [i.to_bytes(32, "big") for i in range(merchants)]
    masks, plain = [], []

    def add() -> None:
        for other in others:
            np.add(values, other, out=values)

    for _ in range(repeats):
        masks.append(cpu(lambda: add_masks(values, keys[::2], keys[1::2]))[0])
        plain.append(cpu(add)[0])
    ratio = [a / b for a, b in zip(masks, plain, strict=True)]
    each = merchants * length * 1e-9
    return {
        "merchants": merchants,
        "length": length,
        "mask_ns_per_entry": statistics.median(masks) / each,
        "plain_add_ns_per_entry": statistics.median(plain) / each,
        "ratio": statistics.median(ratio),
        "ratio_min": min(ratio),
        "ratio_max": max(ratio),
    }


class _Party:
    """A merchant without customers: its vector is given. Its ledger has one entry for ever."""

    def __init__(self, vector: np.ndarray, secure: SecureParty) -> None:
        identity = secure.identity
        link = link_after(NO_LINK, body_bytes({"kind": "open"}))
        signature = identity.sign(signed_head(identity.public, 1, link))
        self._head = Head(1, link, signature, 1, ())
        self._merchant, self._vector, self._secure = identity.merchant, vector, secure

    def advertise(self, message: Advertise) -> Advertised:
        head = self._head.to_bytes()
        if not message.session:
            return Advertised(self._merchant, b"", head)
        return Advertised(self._merchant, *self._secure.advertise(message, self._head.link, head))

    def share(self, message: Share) -> Shared:
        head = self._head.to_bytes()
        return Shared(self._merchant, *self._secure.share(message, lambda _roster: head))

    def answer(self, request: SumRequest) -> SumAnswer:
        head = self._head.to_bytes()
        if not request.session:
            return SumAnswer(self._merchant, "", False, b"", head, self._vector)
        prepared = self._secure.prepare(request)
        sent = self._secure.mask(request, prepared, self._vector, head)
        return SumAnswer(self._merchant, "", False, sent.escrow, head, sent.vector)

    def confirm(self, message: Confirm) -> Confirmed:
        return Confirmed(self._merchant, self._secure.confirm(message))

    def reveal(self, message: Reveal) -> Revealed:
        return Revealed(self._merchant, self._secure.reveal(message)[0])


def _contract(merchants: int) -> Contract:
    document = {
        "federation": {"name": "benchmark", "min_merchants": merchants},
        "features": [{"name": "a"}],
        "segments": {"names": ["x", "y"]},
        "privacy": {"epsilon": 1.0, "delta": 1e-5},
    }
    return parse_contract(document, source="benchmark")


def rounds(merchants: int, length: int, repeats: int) -> dict[str, float]:
    """Measure whole sums over the in-process grid, all parties and messages together."""
    with TemporaryDirectory(prefix="hansa-benchmark-") as folder:
        make_archive(Path(folder))
        return _rounds(merchants, length, repeats, open_archive(Path(folder)))


def _rounds(merchants: int, length: int, repeats: int, archive: Archive) -> dict[str, float]:
    contract = _contract(merchants)
    identities = [Identity.generate(f"m{i:03}") for i in range(merchants)]
    keys = {identity.merchant: identity.public for identity in identities}
    members = Members(keys, archive.identity.public)
    vectors = np.random.default_rng(0).integers(0, 2**32, (merchants, length), dtype=np.uint32)
    parties = [
        _Party(vector, SecureParty(i, members, 2, MemoryStore()))
        for i, vector in zip(identities, vectors, strict=True)
    ]
    app = create_app(lambda context: parties[int(context.node_config["partition-id"])])  # type: ignore[arg-type,return-value]
    nodes = {FIRST_NODE + i: party.merchant for i, party in enumerate(identities)}
    grid, patience = InProcessGrid(app, merchants, {}), Patience(60.0)
    run = Run("run", contract, Cohort(grid, patience, archive.witness, members, nodes))
    secure = SecureSums(run, archive.record("run"))
    plain = PlainSums(run)
    parameters, attempts = np.zeros(length), iter(range(10_000))

    def ask(way: SecureSums | PlainSums) -> float:
        request = SumRequest(
            "run",
            contract.sha256,
            "update",
            1,
            next(attempts),
            0.0,
            0,
            0,
            b"",
            b"",
            b"",
            parameters,
        )
        seconds, found = cpu(lambda: way.ask(request, length, _LATTICE))
        expected = vectors.sum(axis=0, dtype=np.uint32)
        if found is None or not np.array_equal(_LATTICE.to_ring(found.total), expected):
            raise SystemExit(f"the sum is wrong: {run.cohort.failures}")
        return seconds

    first = ask(secure)
    ask(plain)  # sets up, too
    pairs = [(ask(secure), ask(plain)) for _ in range(repeats)]
    secure_s, plain_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "merchants": merchants,
        "length": length,
        "setup_cpu_s": first - secure_s,
        "secure_cpu_s": secure_s,
        "secure_cpu_s_max": max(pair[0] for pair in pairs),
        "plain_cpu_s": plain_s,
    }


def measure(repeats: int) -> dict[str, Any]:
    """Measure everything and return the document that is printed."""
    ours, theirs_client, theirs_server = [], [], []
    for _ in range(repeats):
        ours.append(one_round(50, 10_000))
        theirs_client.append(flower_secagg.client_seconds(50, 10_000))
    theirs_server.append(flower_secagg.server_seconds(50, 10_000))
    client = statistics.median(each.client_s for each in ours)
    server = statistics.median(each.server_s for each in ours)
    mask = mask_over_plain_add(10, 1_000_000, 5 * repeats)
    large, dropped = one_round(10, 1_000_000), one_round(50, 10_000, absent=5)
    sizes = [_bytes_up(*shape) for shape in ((50, 10_000), (10, 1_000_000), (106, 600), (20, 5000))]
    round20, round106 = rounds(20, 5_000, 3 * repeats), rounds(106, 600, repeats)
    return {
        "n50_client_speedup": statistics.median(theirs_client) / client,
        "n50_server_speedup": statistics.median(theirs_server) / server,
        "mask_over_plain_add": mask["ratio"],
        "round20_cpu_s": round20["secure_cpu_s"],
        "round106_cpu_s": round106["secure_cpu_s"],
        "setup106_cpu_s": round106["setup_cpu_s"],
        "bytes_up_over_bound": max(each["over_bound"] for each in sizes),
        "n50": {
            "client_s": client,
            "client_setup_s": statistics.median(each.client_setup_s for each in ours),
            "server_s": server,
            "server_5_absent_s": dropped.server_s,
            "flower_client_s": statistics.median(theirs_client),
            "flower_server_s": statistics.median(theirs_server),
            "flower_server_extrapolated": True,
        },
        "million": {"client_s": large.client_s, "server_s": large.server_s},
        "mask": mask,
        "rounds": [round20, round106],
        "bytes_up": sizes,
        "repeats": repeats,
    }


def _bytes_up(count: int, length: int) -> dict[str, float]:
    """Return a merchant's bytes in a round, and over the bound 1.1 * 4 P + 200 n."""
    found = one_round(count, length)
    return {
        "merchants": count,
        "length": length,
        "round": found.bytes_up,
        "setup": found.setup_bytes_up,
        "over_bound": found.bytes_up / (1.1 * 4 * length + 200 * count),
    }


def main() -> None:
    """Measure, and print or write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the document here, too")
    parser.add_argument("--repeats", type=int, default=5)
    choices = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.WARNING)  # Flower tells of every stage
    text = json.dumps(measure(choices.repeats), indent=2)
    if choices.json:
        choices.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
