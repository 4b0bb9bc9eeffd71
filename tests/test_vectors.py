"""The known answers of secure sums: published ones, and those of a second implementation."""

import hashlib
import json
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from clients.secure_sum import Label, MerchantSession, Phase, State
from common import session as agreed
from common.identity import Identity, Members
from common.masks import digest, expand, extract, joined, stream_bytes
from common.session import Advert, Roster
from common.shares import combine, split
from server.secure_sum import CoordinatorSession

FOLDER = Path(__file__).parent / "vectors"
DOCUMENT = json.loads((FOLDER / "secure_sum.json").read_text(encoding="utf-8"))
VECTORS = DOCUMENT["vectors"]
FINISHED = "session"  # kinds that have a test of their own

Answer = dict[str, Any]
raw = bytes.fromhex


def elements(text: str) -> np.ndarray:
    """Read field elements."""
    return np.frombuffer(raw(text), "<u2").astype(np.uint16)


def told(values: np.ndarray) -> str:
    """Write numbers as little-endian words."""
    return values.astype(values.dtype.newbyteorder("<")).tobytes().hex()


def x25519(private: str, public: str) -> Answer:
    """Agree on a secret."""
    key = X25519PrivateKey.from_private_bytes(raw(private))
    return {"secret": key.exchange(X25519PublicKey.from_public_bytes(raw(public))).hex()}


def ed25519(seed: str, message: str) -> Answer:
    """Sign as an identity does."""
    identity = Identity("shop", Ed25519PrivateKey.from_private_bytes(raw(seed)))
    signature = identity.sign(raw(message))
    assert Members({"shop": identity.public}).verify("shop", raw(message), signature)
    return {"public": identity.public.hex(), "signature": signature.hex()}


def hkdf(salt: str, secret: str, info: str) -> Answer:
    """Derive a key."""
    key = extract(raw(salt), raw(secret))
    return {"extracted": key.hex(), "expanded": expand(key, raw(info)).hex()}


def box(key: str, nonce: str, text: str, associated: str) -> Answer:
    """Seal a box."""
    sealed = ChaCha20Poly1305(raw(key)).encrypt(raw(nonce), raw(text), raw(associated))
    return {"sealed": sealed.hex()}


def counter_mode(key: str, counter: str, text: str) -> Answer:
    """Encrypt in counter mode."""
    cipher = Cipher(algorithms.AES(raw(key)), modes.CTR(raw(counter)))
    return {"sealed": cipher.encryptor().update(raw(text)).hex()}


def split_with(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """Return the function that splits with given coefficients."""

    def compute(secret: str, coefficients: str, holders: int) -> Answer:
        given = elements(coefficients)
        monkeypatch.setattr("common.shares.random_elements", lambda _count: given)
        shares = split(elements(secret), 1 + len(coefficients) // len(secret), holders)
        return {"shares": [told(share) for share in shares]}

    return compute


def bitmap(positions: list[int], members: int) -> Answer:
    """Write a set, and read it back."""
    found = agreed.to_bitmap(positions, members)
    assert agreed.from_bitmap(found, members, "x") == set(positions)
    return {"bitmap": found.hex()}


COMPUTE: dict[str, Callable[..., Answer]] = {
    "x25519": x25519,
    "ed25519": ed25519,
    "hkdf": hkdf,
    "box": box,
    "counter mode": counter_mode,
    "bitmap": bitmap,
    "joined": lambda parts: {"joined": joined(*map(raw, parts)).hex()},
    "digest": lambda parts: {"digest": digest(*map(raw, parts)).hex()},
    "stream": lambda key, count: {"stream": stream_bytes(raw(key), count).hex()},
    "long stream": lambda key, count: {
        "sha256": hashlib.sha256(stream_bytes(raw(key), count)).hexdigest()
    },
    "combine": lambda points, shares: {
        "secret": told(combine(tuple(points), np.array([elements(share) for share in shares])))
    },
    "session context": lambda run, number, contract: {
        "context": agreed.session_context(run, number, contract).hex()
    },
    "occasion": lambda stage, round, attempt, customers, model: {
        "occasion": agreed.occasion_hash(stage, round, attempt, customers, np.array(model)).hex()
    },
    "step context": lambda roster, step, occasion, active: {
        "context": agreed.step_context(raw(roster), step, raw(occasion), frozenset(active)).hex()
    },
    "survivors statement": lambda context, survivors: {
        "statement": agreed.survivors_statement(raw(context), frozenset(survivors)).hex()
    },
    "pair info": lambda one, other, step: {"info": agreed.pair_secret_info(one, other, step).hex()},
    "direction": lambda label, sender, receiver: {
        "info": agreed.direction(raw(label), sender, receiver).hex()
    },
    "mask key": lambda secret, context: {"key": agreed.mask_key(raw(secret), raw(context)).hex()},
    "row key": lambda secret: {"key": agreed.row_key(raw(secret)).hex()},
    "mark": lambda key: {"mark": agreed.mark(raw(key)).hex()},
    "share digest": lambda share: {"digest": agreed.share_digest(raw(share)).hex()},
    "commitment": lambda secret: {"commitment": agreed.commitment(raw(secret)).hex()},
    "threshold": lambda members: {"threshold": agreed.threshold(members)},
    "sealing key": lambda seed, purpose: {
        "key": Identity("shop", Ed25519PrivateKey.from_private_bytes(raw(seed)))
        .sealing_key(raw(purpose))
        .hex()
    },
}


@pytest.mark.parametrize(
    "vector", [v for v in VECTORS if v["kind"] != FINISHED], ids=lambda v: v["name"]
)
def test_a_part_gives_the_known_answer(vector: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each building block by itself, computed by our own functions."""
    compute = {**COMPUTE, "split": split_with(monkeypatch)}[vector["kind"]]
    assert compute(**vector["inputs"]) == vector["outputs"]


class Play:
    """A session whose keys and draws are given."""

    def __init__(self, inputs: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inputs = inputs
        self.context = agreed.session_context(inputs["run"], inputs["number"], inputs["contract"])
        self.draws: Iterator[np.ndarray] = iter(())
        for module in ("clients.secure_sum", "common.shares"):
            monkeypatch.setattr(f"{module}.random_elements", self.draw)
        self.identities = [
            Identity(one["id"], Ed25519PrivateKey.from_private_bytes(raw(one["identity"])))
            for one in inputs["members"]
        ]
        self.members = Members({one.merchant: one.public for one in self.identities})
        self.sessions = [
            self.begun(one, identity)
            for one, identity in zip(inputs["members"], self.identities, strict=True)
        ]

    def draw(self, count: int) -> np.ndarray:
        """Return the next elements that were given, instead of random ones."""
        found = next(self.draws)
        assert len(found) == count
        return found

    def deals(self, position: int, step: int) -> None:
        """Let a member draw what was given for a step."""
        one = self.inputs["members"][position]
        names = ("secrets", "coefficients")
        self.draws = iter([elements(one[name][step - 1]) for name in names])

    def begun(self, one: Answer, identity: Identity) -> MerchantSession:
        """Return a member's session after it advertised."""
        private = raw(one["transport"]), raw(one["masking"])
        public = [
            X25519PrivateKey.from_private_bytes(key).public_key().public_bytes_raw()
            for key in private
        ]
        head = raw(one["head"])
        signature = identity.sign(Advert(one["id"], *public, head, b"").signed(self.context))
        advert = Advert(one["id"], *public, head, signature).to_bytes()
        state = State(self.context, 1, Phase.ADVERTISED, *private, advert)
        return MerchantSession(identity, self.members, 3, state)

    def outputs(self) -> Answer:
        """Play the session and its first step; return what was said."""
        bits, lost = self.inputs["bits"], self.inputs["lost"]
        dtype = np.uint32 if bits == 32 else np.uint64
        server = CoordinatorSession(self.context, self.members, 3)
        for session in self.sessions:
            server.take_advert(session.advert, Advert.from_bytes(session.advert).merchant)
        adverts = server.close_roster()
        first, second, masked = [], [], []
        for position, session in enumerate(self.sessions):
            self.deals(position, 1)
            first.append(session.share(adverts))
            server.take_escrow(position, first[-1])
        pairs = list(self.pairs())
        server.begin(raw(self.inputs["occasion"]), 5, dtype)
        for position, session in enumerate(self.sessions):
            prepared = session.prepare(
                1, raw(self.inputs["occasion"]), *server.request(position), LABEL
            )
            vector = np.frombuffer(raw(self.inputs["members"][position]["vector"]), dtype)
            self.deals(position, 2)
            sent, escrow = session.mask(prepared, vector)
            masked.append(told(sent))
            second.append(escrow)
            if position != lost:
                server.take_masked(position, sent, escrow)
        step = self.sessions[0].state.step
        assert step is not None
        survivors, alive = server.close_sum(), server.survivors
        codes = [self.sessions[position].confirm(1, survivors) for position in alive]
        for position, code in zip(alive, codes, strict=True):
            server.take_confirmations(position, code)
        revealed = [
            self.sessions[position].reveal(1, *server.confirmations_for(position))
            for position in alive
        ]
        for position, shares in zip(alive, revealed, strict=True):
            server.take_shares(position, shares)
        roster = Roster(self.context, tuple(Advert.from_bytes(advert) for advert in adverts))
        return {
            "context": self.context.hex(),
            "enrolled": [identity.public.hex() for identity in self.identities],
            "signed": [advert.signed(self.context).hex() for advert in roster.adverts],
            "adverts": [advert.hex() for advert in adverts],
            "roster": roster.hash.hex(),
            "pairs": pairs,
            "escrows of step 1": [escrow.hex() for escrow in first],
            "step": step.context.hex(),
            "masked": masked,
            "escrows of step 2": [escrow.hex() for escrow in second],
            "survivors": survivors.hex(),
            "statement": agreed.survivors_statement(step.context, frozenset(alive)).hex(),
            "confirmations": [code.hex() for code in codes],
            "revealed": [shares.hex() for shares in revealed],
            "total": told(server.total()),
        }

    def pairs(self) -> Iterator[Answer]:
        """Yield what every two members agreed on, as the sender has it; check the receiver's."""
        for sender, session in enumerate(self.sessions):
            for receiver, pair in sorted(session.state.pairs.items()):
                other = self.sessions[receiver].state.pairs[sender]
                assert (pair.box_out, pair.confirm_out) == (other.box_in, other.confirm_in)
                info = agreed.pair_secret_info(sender, receiver, 1)
                yield {
                    "sender": sender,
                    "receiver": receiver,
                    "box": pair.box_out.hex(),
                    "confirm": pair.confirm_out.hex(),
                    "pair of step 1": expand(pair.masking, info).hex(),
                }


LABEL = Label("run", "update", 1, 0)


@pytest.mark.parametrize(
    "vector", [v for v in VECTORS if v["kind"] == FINISHED], ids=lambda v: v["name"]
)
def test_a_whole_session_gives_the_known_answers(
    vector: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From adverts to the sum, byte for byte."""
    found = Play(vector["inputs"], monkeypatch).outputs()
    for name, expected in vector["outputs"].items():
        assert found[name] == expected, name
    assert found.keys() == vector["outputs"].keys()


def test_the_file_is_what_the_script_writes() -> None:
    """Whoever changes one runs the other."""
    specification = spec_from_file_location("make_secure_sum", FOLDER / "make_secure_sum.py")
    assert specification is not None
    assert specification.loader is not None
    script = module_from_spec(specification)
    specification.loader.exec_module(script)
    assert (FOLDER / "secure_sum.json").read_text(encoding="utf-8") == script.text()


def test_the_script_knows_nothing_of_the_code_it_checks() -> None:
    """It imports none of our modules."""
    source = (FOLDER / "make_secure_sum.py").read_text(encoding="utf-8")
    for room in ("common", "clients", "server", "simulations", "audit", "hansa", "tests"):
        assert f"from {room}" not in source
        assert f"import {room}" not in source
