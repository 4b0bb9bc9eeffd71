"""Write `secure_sum.json`: known answers of every part of secure sums, from fixed inputs.

This is a second implementation, after `docs/secure-aggregation.md`, that shares no line with
the first: Python's integers and hashes, and the primitives of `cryptography`. Bytes are
hexadecimal; field elements and vectors are little-endian words one behind the other.

    python tests/vectors/make_secure_sum.py
"""

import hashlib
import hmac
import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

PRIME = 65521
LABEL = b"hansa secure sum 1"
CONTRACT = hashlib.sha256(b"contract").hexdigest()
IDS = ("alpha", "beta", "delta", "gamma")
LOST = 2  # position of the member whose vector does not arrive

Entry = dict[str, Any]


# --- the protocol, once more ---


def sha256(*parts: bytes) -> bytes:
    """Return the hash of bytes in a row."""
    return hashlib.sha256(b"".join(parts)).digest()


def joined(*parts: bytes) -> bytes:
    """Put a length of four bytes before every part."""
    return b"".join(struct.pack(">I", len(part)) + part for part in parts)


def digest(*parts: bytes) -> bytes:
    """Hash the protocol's label and the parts."""
    return sha256(joined(LABEL, *parts))


def extract(salt: bytes, secret: bytes) -> bytes:
    """HKDF-Extract with SHA-256."""
    return hmac.new(salt, secret, "sha256").digest()


def expand(key: bytes, info: bytes) -> bytes:
    """HKDF-Expand with SHA-256, the first block."""
    return hmac.new(key, info + b"\x01", "sha256").digest()


def stream(key: bytes, count: int) -> bytes:
    """AES-256 in counter mode, the first block's counter being 2."""
    first = struct.pack(">IIII", 0, 0, 0, 2)
    return Cipher(algorithms.AES(key), modes.CTR(first)).encryptor().update(bytes(count))


def ring_sum(signed: Iterable[tuple[int, bytes]], bits: int) -> bytes:
    """Add and subtract vectors of little-endian words modulo 2^bits."""
    code, total = "<%d" + {32: "I", 64: "Q"}[bits], []
    for sign, raw in signed:
        words = struct.unpack(code % (len(raw) * 8 // bits), raw)
        total = [
            (one + sign * other) % 2**bits
            for one, other in zip(total or [0] * len(words), words, strict=True)
        ]
    return struct.pack(code % len(total), *total)


def words(raw: bytes) -> list[int]:
    """Read field elements."""
    return list(struct.unpack(f"<{len(raw) // 2}H", raw))


def packed(elements: Iterable[int]) -> bytes:
    """Write field elements."""
    return b"".join(struct.pack("<H", element) for element in elements)


def drawn(label: str, count: int) -> bytes:
    """Return fixed field elements that look random."""
    found: list[int] = []
    number = 0
    while len(found) < count:
        found += [w for w in words(sha256(label.encode(), struct.pack(">I", number))) if w < PRIME]
        number += 1
    return packed(found[:count])


def split(secret: bytes, coefficients: bytes, holders: int) -> list[bytes]:
    """Evaluate at 1, 2, ...; coefficients are in rows, the first row of degree 1."""
    constant, more = words(secret), words(coefficients)
    rows = [constant, *(more[i : i + len(constant)] for i in range(0, len(more), len(constant)))]
    return [
        packed(
            sum(row[e] * point**power for power, row in enumerate(rows)) % PRIME
            for e in range(len(constant))
        )
        for point in range(1, holders + 1)
    ]


def combine(points: list[int], shares: list[bytes]) -> bytes:
    """Interpolate at zero."""
    total = [0] * len(words(shares[0]))
    for x, share in zip(points, shares, strict=True):
        weight = 1
        for other in points:
            if other != x:
                weight = weight * other * pow(other - x, -1, PRIME) % PRIME
        total = [(t + weight * y) % PRIME for t, y in zip(total, words(share), strict=True)]
    return packed(total)


def bitmap(positions: Iterable[int], members: int) -> bytes:
    """Write a set of positions, the lowest in the lowest bit of the first byte."""
    return sum(1 << position for position in positions).to_bytes((members + 7) // 8, "little")


def two(*positions: int) -> bytes:
    """Write positions with two bytes each."""
    return b"".join(struct.pack(">H", position) for position in positions)


def session_context(run: str, number: int, contract: str) -> bytes:
    """Name a session."""
    return digest(b"session", run.encode(), struct.pack(">I", number), contract.encode())


def occasion(stage: str, number: int, attempt: int, customers: float, model: list[float]) -> bytes:
    """Name what a step sums."""
    return digest(
        b"occasion",
        stage.encode(),
        struct.pack(">I", number),
        struct.pack(">I", attempt),
        struct.pack("<d", customers),
        sha256(*(struct.pack("<d", value) for value in model)),
    )


def step_context(roster: bytes, step: int, what: bytes, active: Iterable[int]) -> bytes:
    """Name a step."""
    return digest(b"step", roster, struct.pack(">I", step), what, two(*sorted(active)))


def statement(context: bytes, survivors: Iterable[int]) -> bytes:
    """Say which vectors are in a sum."""
    return digest(b"survivors", context, two(*sorted(survivors)))


def pair_info(one: int, other: int, step: int) -> bytes:
    """Name a pair's key of a step."""
    return b"pair" + two(min(one, other), max(one, other)) + struct.pack(">I", step)


def box(key: bytes, step: int, text: bytes, roster: bytes) -> bytes:
    """Seal with ChaCha20-Poly1305; the nonce is the step, the roster's hash is authenticated."""
    return ChaCha20Poly1305(key).encrypt(step.to_bytes(12, "big"), text, roster)


def public(private: bytes) -> bytes:
    """Return an X25519 public key."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agreed(private: bytes, other: bytes) -> bytes:
    """Return an X25519 shared secret."""
    key = X25519PrivateKey.from_private_bytes(private)
    return key.exchange(X25519PublicKey.from_public_bytes(other))


def signed(seed: bytes, message: bytes) -> bytes:
    """Return an Ed25519 signature."""
    return Ed25519PrivateKey.from_private_bytes(seed).sign(message)


def enrolled(seed: bytes) -> bytes:
    """Return an Ed25519 public key."""
    return Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()


@dataclass
class Member:
    """A merchant with fixed keys and fixed draws."""

    name: str
    position: int

    def fixed(self, what: str) -> bytes:
        """Return 32 fixed bytes."""
        return sha256(f"{self.name} {what}".encode())

    @property
    def transport(self) -> bytes:
        """Private key for boxes and confirmations."""
        return self.fixed("transport")

    @property
    def masking(self) -> bytes:
        """Private key for pair masks."""
        return self.fixed("masking")

    @property
    def head(self) -> bytes:
        """Link of its ledger's last entry."""
        return self.fixed("head")

    def advert_message(self, context: bytes) -> bytes:
        """Return what the advert's signature is over."""
        keys = public(self.transport), public(self.masking)
        return joined(b"advert", context, self.name.encode(), *keys, self.head)

    def advert(self, context: bytes) -> bytes:
        """Return id, keys, head and signature."""
        keys = self.name.encode() + public(self.transport) + public(self.masking)
        return keys + self.head + signed(self.fixed("identity"), self.advert_message(context))

    def secrets(self, step: int) -> bytes:
        """Return b and z of a step."""
        return drawn(f"{self.name} secrets {step}", 32)

    def coefficients(self, step: int) -> bytes:
        """Return the coefficients of degree 1, then 2, of b's and z's polynomials."""
        return drawn(f"{self.name} coefficients {step}", 2 * 32)


@dataclass
class Session:
    """Four members of which three restore a secret."""

    context: bytes

    def __post_init__(self) -> None:
        self.members = [Member(name, position) for position, name in enumerate(IDS)]
        self.adverts = [member.advert(self.context) for member in self.members]
        self.size, self.needed = 4, 3
        self.hash = digest(b"roster", self.context, two(self.size), two(self.needed), *self.adverts)

    def pair_key(self, one: Member, other: Member, step: int) -> bytes:
        """Return the key that a pair's mask of a step comes from."""
        secret = extract(self.hash, agreed(one.masking, public(other.masking)))
        return expand(secret, pair_info(one.position, other.position, step))

    def directed(self, label: bytes, sender: Member, receiver: Member) -> bytes:
        """Return the key of one direction, for boxes or for confirmations."""
        secret = extract(self.hash, agreed(sender.transport, public(receiver.transport)))
        return expand(secret, label + two(sender.position, receiver.position))

    def shares(self, dealer: Member, step: int) -> list[bytes]:
        """Return every holder's share of b, and of z behind it."""
        return split(dealer.secrets(step), dealer.coefficients(step), self.size)

    def escrow(self, dealer: Member, step: int) -> bytes:
        """Return boxes, row, marks, digests and commitments."""
        boxes, keys, marks = b"", b"", b""
        shares, secrets = self.shares(dealer, step), dealer.secrets(step)
        for other in self.members:
            if other is dealer:
                boxes, keys, marks = boxes + bytes(80), keys + bytes(32), marks + bytes(8)
                continue
            key = self.pair_key(dealer, other, step)
            direction = self.directed(b"box", dealer, other)
            boxes += box(direction, step, shares[other.position], self.hash)
            keys += key
            marks += sha256(b"hansa pair mark", key)[:8]
        digests = [
            sha256(b"hansa share mark", share[half : half + 32])[:8]
            for half in (0, 32)
            for share in shares
        ]
        keystream = stream(expand(secrets[32:], b"row"), len(keys))
        row = bytes(one ^ other for one, other in zip(keys, keystream, strict=True))
        promises = [digest(b"commitment", secret) for secret in (secrets[:32], secrets[32:])]
        return b"".join([boxes, row, marks, *digests, *promises])

    def masked(self, member: Member, context: bytes, vector: bytes, bits: int) -> bytes:
        """Return a vector under its masks of step 1."""
        own = stream(expand(member.secrets(1)[:32], b"mask" + context), len(vector))
        terms = [(1, vector), (1, own)]
        for other in self.members:
            if other is not member:
                key = expand(self.pair_key(member, other, 1), b"mask" + context)
                sign = 1 if member.position < other.position else -1
                terms.append((sign, stream(key, len(vector))))
        return ring_sum(terms, bits)

    def confirmations(self, member: Member, said: bytes, survivors: list[int]) -> bytes:
        """Return a survivor's confirmations for the other survivors."""
        return b"".join(
            expand(self.directed(b"confirm", member, self.members[other]), said)[:16]
            for other in survivors
            if other != member.position
        )

    def revealed(self, holder: Member, survivors: list[int]) -> bytes:
        """Return a survivor's shares: of b of survivors, of z of who is out."""
        found = b""
        for dealer in self.members:
            share = self.shares(dealer, 1)[holder.position]
            found += share[:32] if dealer.position in survivors else share[32:]
        return found


# --- the document ---


def entry(kind: str, name: str, how: str, inputs: Entry, outputs: Entry) -> Entry:
    """Return one known answer."""
    return {"kind": kind, "name": name, "how": how, "inputs": inputs, "outputs": outputs}


def standards() -> list[Entry]:
    """Return published vectors of the primitives, as far as the protocol uses them."""
    zeros = bytes(32).hex()
    poem = (
        b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the "
        b"future, sunscreen would be it."
    ).hex()
    return [
        entry(
            "x25519",
            "RFC 7748, section 5.2, first vector",
            "X25519(private, public)",
            {
                "private": "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
                "public": "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
            },
            {"secret": "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"},
        ),
        entry(
            "x25519",
            "RFC 7748, section 6.1, Bob's side",
            "X25519(private, public)",
            {
                "private": "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb",
                "public": "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a",
            },
            {"secret": "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"},
        ),
        entry(
            "ed25519",
            "RFC 8032, section 7.1, test 2",
            "Ed25519 signature of the message under the key of this seed",
            {
                "seed": "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
                "message": "72",
            },
            {
                "public": "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
                "signature": "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
                "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
            },
        ),
        entry(
            "hkdf",
            "RFC 5869, test case 1",
            "HKDF-SHA256; the first block of the output",
            {
                "salt": bytes(range(13)).hex(),
                "secret": "0b" * 22,
                "info": bytes(range(0xF0, 0xFA)).hex(),
            },
            {
                "extracted": "077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5",
                "expanded": "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf",
            },
        ),
        entry(
            "box",
            "RFC 8439, section 2.8.2",
            "AEAD_CHACHA20_POLY1305, ciphertext and tag",
            {
                "key": bytes(range(0x80, 0xA0)).hex(),
                "nonce": "070000004041424344454647",
                "text": poem,
                "associated": "50515253c0c1c2c3c4c5c6c7",
            },
            {
                "sealed": "d31a8d34648e60db7b86afbc53ef7ec2a4aded51296e08fea9e2b5a736ee62d6"
                "3dbea45e8ca9671282fafb69da92728b1a71de0a9e060b2905d6a5b67ecd3b36"
                "92ddbd7f2d778b8c9803aee328091b58fab324e4fad675945585808b4831d7bc"
                "3ff4def08e4b7a9de576d26586cec64b61161ae10b594f09e26a7e902ecbd0600691"
            },
        ),
        entry(
            "counter mode",
            "NIST SP 800-38A, F.5.5, first block",
            "AES-256 in counter mode",
            {
                "key": "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4",
                "counter": bytes(range(0xF0, 0x100)).hex(),
                "text": "6bc1bee22e409f96e93d7e117393172a",
            },
            {"sealed": "601ec313775789a5b7a7f504bbf3d228"},
        ),
        entry(
            "stream",
            "GCM specification (McGrew and Viega), test case 14",
            "AES-256 in counter mode from the block (0, 0, 0, 2): GCM of zeros, without its tag",
            {"key": zeros, "count": 16},
            {"stream": "cea7403d4d606b6e074ec5d3baf39d18"},
        ),
    ]


def parts() -> list[Entry]:
    """Return every building block by itself."""
    key, context, roster = (sha256(word) for word in (b"key", b"context", b"roster"))
    secret, coefficients = drawn("secret", 16), drawn("coefficients", 16 * 3)
    shares = split(secret, coefficients, 5)
    hexes = {"context": context.hex()}
    return [
        entry(
            "joined",
            "parts with lengths",
            "a length of 4 bytes, big-endian, before every part",
            {"parts": ["", "61", "6263"]},
            {"joined": joined(b"", b"a", b"bc").hex()},
        ),
        entry(
            "digest",
            "hash with label",
            "SHA-256 of 'hansa secure sum 1' and the parts, joined",
            {"parts": ["", "61", "6263"]},
            {"digest": digest(b"", b"a", b"bc").hex()},
        ),
        entry(
            "hkdf",
            "extract and expand",
            "HMAC-SHA256(salt, secret); HMAC-SHA256(that, info and a byte 1)",
            {"salt": roster.hex(), "secret": key.hex(), "info": b"info".hex()},
            {
                "extracted": extract(roster, key).hex(),
                "expanded": expand(extract(roster, key), b"info").hex(),
            },
        ),
        entry(
            "stream",
            "mask stream",
            "AES-256 in counter mode from the block (0, 0, 0, 2)",
            {"key": key.hex(), "count": 75},
            {"stream": stream(key, 75).hex()},
        ),
        entry(
            "long stream",
            "long mask stream",
            "SHA-256 of the first 300,001 bytes of the stream",
            {"key": key.hex(), "count": 300_001},
            {"sha256": sha256(stream(key, 300_001)).hex()},
        ),
        entry(
            "box",
            "box of step 7",
            "ChaCha20-Poly1305; the nonce is the step in 12 bytes, big-endian",
            {
                "key": key.hex(),
                "nonce": (7).to_bytes(12, "big").hex(),
                "text": bytes(range(64)).hex(),
                "associated": roster.hex(),
            },
            {"sealed": box(key, 7, bytes(range(64)), roster).hex()},
        ),
        entry(
            "split",
            "shares of one secret, four of five",
            "number by number modulo 65521: secret + sum of coefficient(k) * point^k; points 1 to "
            "5; coefficients of degree 1 of all numbers first",
            {"secret": secret.hex(), "coefficients": coefficients.hex(), "holders": 5},
            {"shares": [share.hex() for share in shares]},
        ),
        entry(
            "combine",
            "the secret from the shares of 5, 1, 4 and 2",
            "Lagrange interpolation at zero",
            {"points": [5, 1, 4, 2], "shares": [shares[i].hex() for i in (4, 0, 3, 1)]},
            {"secret": combine([5, 1, 4, 2], [shares[i] for i in (4, 0, 3, 1)]).hex()},
        ),
        entry(
            "session context",
            "session 3 of a run",
            "digest of 'session', the run, the number (4 bytes), the contract's SHA-256 as text",
            {"run": "00c0ffee", "number": 3, "contract": CONTRACT},
            {"context": session_context("00c0ffee", 3, CONTRACT).hex()},
        ),
        entry(
            "occasion",
            "second attempt at the update of round 12",
            "digest of 'occasion', stage, round and attempt (4 bytes), customers (float64, "
            "little-endian), SHA-256 of the model (float64, little-endian)",
            {
                "stage": "update",
                "round": 12,
                "attempt": 1,
                "customers": 50.25,
                "model": [0.5, -1.25],
            },
            {"occasion": occasion("update", 12, 1, 50.25, [0.5, -1.25]).hex()},
        ),
        entry(
            "step context",
            "step 258 with members 0, 2 and 199",
            "digest of 'step', roster's hash, step (4 bytes), occasion, positions (2 bytes each)",
            {
                "roster": roster.hex(),
                "step": 258,
                "occasion": key.hex(),
                "active": [0, 2, 199],
            },
            {"context": step_context(roster, 258, key, [0, 2, 199]).hex()},
        ),
        entry(
            "survivors statement",
            "members 0 and 199 are in the sum",
            "digest of 'survivors', the step's context, positions (2 bytes each)",
            {**hexes, "survivors": [0, 199]},
            {"statement": statement(context, [0, 199]).hex()},
        ),
        entry(
            "pair info",
            "pair of 7 and 3 in step 258",
            "'pair', lower and higher position (2 bytes each), step (4 bytes)",
            {"one": 7, "other": 3, "step": 258},
            {"info": pair_info(7, 3, 258).hex()},
        ),
        entry(
            "direction",
            "box from 7 to 3",
            "the label, sender's and receiver's position (2 bytes each)",
            {"label": b"box".hex(), "sender": 7, "receiver": 3},
            {"info": (b"box" + two(7, 3)).hex()},
        ),
        entry(
            "mask key",
            "key of a mask stream",
            "HKDF-Expand(pair key or b, 'mask' and the step's context)",
            {"secret": key.hex(), **hexes},
            {"key": expand(key, b"mask" + context).hex()},
        ),
        entry(
            "row key",
            "key of a row",
            "HKDF-Expand(z, 'row')",
            {"secret": key.hex()},
            {"key": expand(key, b"row").hex()},
        ),
        entry(
            "mark",
            "mark of a pair key",
            "first 8 bytes of SHA-256 of 'hansa pair mark' and the key",
            {"key": key.hex()},
            {"mark": sha256(b"hansa pair mark", key)[:8].hex()},
        ),
        entry(
            "share digest",
            "digest of a share",
            "first 8 bytes of SHA-256 of 'hansa share mark' and the share",
            {"share": key.hex()},
            {"digest": sha256(b"hansa share mark", key)[:8].hex()},
        ),
        entry(
            "commitment",
            "commitment to a secret",
            "digest of 'commitment' and the secret",
            {"secret": key.hex()},
            {"commitment": digest(b"commitment", key).hex()},
        ),
        *(
            entry(
                "bitmap",
                f"set of {len(chosen)} of {members}",
                "one bit each, the lowest position in the lowest bit of the first byte",
                {"positions": chosen, "members": members},
                {"bitmap": bitmap(chosen, members).hex()},
            )
            for chosen, members in (([], 2), ([0, 2, 9], 10), ([*range(8)], 8), ([0, 199], 200))
        ),
        *(
            entry(
                "threshold",
                f"threshold of {members}",
                "floor(2 n / 3) + 1",
                {"members": members},
                {"threshold": (2 * members) // 3 + 1},
            )
            for members in (2, 3, 4, 5, 6, 7, 50, 199, 200)
        ),
        entry(
            "sealing key",
            "key of a merchant's own file",
            "HKDF-Expand(identity's seed, 'hansa sealing ' and the purpose)",
            {"seed": key.hex(), "purpose": b"session".hex()},
            {"key": expand(key, b"hansa sealing session").hex()},
        ),
    ]


def whole_session(bits: int) -> Entry:
    """Return a session of four members and its first step, in which one vector is lost."""
    context = session_context("00c0ffee", 1, CONTRACT)
    session = Session(context)
    what = occasion("update", 1, 0, 50.0, [0.5, -1.25])
    step = step_context(session.hash, 1, what, range(4))
    vectors = [
        ring_sum([(1, stream(member.fixed(f"vector {bits}"), 5 * bits // 8))], bits)
        for member in session.members
    ]
    survivors = [position for position in range(4) if position != LOST]
    said = statement(step, survivors)
    total = ring_sum([(1, vectors[position]) for position in survivors], bits)
    alive = [session.members[position] for position in survivors]
    pairs = [
        {
            "sender": sender.position,
            "receiver": receiver.position,
            "box": session.directed(b"box", sender, receiver).hex(),
            "confirm": session.directed(b"confirm", sender, receiver).hex(),
            "pair of step 1": session.pair_key(sender, receiver, 1).hex(),
        }
        for sender in session.members
        for receiver in session.members
        if sender is not receiver
    ]
    return entry(
        "session",
        f"session and step of four members, one of them lost, modulo 2^{bits}",
        "docs/secure-aggregation.md from its beginning to its end. `secrets` are b and z of a "
        "step, `coefficients` those of degree 1 and 2; vectors are little-endian words. "
        "Signed: 'advert', context, id, transport key, masking key, head, joined. An advert: id, "
        "both keys, head (the link of its ledger's last entry), signature. Roster: digest of "
        "'roster', context, size and threshold (2 bytes each), adverts. Pair: HKDF-Extract(roster, "
        "X25519 of masking keys), expanded by the pair's information. Box and confirmation keys: "
        "HKDF-Extract(roster, X25519 of transport keys), expanded by label and direction. A box "
        "holds a share of b and of z. Escrow: boxes, row, marks, digests of shares of b and of z, "
        "commitments to b and z. The lower position adds a pair's mask, the higher subtracts it. "
        "A confirmation is the first 16 bytes of HKDF-Expand(key, statement).",
        {
            "run": "00c0ffee",
            "number": 1,
            "contract": CONTRACT,
            "occasion": what.hex(),
            "bits": bits,
            "lost": LOST,
            "members": [
                {
                    "id": member.name,
                    "identity": member.fixed("identity").hex(),
                    "transport": member.transport.hex(),
                    "masking": member.masking.hex(),
                    "head": member.head.hex(),
                    "secrets": [member.secrets(number).hex() for number in (1, 2)],
                    "coefficients": [member.coefficients(number).hex() for number in (1, 2)],
                    "vector": vector.hex(),
                }
                for member, vector in zip(session.members, vectors, strict=True)
            ],
        },
        {
            "context": context.hex(),
            "enrolled": [enrolled(member.fixed("identity")).hex() for member in session.members],
            "signed": [member.advert_message(context).hex() for member in session.members],
            "adverts": [advert.hex() for advert in session.adverts],
            "roster": session.hash.hex(),
            "pairs": pairs,
            "escrows of step 1": [session.escrow(m, 1).hex() for m in session.members],
            "step": step.hex(),
            "masked": [
                session.masked(member, step, vector, bits).hex()
                for member, vector in zip(session.members, vectors, strict=True)
            ],
            "escrows of step 2": [session.escrow(m, 2).hex() for m in session.members],
            "survivors": bitmap(survivors, 4).hex(),
            "statement": said.hex(),
            "confirmations": [session.confirmations(m, said, survivors).hex() for m in alive],
            "revealed": [session.revealed(m, survivors).hex() for m in alive],
            "total": total.hex(),
        },
    )


def text() -> str:
    """Return the whole file."""
    document = {
        "format": 1,
        "about": "Known answers for secure sums, written by tests/vectors/make_secure_sum.py. "
        "Bytes are hexadecimal.",
        "vectors": [*standards(), *parts(), whole_session(32), whole_session(64)],
    }
    return json.dumps(document, indent=1) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("secure_sum.json").write_text(text(), encoding="utf-8")
