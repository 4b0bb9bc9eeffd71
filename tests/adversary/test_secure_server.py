"""A coordinator that breaks every rule of secure sums so as to see one merchant's vector.

Each test shows two things: what an honest merchant refuses, with the reason, and that the
coordinator, which is played to the end with that one check taken away, finds the vector.
"""

import hmac
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import fields, replace
from itertools import combinations
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from clients import secure_sum
from clients.secure_party import SecureParty
from clients.secure_sum import MerchantSession, Phase, Prepared, state_to_bytes
from clients.session_store import FileStore
from common import session as session_module
from common.errors import SecureSumError, WireError
from common.identity import Identity, Members
from common.masks import add_masks, digest
from common.noise import NoiseSource
from common.session import (
    BOX_BYTES,
    CONFIRMATION_BYTES,
    Advert,
    Escrow,
    Roster,
    mask_key,
    session_context,
    step_context,
    to_bitmap,
)
from common.streams import KEY_BYTES
from common.wire import Advertise, Advertised, Confirm, Reveal, Share, SumRequest
from tests.adversary.secure_world import (
    CONTEXT,
    LENGTH,
    MODEL,
    Reply,
    Server,
    advertised,
    both_shares,
    enrolled,
    equal_words,
    looks_random,
    names_of,
    occasion,
    pair_keys_of,
    planted,
    ready,
    row_of,
    secret_of,
    share_of_row,
    share_of_self,
    shops,
    snapshot,
    unmasked_alone,
    worker_of,
)
from tests.witnessed import charges_of, entries_of

VICTIM = 0


def assert_nothing_learnt(found: np.ndarray, *vectors: np.ndarray) -> None:
    """Check that what the server got has nothing in common with the vectors, nor a pattern."""
    assert looks_random(found)
    for vector in vectors:
        assert equal_words(found, vector) <= 1
        assert looks_random(found - vector)


def without_self_masks(server: Server, step: int, secrets: dict[int, bytes]) -> np.ndarray:
    """Return the sum of the masked vectors less the self-masks, each in its own context."""
    total = np.zeros(LENGTH, dtype=np.uint32)
    for position, secret in secrets.items():
        reply = server.replies[step, position]
        total += reply.masked
        add_masks(total, [], [mask_key(secret, reply.context)])
    return total


def expand_any_key(key: bytes, info: bytes) -> bytes:
    """Expand a key of any size, and so an empty one, to what everybody can work out."""
    return hmac.digest(key, info + b"\x01", "sha256")


def naive_step(client: MerchantSession, active: frozenset[int]) -> np.ndarray:
    """Let a merchant that opens no box mask its vector."""
    state = client.state
    context = step_context(state.roster_hash, 1, occasion(), active)
    label, own_share = secure_sum.Label("run", "update", 1, 0), {state.own: state.next_share}
    prepared = Prepared(label, state.roster_hash, 1, context, active, own_share)
    return client.mask(prepared, planted(state.own))[0]


class TestRoster:
    """Who is in the session, and with which keys."""

    @staticmethod
    def forged(names: Iterable[str]) -> list[MerchantSession]:
        """Return sessions of merchants that the server made up, or whose names it took."""
        made_up = [Identity.generate(name) for name in names]
        return [MerchantSession.advertise(one, Members({}), 2, CONTEXT, 1) for one in made_up]

    @staticmethod
    def seen(victim: MerchantSession, fakes: list[MerchantSession], trusted: Members) -> np.ndarray:
        """Play every other member of a victim that pins what it should not; return its vector."""
        keys = {fake._identity.merchant: fake._identity.public for fake in fakes}
        pinned = Members({**trusted.keys, **keys})
        naive = MerchantSession(victim._identity, pinned, 2, snapshot(victim))
        own = [MerchantSession(fake._identity, pinned, 2, snapshot(fake)) for fake in fakes]
        everyone = sorted([naive, *own], key=lambda one: Advert.from_bytes(one.advert).merchant)
        server = Server([], pinned, everyone, [one.advert for one in everyone])
        for position, one in enumerate(everyone):
            raw = one.share(server.adverts)
            server.escrows[1, position] = Escrow.from_bytes(raw, len(everyone))
        at = everyone.index(naive)
        masked = server.update(at)
        shares = {
            p: server.prepare(p).shares[at] for p in range(server.size) if p != at
        }  # the server opens the victim's boxes with keys of its own
        secret = secret_of({p: share_of_self(s) for p, s in shares.items()}, server.needed)
        pairs = {
            p: one.state.next_keys[KEY_BYTES * at : KEY_BYTES * (at + 1)]
            for p, one in enumerate(everyone)
            if p != at
        }
        return unmasked_alone(masked, at, server.replies[1, at].context, secret, pairs)

    def test_a_swapped_key_of_a_peer(self) -> None:
        """The server cannot sit between a victim and its peers: their keys are signed."""
        server = advertised(4)
        adverts = [client.advert for client in server.clients]
        fakes = self.forged(names_of(4)[1:])
        message = "the advert of 'm001' has a wrong signature; its keys were swapped"
        for forgery in (
            fakes[0].advert,
            fakes[0].advert[:-64] + adverts[1][-64:],
            adverts[1][:4] + adverts[1][36:68] + adverts[1][4:36] + adverts[1][68:],
        ):
            with pytest.raises(SecureSumError, match=message):
                server.clients[VICTIM].share([adverts[0], forgery, *adverts[2:]])
        assert server.clients[VICTIM].state.phase is Phase.ADVERTISED
        others = Members({server.identities[0].merchant: server.identities[0].public})
        found = self.seen(server.clients[VICTIM], fakes, others)
        assert equal_words(found, planted(VICTIM)) == LENGTH

    def test_a_swapped_key_of_the_victim(self) -> None:
        """A victim sees whether the others are shown its own keys."""
        server = advertised(4)
        adverts = [client.advert for client in server.clients]
        (fake,) = self.forged(["m000"])
        with pytest.raises(SecureSumError, match="own advert is not in it"):
            server.clients[VICTIM].share([fake.advert, *adverts[1:]])
        with pytest.raises(SecureSumError, match="'m000' has a wrong signature"):
            server.clients[1].share([fake.advert, *adverts[1:]])

    def test_sybils(self) -> None:
        """Merchants that the server made up are not enrolled."""
        server = advertised(2)
        own = server.clients[VICTIM].advert
        sybils = self.forged(["x1", "x2", "x3"])
        with pytest.raises(SecureSumError, match="field 'roster': 'x1' is not enrolled"):
            server.clients[VICTIM].share([own, *(one.advert for one in sybils)])
        with pytest.raises(SecureSumError, match="'x1' is not enrolled"):
            server.clients[VICTIM].share([own, server.clients[1].advert, sybils[0].advert])
        found = self.seen(server.clients[VICTIM], sybils, server.members)
        assert equal_words(found, planted(VICTIM)) == LENGTH

    def test_one_member_many_times(self) -> None:
        """A roster cannot be filled with copies of one member, or of one key."""
        server = advertised(3)
        adverts = [client.advert for client in server.clients]
        victim = server.clients[VICTIM]
        with pytest.raises(SecureSumError, match="sorted and differ"):
            victim.share([adverts[0], adverts[1], adverts[1]])
        with pytest.raises(SecureSumError, match="sorted and differ"):
            victim.share([adverts[1], adverts[0]])
        copies = [
            b"m%03d" % number + adverts[1][4:-64] + server.identities[number].sign(b"")
            for number in (1, 2)
        ]
        with pytest.raises(SecureSumError, match="two members have an equal key"):
            victim.share([adverts[0], *copies])

    def test_a_roster_of_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A merchant is not summed with itself."""
        server = advertised(3)
        victim = server.clients[VICTIM]
        for roster, count in (([], 0), ([victim.advert], 1)):
            with pytest.raises(SecureSumError, match=f"{count} members; a secure sum needs 2"):
                MerchantSession(server.identities[0], server.members, 0, victim.state).share(roster)
        monkeypatch.setattr(session_module, "MIN_COHORT", 1)
        naive = MerchantSession(server.identities[0], server.members, 1, victim.state)
        alone = Server([], server.members, [naive], [naive.advert])
        alone.escrows[1, 0] = Escrow.from_bytes(naive.share(alone.adverts), 1)
        assert equal_words(alone.honest_step(), planted(VICTIM)) == LENGTH

    def test_a_roster_below_the_own_minimum(self) -> None:
        """A merchant's own policy says how many must hide it; the server's accomplice is one."""
        server = advertised(5, minimum=3)
        pair = [client.advert for client in server.clients[:2]]
        with pytest.raises(SecureSumError, match="2 members; this merchant joins sums of 3"):
            server.clients[VICTIM].share(pair)
        naive = ready(2)
        total = naive.honest_step()
        assert equal_words(total - planted(1), planted(VICTIM)) == LENGTH

    def test_adverts_of_another_run(self) -> None:
        """Keys that were signed for another run, session or contract are no keys of this one."""
        server = advertised(3)
        adverts = [client.advert for client in server.clients]
        others = [("old run", 1, "contract"), ("run", 2, "contract"), ("run", 1, "other")]
        for other in others:
            old = MerchantSession.advertise(
                server.identities[1], server.members, 2, session_context(*other)
            )
            with pytest.raises(SecureSumError, match=r"'m001' has a wrong signature.*another run"):
                server.clients[VICTIM].share([adverts[0], old.advert, adverts[2]])

    def test_different_rosters(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Merchants that were shown different rosters cannot open each other's boxes."""

        def shown_two_rosters() -> Server:
            server = advertised(7)
            adverts = [client.advert for client in server.clients]
            for position in range(5):
                absent = 6 if position < 3 else 5
                roster = [a for other, a in enumerate(adverts) if other != absent]
                raw = server.clients[position].share(roster)
                server.escrows[1, position] = Escrow.from_bytes(raw, 6)
            return server

        server, active = shown_two_rosters(), frozenset(range(5))
        for position in active:
            boxes = server.boxes_for(position, 1, active)
            with pytest.raises(
                SecureSumError, match=r"'m00[0-4]' left a box for step 1 that is not authentic"
            ):
                server.clients[position].prepare(
                    1, occasion(), to_bitmap(active, 6), boxes, secure_sum.Label("", "", 0, 0)
                )
        exact = np.sum([planted(p) for p in active], axis=0, dtype=np.uint32)
        for bound in (True, False):
            if not bound:  # the same attack on keys that do not depend on the roster
                monkeypatch.setattr(Roster, "hash", property(lambda _self: digest(b"any")))
                server = shown_two_rosters()
            secrets = {p: server.clients[p].state.next_self for p in active}
            for position in active:
                masked = naive_step(server.clients[position], active)
                context = step_context(
                    server.clients[position].state.roster_hash, 1, occasion(), active
                )
                server.replies[1, position] = Reply(masked, context, active)
            total = without_self_masks(server, 1, secrets)
            if bound:
                assert_nothing_learnt(total, exact)
            else:
                assert equal_words(total, exact) == LENGTH

    def test_a_second_roster(self) -> None:
        """A merchant deals its shares for one roster only."""
        server = ready(4)
        with pytest.raises(SecureSumError, match="has its roster already"):
            server.clients[VICTIM].share(server.adverts[:3])

    def test_no_message_carries_a_threshold(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Merchants work the threshold out; one that took the server's would deal the secret."""
        sent = {
            f.name for kind in (Advertise, Share, SumRequest, Confirm, Reveal) for f in fields(kind)
        }
        assert not {name for name in sent if "thresh" in name or "minim" in name or "need" in name}
        server = ready(7)
        shares = {p: server.prepare(p).shares[VICTIM] for p in (1, 2, 3, 4)}
        assert server.needed == 5
        own = {p: share_of_self(s) for p, s in shares.items()}
        assert secret_of(own, 4) != server.clients[VICTIM].state.next_self
        monkeypatch.setattr(secure_sum, "threshold", lambda _members: 1)  # as the server asked for
        naive = ready(7)
        shares = {1: naive.prepare(1).shares[VICTIM]}
        secret = secret_of({1: share_of_self(shares[1])}, 1)
        assert secret == naive.clients[VICTIM].state.next_self
        row = secret_of({1: share_of_row(shares[1])}, 1)
        keys = row_of(naive.escrows[1, VICTIM], row)
        masked = naive.update(VICTIM)
        context = naive.replies[1, VICTIM].context
        found = unmasked_alone(masked, 0, context, secret, dict(enumerate(keys[1:], 1)))
        assert equal_words(found, planted(VICTIM)) == LENGTH


class TestUpdate:
    """What merchants are asked to sum."""

    @staticmethod
    def finish_naively(server: Server, secrets: dict[int, bytes]) -> np.ndarray:
        """Return the sum as if every merchant had revealed what it holds of everybody's b."""
        return without_self_masks(server, 1, secrets)

    def check_refused_and_useless(self, server: Server, secrets: dict[int, bytes]) -> np.ndarray:
        """Let everybody confirm; check that nobody reveals, and return what it would have given."""
        everyone = frozenset(server.clients[VICTIM].state.members)
        everyone = everyone & frozenset(secrets)
        for position in sorted(secrets):
            server.confirm(position, 1, everyone)
        for position in sorted(secrets):
            with pytest.raises(SecureSumError, match="did not confirm this step's set of surv"):
                server.reveal(position, 1, everyone, everyone)
        return self.finish_naively(server, secrets)

    def test_different_models(self) -> None:
        """A model that silences all others does not single out the victim."""
        for shown, learns in ((MODEL * 0.5, False), (MODEL, True)):
            server = ready(5)
            secrets = {p: server.clients[p].state.next_self for p in range(5)}
            for position in range(5):  # under a dead model everybody else's gradient is zero
                mine = None if position == VICTIM else np.zeros(LENGTH, np.uint32)
                model = MODEL if position == VICTIM else shown
                server.update(position, what=occasion(model=model), vector=mine)
            if learns:  # masks that did not depend on the model would cancel like these
                total = self.finish_naively(server, secrets)
                assert equal_words(total, planted(VICTIM)) == LENGTH
            else:
                total = self.check_refused_and_useless(server, secrets)
                assert_nothing_learnt(total, planted(VICTIM))

    @pytest.mark.parametrize(
        "other", [occasion(number=2), occasion(attempt=1), digest(b"another stage")]
    )
    def test_different_occasions(self, other: bytes) -> None:
        """Vectors of two rounds or attempts are never in one sum."""
        server = ready(4)
        secrets = {p: server.clients[p].state.next_self for p in range(4)}
        for position in range(4):
            server.update(position, what=other if position == VICTIM else occasion())
        total = self.check_refused_and_useless(server, secrets)
        assert_nothing_learnt(total, planted(VICTIM))

    def test_different_active_sets(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A victim that is told of more members than the others is in no sum with them."""
        fewer = frozenset(range(6))
        exact = np.sum([planted(p) for p in fewer], axis=0, dtype=np.uint32)
        for bound in (True, False):
            if not bound:  # contexts that do not depend on who is asked
                monkeypatch.setattr(
                    secure_sum,
                    "step_context",
                    lambda h, s, o, _a: step_context(h, s, o, frozenset()),
                )
            server = ready(7)
            secrets = {p: server.clients[p].state.next_self for p in fewer}
            for position in fewer:
                server.update(position, active=None if position == VICTIM else fewer)
            extra = pair_keys_of(server.clients[6].state, 1)[VICTIM]  # m006 is an accomplice
            if bound:
                total = self.check_refused_and_useless(server, secrets)
            else:
                total = self.finish_naively(server, secrets)
            context = server.replies[1, VICTIM].context
            add_masks(total, [], [mask_key(extra, context)])
            if bound:
                assert_nothing_learnt(total, exact)
            else:
                assert equal_words(total, exact) == LENGTH

    def test_a_shrinking_cohort(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Step by step fewer members: the roster's threshold stays the smallest sum."""
        server = ready(7)
        server.honest_step(1, out=frozenset({6}))
        server.honest_step(2, out=frozenset({5}), what=occasion(2))
        for position in range(5):
            server.update(position, 3, frozenset(range(5)), occasion(3))
        small = frozenset(range(4))
        with pytest.raises(SecureSumError, match="4 members; this merchant needs 5 or more"):
            server.confirm(VICTIM, 3, small)
        with pytest.raises(SecureSumError, match=r"field 'active': 4 members; .* needs 5"):
            server.prepare(VICTIM, 4, small)
        monkeypatch.setattr(MerchantSession, "_check_members", lambda *_args: None)
        monkeypatch.setattr(secure_sum, "threshold", lambda _members: 1)
        states = [snapshot(server.clients[p]) for p in range(5)]
        server.confirm(VICTIM, 3, [VICTIM])
        self_shares = {VICTIM: server.reveal(VICTIM, 3, [VICTIM], [VICTIM])[VICTIM]}
        self_shares |= {p: both_shares(states[p], VICTIM)[0] for p in range(1, 5)}
        row_shares = {p: both_shares(states[p], VICTIM)[1] for p in range(5)}
        found = server.attacked(VICTIM, 3, self_shares, row_shares)
        assert found is not None
        assert equal_words(found, planted(VICTIM)) == LENGTH

    @pytest.mark.parametrize(
        "active",
        [{1, 2, 3, 4}, {0, 1, 2}, {0}, set()],
        ids=["without the victim", "too few", "the victim alone", "nobody"],
    )
    def test_active_sets_of_the_servers_choice(self, active: set[int]) -> None:
        """The victim is in the sum with enough others, or it sends nothing."""
        server = ready(5)
        with pytest.raises(SecureSumError, match=r"not in it|3 members; .* needs 4|1 members"):
            server.prepare(VICTIM, active=frozenset(active))

    def test_wrong_sizes(self) -> None:
        """Every field of a step has one length."""
        server = ready(5)
        honest = (to_bitmap(range(5), 5), server.boxes_for(VICTIM, 1, range(5)))
        label = secure_sum.Label("run", "update", 1, 0)
        for active, boxes, field in (
            (b"", honest[1], "active"),
            (honest[0] + b"\0", honest[1], "active"),
            (b"\xff", honest[1], "active"),
            (honest[0], honest[1][:-1], "boxes"),
            (honest[0], honest[1] + b"\0", "boxes"),
            (honest[0], b"", "boxes"),
            (honest[0], honest[1] + bytes(BOX_BYTES), "boxes"),
        ):
            with pytest.raises(SecureSumError, match=f"field '{field}'"):
                server.clients[VICTIM].prepare(1, occasion(), active, boxes, label)
        for position in range(5):
            server.update(position)
        for survivors in (b"", honest[0] + b"\0", b"\xff"):
            with pytest.raises(SecureSumError, match="field 'survivors'"):
                server.clients[VICTIM].confirm(1, survivors)
        for position in range(5):
            server.confirm(position, 1, range(5))
        confirmed, codes = server.confirmations(VICTIM, 1, range(5), range(5))
        for first, second, field in (
            (b"", codes, "confirmed"),
            (b"\xff", codes, "confirmed"),
            (confirmed, codes[:-1], "confirmations"),
            (confirmed, codes + bytes(CONFIRMATION_BYTES), "confirmations"),
            (confirmed, b"", "confirmations"),
        ):
            with pytest.raises(SecureSumError, match=f"field '{field}'"):
                server.clients[VICTIM].reveal(1, first, second)
        with pytest.raises(SecureSumError, match="names a position that no member has"):
            server.clients[VICTIM].reveal(1, b"\x20", b"")


class TestSurvivors:
    """Who is said to be in the sum: of each member one kind of share leaves a merchant."""

    def test_a_split_view(self) -> None:
        """Two sets of survivors cannot both be confirmed by enough members."""
        server = ready(7)
        for position in range(7):
            server.update(position)
        states = [snapshot(client) for client in server.clients]
        with_victim, without = server.everyone, server.everyone - {VICTIM}
        view = {p: with_victim if p < 4 else without for p in range(7)}
        for position, survivors in view.items():
            server.confirm(position, 1, survivors)
        agreeing = {p: [o for o in view if view[o] == view[p]] for p in view}
        for position, survivors in view.items():
            with pytest.raises(SecureSumError, match=r"[34] confirmations, 5 are needed"):
                server.reveal(position, 1, survivors, agreeing[position])
            codes = {o: server.codes[1, view[o], o].get(position, bytes(16)) for o in survivors}
            mixed = b"".join(codes[o] for o in sorted(survivors) if o != position)
            with pytest.raises(SecureSumError, match="did not confirm this step's set"):
                server.clients[position].reveal(1, to_bitmap(survivors, 7), mixed)
        own = {p: both_shares(states[p], VICTIM)[0] for p in view}
        rows = {p: both_shares(states[p], VICTIM)[1] for p in view}
        found = server.attacked(VICTIM, 1, own, rows)
        assert found is not None
        assert equal_words(found, planted(VICTIM)) == LENGTH

    def test_both_kinds_of_share_in_one_step(self) -> None:
        """A merchant confirms and reveals once; twice would give the victim away."""
        server = ready(7)
        for position in range(7):
            server.update(position)
        states = [snapshot(client) for client in server.clients]
        first: dict[int, bytes] = {}
        for position in server.everyone:
            server.confirm(position, 1, server.everyone)
        everyone, without = server.everyone, server.everyone - {VICTIM}
        for position in sorted(everyone):
            with pytest.raises(SecureSumError, match=r"a confirmation of step 1 .* \(again\)"):
                server.confirm(position, 1, without)
            first[position] = server.reveal(position, 1, everyone, everyone)[VICTIM]
            for _ in range(2):
                with pytest.raises(SecureSumError, match="step 1 is not under way"):
                    server.reveal(position, 1, everyone, everyone)
            with pytest.raises(SecureSumError, match="step 1 is not under way"):
                server.confirm(position, 1, without)
        second: dict[int, bytes] = {}
        for position in sorted(without):  # merchants that would go back to before the step's end
            server.clients[position].state = deepcopy(states[position])
            server.confirm(position, 1, without)
        for position in sorted(without):
            second[position] = server.reveal(position, 1, without, without)[VICTIM]
        assert server.attacked(VICTIM, 1, first, {}) is None
        found = server.attacked(VICTIM, 1, first, second)
        assert found is not None
        assert equal_words(found, planted(VICTIM)) == LENGTH

    def test_both_kinds_of_share_in_different_steps(self) -> None:
        """The secrets of two steps have nothing to do with each other."""
        server = ready(7)
        states = []
        for position in range(7):
            server.update(position)
        states = [snapshot(client) for client in server.clients]
        for position in range(7):
            server.confirm(position, 1, server.everyone)
        own = {p: server.reveal(p, 1, server.everyone, server.everyone)[VICTIM] for p in range(7)}
        for position in range(7):
            server.update(position, 2, what=occasion(2))
        without = server.everyone - {VICTIM}
        for position in sorted(without):
            server.confirm(position, 2, without)
        rows = {p: server.reveal(p, 2, without, without)[VICTIM] for p in sorted(without)}
        assert server.attacked(VICTIM, 1, own, rows) is None
        assert server.attacked(VICTIM, 2, own, rows) is None
        self_1, row_2 = secret_of(own, 5), secret_of(rows, 5)
        for step in (1, 2):
            keys = row_of(server.escrows[2, VICTIM], row_2)
            reply = server.replies[step, VICTIM]
            pairs = {other: keys[other] for other in range(1, 7)}
            found = unmasked_alone(reply.masked, VICTIM, reply.context, self_1, pairs)
            assert_nothing_learnt(found, planted(VICTIM))
        same_step = {p: both_shares(states[p], VICTIM)[1] for p in range(7)}
        found_1 = server.attacked(VICTIM, 1, own, same_step)
        assert found_1 is not None
        assert equal_words(found_1, planted(VICTIM)) == LENGTH

    def test_false_dropouts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As many as may drop out leave a sum of enough; one more and nobody confirms."""
        for claimed in (1, 2):
            server = ready(7)
            for position in range(7):
                server.update(position)
            kept = frozenset(range(7 - claimed))
            for position in kept:
                server.confirm(position, 1, kept)
            shares = {p: server.reveal(p, 1, kept, kept) for p in kept}
            total = server.sum_of(1, kept, shares)
            exact = np.sum([planted(p) for p in kept], axis=0, dtype=np.uint32)
            assert equal_words(total, exact) == LENGTH
            for out in range(7 - claimed, 7):
                own = {out: both_shares(server.clients[out].state, out)[0]}
                assert server.attacked(out, 1, own, {p: s[out] for p, s in shares.items()}) is None
        server = ready(7)
        for position in range(7):
            server.update(position)
        for position in range(4):
            with pytest.raises(SecureSumError, match="4 members; this merchant needs 5 or more"):
                server.confirm(position, 1, range(4))
        assert all(client.state.phase is Phase.MASKED for client in server.clients)
        monkeypatch.setattr(MerchantSession, "_check_members", lambda *_args: None)
        monkeypatch.setattr(secure_sum, "threshold", lambda _members: 1)
        alone = frozenset({VICTIM})
        for client in server.clients:
            client.state.phase = Phase.CONFIRMED
            assert client.state.step is not None
            client.state.step.survivors = [VICTIM]
        given = {
            p: client.reveal(1, to_bitmap([], 7), b"") for p, client in enumerate(server.clients)
        }
        cut = {p: {d: raw[32 * d : 32 * d + 32] for d in range(7)} for p, raw in given.items()}
        total = server.sum_of(1, alone, cut)
        assert equal_words(total, planted(VICTIM)) == LENGTH

    def test_a_member_that_is_out_does_not_come_back(self) -> None:
        """With its old box or a fresh one: who is out stays out until the next session."""
        server = ready(7)
        for position in range(7):
            server.update(position)
        states = [snapshot(client) for client in server.clients]
        without = server.everyone - {VICTIM}
        for position in without:
            server.confirm(position, 1, without)
        rows = {p: server.reveal(p, 1, without, without)[VICTIM] for p in without}
        late = server.boxes_for(1, 2, server.everyone)  # with the escrow that came with its vector
        old = server.escrows[1, VICTIM].box(1) + late[BOX_BYTES:]
        for boxes in (late, old):
            with pytest.raises(SecureSumError, match="'m000' cannot be in it; who is out stays"):
                server.prepare(1, 2, boxes=boxes)
        naive = server.clients[1]
        naive.state.members = list(range(7))  # one that forgot who is out
        with pytest.raises(
            SecureSumError, match="'m000' left a box for step 2 that is not authentic"
        ):
            server.prepare(1, 2, boxes=old)
        assert server.attacked(VICTIM, 1, {}, rows) is None
        own = {p: both_shares(states[p], VICTIM)[0] for p in without}  # back in the same step
        found = server.attacked(VICTIM, 1, own, rows)
        assert found is not None
        assert equal_words(found, planted(VICTIM)) == LENGTH

    def test_out_at_the_start_of_a_step(self) -> None:
        """A member that was not asked once is not asked again."""
        server = ready(7)
        fewer = server.everyone - {6}
        for position in fewer:
            server.update(position, 1, fewer)
        server.update(6, 1)  # it was told of everybody, and leaves an escrow
        with pytest.raises(SecureSumError, match="'m006' cannot be in it; who is out stays out"):
            server.confirm(VICTIM, 1, server.everyone)
        with pytest.raises(SecureSumError, match="'m006' cannot be in it; who is out stays out"):
            server.prepare(VICTIM, 2)
        assert both_missing(server, 6)


def both_missing(server: Server, position: int) -> bool:
    """Tell whether no other merchant holds a share of a member in the step under way."""
    steps = [client.state.step for p, client in enumerate(server.clients) if p != position]
    return all(step is not None and position not in step.shares for step in steps)


class TestOrder:
    """Messages twice, early, late, or of another time."""

    def test_out_of_order(self) -> None:
        """Each message has its one moment; a refused one changes nothing."""
        server = advertised(5)
        label, everyone = secure_sum.Label("run", "update", 1, 0), to_bitmap(range(5), 5)
        victim = server.clients[VICTIM]
        with pytest.raises(SecureSumError, match="no roster yet"):
            victim.prepare(1, occasion(), everyone, b"", label)
        for early in (lambda: victim.confirm(0, everyone), lambda: victim.reveal(0, everyone, b"")):
            with pytest.raises(SecureSumError, match="step 0 is not under way"):
                early()
        server = ready(5)
        victim = server.clients[VICTIM]
        before = snapshot(victim)
        for step in (0, 1, 2):
            with pytest.raises(SecureSumError, match=f"step {step} is not under way"):
                victim.confirm(step, everyone)
            with pytest.raises(SecureSumError, match=f"step {step} is not under way"):
                victim.reveal(step, everyone, b"")
        assert victim.state == before
        for position in range(5):
            server.update(position)
        before = snapshot(victim)
        with pytest.raises(SecureSumError, match="shares of step 1 cannot be given"):
            victim.reveal(1, everyone, bytes(4 * CONFIRMATION_BYTES))
        for step in (0, 2, 3):
            with pytest.raises(SecureSumError, match=f"step {step} is not under way"):
                victim.confirm(step, everyone)
        assert victim.state == before
        own = {p: both_shares(client.state, VICTIM)[0] for p, client in enumerate(server.clients)}
        rows = {p: both_shares(client.state, VICTIM)[1] for p, client in enumerate(server.clients)}
        found = server.attacked(VICTIM, 1, own, rows)  # what shares without an order would give
        assert found is not None
        assert equal_words(found, planted(VICTIM)) == LENGTH

    def test_an_old_step(self) -> None:
        """A step is never masked twice: its masks would be the same, and cancel."""
        server = ready(4)
        before = snapshot(server.clients[VICTIM])
        prepared = server.prepare(VICTIM)
        masked = server.update(VICTIM)
        with pytest.raises(SecureSumError, match=r"expected step 2 .* got 1; an old step is never"):
            server.prepare(VICTIM)
        with pytest.raises(SecureSumError, match="step 1 was begun before"):
            server.clients[VICTIM].mask(prepared, planted(9))
        for step in (0, 3):
            with pytest.raises(SecureSumError, match=f"expected step 2 .* got {step}"):
                server.clients[VICTIM].prepare(
                    step, occasion(), to_bitmap(range(4), 4), b"", prepared.label
                )
        naive = MerchantSession(server.identities[0], server.members, 2, before)
        again, _ = naive.mask(prepared, planted(VICTIM) + np.uint32(5))
        assert equal_words(again - masked, np.full(LENGTH, 5, np.uint32)) == LENGTH

    def test_boxes_of_other_steps_and_members(self) -> None:
        """A box opens for one receiver, from one sender, in one step of one session."""
        server = ready(4)
        other_session = ready(4)
        server.honest_step()
        honest = server.boxes_for(VICTIM, 2, range(4))
        for wrong in (
            server.boxes_for(VICTIM, 1, range(4)),
            server.boxes_for(1, 2, range(4)),
            other_session.boxes_for(VICTIM, 1, range(4)),
            honest[BOX_BYTES:] + honest[:BOX_BYTES],
            bytes(3 * BOX_BYTES),
        ):
            with pytest.raises(
                SecureSumError, match="'m001' left a box for step 2 that is not authentic"
            ):
                server.prepare(VICTIM, 2, boxes=wrong)

    def test_confirmations_of_another_step(self) -> None:
        """Confirmations of an old step say nothing of the new one."""
        server = ready(4)
        server.honest_step()
        for position in range(4):
            server.update(position, 2, what=occasion(2))
            server.confirm(position, 2, range(4))
        everyone = server.everyone
        with pytest.raises(SecureSumError, match="'m001' did not confirm this step's set"):
            server.clients[VICTIM].reveal(2, *server.confirmations(VICTIM, 1, everyone, everyone))
        swapped = server.confirmations(1, 2, everyone, everyone)
        with pytest.raises(SecureSumError, match="'m001' did not confirm this step's set"):
            server.clients[VICTIM].reveal(2, *swapped)

    def test_too_few_confirmations(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Fewer than the threshold unmask nothing, whatever the server thinks it is."""
        server = ready(7)
        for position in range(7):
            server.update(position)
        states = [snapshot(client) for client in server.clients]
        for position in range(7):
            server.confirm(position, 1, range(7))
        monkeypatch.setattr("server.secure_sum.Roster.threshold", property(lambda _self: 1))
        for count in range(5):
            with pytest.raises(SecureSumError, match="confirmations, 5 are needed"):
                server.reveal(VICTIM, 1, range(7), range(count))
        own = {p: both_shares(states[p], VICTIM)[0] for p in range(7)}
        rows = {p: both_shares(states[p], VICTIM)[1] for p in range(7)}
        assert server.attacked(VICTIM, 1, own, dict(list(rows.items())[:4])) is None
        assert server.attacked(VICTIM, 1, own, rows) is not None


def gathered(
    server: Server, guilty: list[int], groups: dict[frozenset[int], list[int]]
) -> dict[frozenset[int], dict[int, bytes]]:
    """Show each group of honest members a set of survivors of its own; return what they reveal.

    Colluders confirm every set, and hand over both shares that they hold of the victim.
    """
    states = {p: snapshot(server.clients[p]) for p in guilty}
    shares: dict[frozenset[int], dict[int, bytes]] = {}
    for survivors, group in groups.items():
        kind = 0 if VICTIM in survivors else 1
        shares[survivors] = {p: both_shares(state, VICTIM)[kind] for p, state in states.items()}
        for position in group:
            server.confirm(position, 1, survivors)
        for position in guilty:
            server.clients[position].state = deepcopy(states[position])
            server.confirm(position, 1, survivors)
        if len(group) + len(guilty) >= server.needed:
            for position in group:
                given = server.reveal(position, 1, survivors, [*group, *guilty])
                shares[survivors][position] = given[VICTIM]
            continue
        for position in group:
            with pytest.raises(SecureSumError, match=r"confirmations, .* are needed"):
                server.reveal(position, 1, survivors, [*group, *guilty])
    return shares


def best_effort(count: int, colluders: int) -> int:
    """Attack a victim with colluders' states and every split of the honest members.

    The server shows some honest members a sum with the victim and the others one without it.

    Returns:
        The number of splits in which the victim's vector was found.
    """
    guilty, found = list(range(count - colluders, count)), 0
    honest = [p for p in range(count) if p not in guilty]
    for lied_to in range(len(honest)):
        server = ready(count)
        for position in range(count):
            server.update(position)
        known = {p: pair_keys_of(server.clients[p].state, 1)[VICTIM] for p in guilty}
        everyone, without = server.everyone, server.everyone - {VICTIM}
        kept = len(honest) - lied_to
        shares = gathered(server, guilty, {everyone: honest[:kept], without: honest[kept:]})
        vector = server.attacked(VICTIM, 1, shares[everyone], shares[without])
        if vector is not None:
            assert equal_words(vector, planted(VICTIM)) == LENGTH
            found += 1
            continue
        assert min(len(given) for given in shares.values()) < server.needed
        reply = server.replies[1, VICTIM]
        secret = secret_of(shares[everyone], server.needed)  # too few shares, or the right b
        attempt = unmasked_alone(reply.masked, VICTIM, reply.context, secret, known)
        assert_nothing_learnt(attempt, planted(VICTIM))
    return found


@pytest.mark.parametrize("count", [4, 5, 6, 7, 10])
def test_a_third_of_colluders_learn_nothing(count: int) -> None:
    """With up to floor((n - 1) / 3) members' complete states one share is always missing."""
    assert best_effort(count, (count - 1) // 3) == 0


@pytest.mark.parametrize("count", [4, 7, 10])
def test_one_colluder_more_learns_all(count: int) -> None:
    """The bound is sharp for n = 3k + 1, and the attack of the test above is one."""
    assert best_effort(count, (count - 1) // 3 + 1) > 0


def test_colluders_alone_hold_too_few_shares() -> None:
    """All states of a third of the members, over all subsets, restore neither secret."""
    server = ready(7)
    for position in range(7):
        server.update(position)
    truth = server.escrows[1, VICTIM].commitments
    for guilty in combinations(range(1, 7), 2):
        own = {p: both_shares(server.clients[p].state, VICTIM)[0] for p in guilty}
        rows = {p: both_shares(server.clients[p].state, VICTIM)[1] for p in guilty}
        for shares, promised in ((own, truth[:KEY_BYTES]), (rows, truth[KEY_BYTES:])):
            assert session_module.commitment(secret_of(shares, 2)) != promised
        assert server.attacked(VICTIM, 1, own, rows) is None


class TestWorkers:
    """The same through real workers, ledgers and messages."""

    def test_a_failed_attempt_is_asked_again(self, tmp_path: Path) -> None:
        """The retry has noise and a charge of its own; nothing is masked twice."""
        server = shops(tmp_path)
        server.set_up()
        vectors, answers = [], []
        for attempt in (0, 1):
            before = [deepcopy(store.load()) for store in server.stores]
            for position in range(3):
                answer = server.ask(position, attempt + 1, attempt=attempt)
                assert not answer.refusal
                if position == VICTIM:
                    answers.append(answer)
                    request = server.request(VICTIM, attempt + 1, attempt=attempt)
                    vectors.append(
                        server.exact(VICTIM, before[VICTIM], request, answer.vector).view(np.int32)
                    )
        ledger = server.workers[VICTIM].ledger
        assert list(charges_of(ledger)) == [("update", 1, 0), ("update", 1, 1)]
        assert entries_of(ledger, "refuse") == []
        difference = vectors[0].astype(np.float64) - vectors[1]
        alone = server.workers[VICTIM]._plan.update
        share = alone.event.noise_multiplier * alone.steps / np.sqrt(2)
        assert not np.any(difference == 0)
        assert 0.5 < difference.std() / (share * np.sqrt(2)) < 1.6  # two independent shares
        again = server.ask(VICTIM, 2, attempt=1)  # the last question, once more
        assert (again.refusal, again.vector.tobytes()) == ("", answers[-1].vector.tobytes())
        assert again.escrow == answers[-1].escrow
        for attempt in (0, 1):
            for step in (1, 2, 3):
                if (attempt, step) == (1, 2):
                    continue
                if step < 3:
                    with pytest.raises(SecureSumError, match="an old step is never taken up"):
                        server.ask(VICTIM, step, attempt=attempt)
                    continue
                refusal = server.ask(VICTIM, step, attempt=attempt).refusal
                assert f"update of round 1, attempt {attempt}, was released before" in refusal
        assert len(charges_of(ledger)) == 2
        assert server.stores[VICTIM].load().next_step == 3  # a refusal begins no step

    def test_what_masking_twice_would_leak(self) -> None:
        """The same vectors in two sums, one without the victim, differ by the victim's vector."""
        server = ready(7)
        first = server.honest_step()
        second = server.honest_step(2, out=frozenset({VICTIM}), what=occasion(attempt=1))
        assert equal_words(first - second, planted(VICTIM)) == LENGTH
        fresh = NoiseSource.seeded(1, "fresh")
        server = ready(7)
        first = server.honest_step()
        for position in range(1, 7):  # as the workers do it: fresh noise for the second attempt
            noise = fresh.discrete_gaussian(LENGTH, 1e8).astype(np.uint32)
            server.update(position, 2, what=occasion(1, 1), vector=planted(position) + noise)
        kept = frozenset(range(1, 7))
        for position in sorted(kept):
            server.confirm(position, 2, kept)
        shares = {p: server.reveal(p, 2, kept, kept) for p in sorted(kept)}
        assert equal_words(first - server.sum_of(2, kept, shares), planted(VICTIM)) <= 1

    def test_replays(self, tmp_path: Path) -> None:
        """Old rounds, sessions, runs and contracts are refused, and cost nothing."""
        server = shops(tmp_path)
        server.set_up()
        for position in range(3):
            assert not server.ask(position, 1).refusal
        refusal = server.ask(VICTIM, 2).refusal
        assert "update of round 1, attempt 0, was released before" in refusal
        with pytest.raises(SecureSumError, match="session is of another run or contract"):
            server.ask(VICTIM, 2, run="another", attempt=1)
        with pytest.raises(SecureSumError, match="this merchant is in session 1, not 2"):
            server.workers[VICTIM].answer(
                server.request(VICTIM, 2, attempt=1).__class__(
                    **{**vars(server.request(VICTIM, 2, attempt=1)), "session": 2}
                )
            )
        assert "pinned contract" in server.ask(VICTIM, 2, contract="0" * 64).refusal
        with pytest.raises(WireError, match="pinned contract"):
            server.workers[VICTIM].advertise(Advertise("run", "0" * 64, 1, b""))
        boxes = server.request(VICTIM, 1).boxes
        with pytest.raises(
            SecureSumError, match="'m001' left a box for step 2 that is not authentic"
        ):
            server.ask(VICTIM, 2, attempt=1, boxes=boxes)
        for message in (Confirm(2, 1, b"\x07"), Reveal(0, 1, b"\x07", b"")):
            handler = "confirm" if isinstance(message, Confirm) else "reveal"
            with pytest.raises(SecureSumError, match="this merchant is in session 1"):
                getattr(server.workers[VICTIM], handler)(message)
        assert len(charges_of(server.workers[VICTIM].ledger)) == 1
        server.set_up(2)  # a new session does not make the old occasion new
        assert "was released before" in server.ask(VICTIM, 1, session=2).refusal
        with pytest.raises(SecureSumError, match="this merchant is in session 2, not 1"):
            server.ask(VICTIM, 2, attempt=1)

    def test_a_session_that_is_restarted_in_mid_round(self, tmp_path: Path) -> None:
        """The step under way is lost for good, its occasion spent; no share of it is left."""
        server = shops(tmp_path)
        server.set_up()
        for position in range(3):
            server.ask(position, 1)
        codes = server.confirm(1)
        held = [deepcopy(store.load()) for store in server.stores]
        server.set_up()  # the same number again
        for position, worker in enumerate(server.workers):
            with pytest.raises(SecureSumError, match="step 1 is not under way"):
                worker.confirm(Confirm(1, 1, b"\x03"))
            with pytest.raises(SecureSumError, match="step 1 is not under way"):
                worker.reveal(server.reveal_message(position, 1, codes))
            assert "was released before" in server.ask(position, 1).refusal
        state = server.stores[1].load()
        assert state.step is None
        assert held[1].step is not None
        assert held[1].step.shares[VICTIM].hex().encode() not in state_to_bytes(state)
        assert len(held[1].step.shares) == 3  # a merchant that kept them could be asked for both

    def test_plain_requests_are_no_way_round(self, tmp_path: Path) -> None:
        """A request without a session gets no unmasked vector, and is not charged."""
        server = shops(tmp_path)
        honest = server.contract
        request = SumRequest(
            "run", honest.sha256, "census", 0, 0, 0.0, 0, 0, b"", b"", b"", np.zeros(24)
        )
        with pytest.raises(SecureSumError, match="no session under way"):
            server.workers[VICTIM].answer(request)
        server.set_up()
        with pytest.raises(SecureSumError, match="this merchant is in session 1, not 0"):
            server.workers[VICTIM].answer(request)
        assert charges_of(server.workers[VICTIM].ledger) == {}


class TestTwoMessagesAtOnce:
    """A server that has two processes of one merchant answer at the same time."""

    def test_a_new_session_while_an_answer_is_computed(self, tmp_path: Path) -> None:
        """The keys that mask must be those of the session that was checked."""
        server = shops(tmp_path, 4)
        server.set_up()
        stale: list[Advertised] = []

        def meanwhile(*_occasion: object) -> NoiseSource:
            """Set up another session of the same number while the sum is computed."""
            if not stale:
                message = Advertise("run", server.contract.sha256, 1, b"")
                party = server.workers[VICTIM]._party
                advert, head = party.advertise(message, bytes(32), b"")
                stale.append(Advertised("m000", advert, head))
                adverts = [stale[0].advert]
                adverts += [w.advertise(message).advert for w in server.workers[1:]]
                share = Share("run", server.contract.sha256, 1, b"", adverts)
                party.share(share, lambda _roster: b"")
            return NoiseSource.fresh()

        server.workers[VICTIM] = worker_of(server, VICTIM, tmp_path, noise_for=meanwhile)
        with pytest.raises(
            SecureSumError, match="field 'session': another session was set up meanwhile"
        ):
            server.ask(VICTIM, 1)
        assert stale
        state = server.stores[VICTIM].load()  # the new session is as it was set up
        assert (state.phase, state.next_step, state.step) == (Phase.READY, 1, None)
        assert len(charges_of(server.workers[VICTIM].ledger)) == 1  # paid, and nothing left

    def test_the_keys_of_a_smaller_session_unmask_a_larger_one(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Pair keys that are not there would be empty, so everybody would have them.

        Two checks are in the way: of the session, and of the size of a key.
        """
        identities, members = enrolled(14)
        large = [MerchantSession.advertise(i, members, 3, CONTEXT, 1) for i in identities]
        server = Server(identities, members, large, [c.advert for c in large])
        for position, client in enumerate(large):
            server.escrows[1, position] = Escrow.from_bytes(client.share(server.adverts), 14)
        victim = 13
        active = frozenset(range(4, 14))  # ten of fourteen, the threshold
        prepared = server.prepare(victim, 1, active)
        few = [MerchantSession.advertise(i, members, 3, CONTEXT, 1) for i in identities[:3]]
        again = MerchantSession.advertise(identities[victim], members, 3, CONTEXT, 1)
        small = Server([], members, [*few, again], [c.advert for c in [*few, again]])
        for position, client in enumerate(small.clients):
            small.escrows[1, position] = Escrow.from_bytes(client.share(small.adverts), 4)
        with pytest.raises(SecureSumError, match="another session was set up meanwhile"):
            again.mask(prepared, planted(victim))
        unbound = replace(prepared, roster_hash=again.state.roster_hash)
        before = snapshot(again)
        with pytest.raises(ValueError, match="expected a key of 32 bytes, got 0"):
            again.mask(unbound, planted(victim))
        assert again.state == before
        monkeypatch.setattr(session_module, "expand", expand_any_key)
        masked, _ = again.mask(unbound, planted(victim))
        for position in range(3):  # honest members unmask a sum that the victim is said to be in
            small.update(position)
        for position in range(3):
            small.confirm(position, 1, range(4))
        shares = {p: small.reveal(p, 1, range(4), range(3))[3] for p in range(3)}
        known = dict.fromkeys(active - {victim, 3}, b"")
        plus = [mask_key(key, prepared.context) for other, key in known.items() if other < 3]
        minus = [mask_key(key, prepared.context) for other, key in known.items() if other > 3]
        minus += [mask_key(secret_of(shares, 3), prepared.context), mask_key(b"", prepared.context)]
        add_masks(masked, plus, minus)
        assert equal_words(masked, planted(victim)) == LENGTH

    def test_two_confirmations_at_once(self, tmp_path: Path) -> None:
        """Two processes that confirm at the same time do not vouch for two sets."""
        server = shops(tmp_path, 4, files=True)
        server.set_up()
        for position in range(4):
            server.ask(position, 1)
        identity, outcomes = server.identities[VICTIM], list[str]()
        other = SecureParty(identity, server.members, 3, server.stores[VICTIM])

        def second() -> None:
            try:
                other.confirm(Confirm(1, 1, to_bitmap((0, 1, 2), 4)))
                outcomes.append("a second confirmation")
            except SecureSumError as refusal:
                outcomes.append(str(refusal))

        class Slow(FileStore):
            """Saves after the second process had time to read the file too."""

            def save(self, state: secure_sum.State) -> None:
                process.start()
                process.join(0.1)
                super().save(state)

        process = Thread(target=second)
        party = SecureParty(identity, server.members, 3, Slow(tmp_path / "m000.sealed", identity))
        party.confirm(Confirm(1, 1, to_bitmap(range(4), 4)))
        process.join(10)
        assert outcomes == ["field 'step': a confirmation of step 1 cannot be given (again)"]
