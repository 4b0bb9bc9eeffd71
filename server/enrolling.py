"""Answers what merchants ask the operator: enrol, see the list of members, replace a node's key.

No HTTP here: a request's JSON in, an answer's JSON out. Whoever is refused learns why, if it is
about its own token or request, and nothing else.
"""

import json
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.contract import Contract, contract_toml, read_contract
from common.enrolment import (
    CLOCK_WINDOW_S,
    Enrolling,
    authority_statement,
    contract_statement,
    members_statement,
    rotate_statement,
    secret_sha256,
    signed,
)
from common.errors import (
    EnrolmentError,
    IdentityError,
    SettingsError,
    SuperLinkError,
    WireError,
)
from common.identity import MERCHANT_ID, Identity
from common.rotation import Rotation
from server.archive import open_archive
from server.certificates import announced, pem_sha256
from server.flower_control import GONE, list_nodes, register_node, unregister_node
from server.registry import Register, Registry
from server.registry_rows import State
from server.rotation import take_over
from server.settings import Settings
from server.witness import Witness

_HEX = re.compile(r"[0-9a-f]{64}")
_MAX_PEM = 1024

log = logging.getLogger("hansa.enrolling")


@dataclass(frozen=True)
class Desk:
    """Where merchants ask.

    Args:
        settings: Of the federation.
        registry: Of the federation.
        identity: The operator's.
        witness: Of the federation's ledgers.
        contract: As TOML.
        contract_signature: The operator's, in hexadecimal.
        register: Lets a node in.
        unregister: Lets a node in no longer.
        now: Seconds since 1970.
    """

    settings: Settings
    registry: Registry
    identity: Identity
    witness: Witness
    contract: str
    contract_signature: str
    register: Register
    unregister: Callable[[int], None]
    now: Callable[[], float] = time.time

    def answer(self, question: str, body: bytes) -> dict[str, Any]:
        """Answer a question: `offer`, `enrol`, `members`, `rotate` or `identity`.

        Raises:
            WireError: The request is not what the protocol says.
            EnrolmentError: It is refused.
            SuperLinkError: The SuperLink does not answer; nothing was changed.
            ArchiveError: It cannot be written down; nothing was changed.
        """
        questions: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], dict[str, type]]] = {
            "offer": (self._offer, {"secret": str, "merchant": str}),
            "enrol": (self._enrol, _ENROL),
            "members": (self._members, {"merchant": str, "at": int, "signature": str}),
            "rotate": (self._rotate, _ROTATE),
            "identity": (self._identity, {"rotation": dict}),
        }
        if question not in questions:
            raise WireError(f"'{question[:32]}' is no question")
        function, fields = questions[question]
        return function(_fields(body, fields))

    def _offer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Show what a token invites to; the token stays unused."""
        self.registry.check_token(_secret(asked), asked["merchant"], self.now())
        return self._signed(self.registry.state())

    def _enrol(self, asked: dict[str, Any]) -> dict[str, Any]:
        identity = _hex(asked["identity"], "identity")
        node = _node_key(asked["node"])
        enrolling = Enrolling(asked["merchant"], identity, node, _secret(asked))
        if not signed(identity, enrolling.statement(self.identity.public), asked["proof"]):
            raise EnrolmentError("the proof does not fit the identity key and this operator")
        state = self.registry.enrol(enrolling, self.register, self.now())
        log.info("enrolled", extra={"merchant": enrolling.merchant, "version": state.version})
        return self._signed(state)

    def _members(self, asked: dict[str, Any]) -> dict[str, Any]:
        merchant, at = asked["merchant"], asked["at"]
        state = self.registry.state()
        self._authenticate(state, asked, lambda key: members_statement(key, merchant, at))
        _, later = announced(self.settings.tls)
        if later:
            self.registry.tell(merchant, pem_sha256(later), self.now())
        return self._listed(state)

    def _rotate(self, asked: dict[str, Any]) -> dict[str, Any]:
        merchant, at, node = asked["merchant"], asked["at"], _node_key(asked["node"])
        state = self.registry.state()
        self._authenticate(state, asked, lambda key: rotate_statement(key, merchant, node, at))
        before = self.registry.rotate(merchant, node, at, self.register)
        if before:
            self._let_go(before)
        log.info("node key replaced", extra={"merchant": merchant})
        return self._listed(self.registry.state())

    def _identity(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Take a member's new identity key; the statement is signed by the old one and by it."""
        try:
            rotation = Rotation.from_document(asked["rotation"])
            members = self.registry.state().signed_list().pinned()
            take_over(rotation, members, self.witness, self.registry.rekey)
        except IdentityError as error:
            raise EnrolmentError(str(error)) from None
        log.info("identity key replaced", extra={"merchant": rotation.merchant})
        return self._listed(self.registry.state())

    def _let_go(self, node: int) -> None:
        """Unregister a node; one that the SuperLink keeps for now goes when it starts anew."""
        try:
            self.unregister(node)
        except SuperLinkError as error:
            log.warning("a node could not be taken off yet", extra={"reason": str(error)})

    def _authenticate(
        self, state: State, asked: dict[str, Any], statement: Callable[[bytes], bytes]
    ) -> None:
        """Raise an `EnrolmentError` unless a member signed the request, not long ago.

        Args:
            state: Of the registry.
            asked: The request.
            statement: What is signed, given the operator's key that the member pinned: the one
                of today or an earlier one.
        """
        member, keys = state.members.get(asked["merchant"]), state.signed_list().pinned().witnesses
        if member is None or not any(
            signed(member.identity, statement(key), asked["signature"]) for key in keys
        ):
            raise EnrolmentError("this request is not signed by the identity of a member")
        apart = self.now() - asked["at"]
        if abs(apart) > CLOCK_WINDOW_S:
            raise EnrolmentError(
                f"this request's time is {abs(apart):.0f} s {'behind' if apart > 0 else 'ahead of'}"
                " the operator's clock: set your clock"
            )

    def _signed(self, state: State) -> dict[str, Any]:
        contract = {"contract": self.contract, "contract_signature": self.contract_signature}
        return contract | self._listed(state)

    def _listed(self, state: State) -> dict[str, Any]:
        listed = state.signed_list()
        pem, later = announced(self.settings.tls)
        return {
            "list": listed.document(),
            "signature": self.identity.sign(listed.canonical()).hex(),
            "ca_pem": pem,
            "next_ca_pem": later,
            "ca_signature": self.identity.sign(authority_statement(pem, later)).hex(),
        }


_ENROL: dict[str, type] = {
    "secret": str, "merchant": str, "identity": str, "node": str, "proof": str,
}  # fmt: skip
_KINDS = {str: "text", int: "a number", dict: "an object"}
_ROTATE: dict[str, type] = {"merchant": str, "node": str, "at": int, "signature": str}


def open_desk(settings: Settings) -> Desk:
    """Open what a federation's folder holds.

    Raises:
        HansaError: A file is missing or cannot be used, or the contract was changed after the
            operator signed it.
    """
    folder = settings.folder
    archive = open_archive(settings.archive)
    identity = archive.identity
    contract, signature = signed_contract(settings, identity.public)
    registry = Registry(folder)
    if registry.state().operator != identity.public:
        raise SettingsError(f"{folder}: the registry belongs to another identity key")
    return Desk(
        settings,
        registry,
        identity,
        archive.witness,
        contract_toml(contract),
        signature,
        lambda key, name: register_node(settings, key, name),
        lambda node: unregister_node(settings, node),
    )


def reconcile(settings: Settings, registry: Registry) -> list[str]:
    """Make the SuperLink's nodes those of the registry; return the merchants whose node changed.

    A node that was taken off while the SuperLink was down goes now; one that the SuperLink does
    not know, because its database was lost, comes back.

    Raises:
        SuperLinkError: The SuperLink does not answer.
    """
    registry.write_members()  # a full disk may have kept it from being written
    there = {node.node: node for node in list_nodes(settings) if node.status != GONE}
    for node in sorted(registry.former_nodes() & set(there)):
        unregister_node(settings, node)
    changed = []
    for merchant, member in registry.state().members.items():
        if member.node not in there:
            node = register_node(settings, member.node_key, merchant)
            registry.replace_node(merchant, node)
            changed.append(merchant)
    return changed


def signed_contract(settings: Settings, operator: bytes) -> tuple[Contract, str]:
    """Return the contract and the operator's signature of it, in hexadecimal.

    Raises:
        ContractError: The contract cannot be used.
        SettingsError: The signature is missing, or does not fit.
    """
    contract = read_contract(settings.folder / "contract.toml")
    path = settings.folder / "contract.sig"
    try:
        signature = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        raise SettingsError(f"{path}: cannot be read; hansa server init makes it") from None
    if not signed(operator, contract_statement(contract.sha256), signature):
        raise SettingsError(
            f"{path}: does not sign contract.toml: the contract was changed, or it is another "
            "operator's"
        )
    return contract, signature


def _fields(body: bytes, expected: dict[str, type]) -> dict[str, Any]:
    """Return the fields of a request: exactly the expected ones."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise WireError("expected a JSON object") from None
    if not isinstance(found, dict) or set(found) != set(expected):
        raise WireError(f"expected a JSON object with {', '.join(sorted(expected))}")
    for name, kind in expected.items():
        if type(found[name]) is not kind:
            raise WireError(f"field '{name}': expected {_KINDS[kind]}")
    if "merchant" in found and not re.fullmatch(MERCHANT_ID, found["merchant"]):
        raise WireError("field 'merchant': is no merchant id")
    if "at" in found and not 0 <= found["at"] < 2**53:
        raise WireError("field 'at': expected seconds since 1970")
    return found


def _secret(asked: dict[str, Any]) -> str:
    _hex(asked["secret"], "secret")
    return secret_sha256(asked["secret"])


def _hex(text: str, name: str) -> bytes:
    if not _HEX.fullmatch(text):
        raise WireError(f"field '{name}': expected 64 hexadecimal digits")
    return bytes.fromhex(text)


def _node_key(text: str) -> bytes:
    """Return a node's public key as Flower writes it."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_pem_public_key(text[:_MAX_PEM].encode("ascii"))
    except (ValueError, UnsupportedAlgorithm):
        raise WireError("field 'node': expected a public key as PEM") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise WireError("field 'node': expected a key on the curve P-384")
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
