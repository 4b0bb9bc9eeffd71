"""The merchant's side of enrolment: what is asked of the operator, and what is pinned.

    <folder>/contract.toml   pinned when the merchant enrolled
    <folder>/members.toml    pinned; changed only when the merchant accepts a newer list
    <folder>/enrolment.json  where the operator is, its authority and key; written last

The secret of a token is sent only after the server showed a certificate of the authority whose
hash is in the token.
"""

import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clients.operator_link import Operator, check_pem, fetch_authority
from clients.pinned import NAME, Enrolment, pin, read_enrolment
from clients.preparing import FILE, NODE_KEY, make_node_key, node_public, read_keys
from common.contract import Contract, contract_toml, parse_contract, read_contract
from common.enrolment import (
    Difference,
    Enrolling,
    SignedList,
    Token,
    authority_statement,
    contract_statement,
    difference,
    grouped,
    members_statement,
    parse_list,
    rotate_statement,
    signed,
)
from common.errors import ContractError, EnrolmentError, IdentityError
from common.files import write_atomically, write_new
from common.identity import members_toml, read_members

_NEXT_KEY = "node.key.next"


@dataclass(frozen=True)
class Offer:
    """What a token invites to, checked against it."""

    token: Token
    operator: Operator
    contract: Contract
    listed: SignedList


@dataclass(frozen=True)
class Update:
    """The operator's list of members now, beside the one that was pinned."""

    folder: Path
    enrolment: Enrolment
    listed: SignedList
    difference: Difference


def see_offer(token: Token, folder: Path) -> Offer:
    """Ask what a token invites to; it stays unused.

    Raises:
        IdentityError: The folder is not ready for it, or is enrolled already.
        UnreachableError: There is no answer, or not from the operator that the token names.
        EnrolmentError: The operator refuses, or says something else than the token.
    """
    _check_folder(token, folder)
    operator = Operator(token.url, fetch_authority(token.url, token.ca))
    answer = operator.ask("offer", {"secret": token.secret, "merchant": token.merchant})
    return _offer(token, operator, answer)


def enrol(offer: Offer, folder: Path, now: Callable[[], float] = time.time) -> Enrolment:
    """Use the token, and pin operator, contract and members: all or nothing.

    Where the answer is lost or cannot be written, the same token works again from this folder.

    Raises:
        HansaError: As `see_offer`; or the files cannot be written.
    """
    token, keys = offer.token, read_keys(folder)
    asked = Enrolling(token.merchant, keys.identity.public, keys.node, token.secret_sha256)
    fields = {
        "secret": token.secret,
        "merchant": token.merchant,
        "identity": keys.identity.public.hex(),
        "node": keys.node.decode("ascii"),
        "proof": keys.identity.sign(asked.statement(bytes.fromhex(token.operator))).hex(),
    }
    answered = _offer(token, offer.operator, offer.operator.ask("enrol", fields))
    listed = answered.listed
    if listed.members.get(token.merchant) != keys.identity.public:
        raise EnrolmentError("the operator's list of members does not hold your key")
    enrolment = Enrolment(
        token.url,
        offer.operator.ca_pem,
        token.operator,
        token.contract,
        listed.version,
        token.merchant,
        float(now()),
    )
    _check_list(folder, listed)
    contents = {folder / "members.toml": members_toml(listed.pinned()).encode()}
    if not (folder / "contract.toml").exists():
        contents[folder / "contract.toml"] = contract_toml(answered.contract).encode()
    pin(contents | {folder / NAME: enrolment.content()})
    return enrolment


def fetch_members(folder: Path, now: Callable[[], float] = time.time) -> Update:
    """Ask for the operator's list of members, and compare it with the pinned one.

    An authority that the operator announced is pinned beside the present one: the operator's
    identity signs for it.

    Raises:
        IdentityError: The folder is not enrolled, or a key cannot be used.
        UnreachableError: There is no answer, or not from the pinned operator.
        EnrolmentError: The operator refuses, or shows a list that cannot follow the pinned one.
    """
    enrolment, keys, at = read_enrolment(folder), read_keys(folder), int(now())
    statement = members_statement(enrolment.operator_key, enrolment.merchant, at)
    fields = {
        "merchant": enrolment.merchant,
        "at": at,
        "signature": keys.identity.sign(statement).hex(),
    }
    return _update(folder, enrolment, enrolment.link.ask("members", fields))


def pin_members(update: Update) -> Enrolment:
    """Pin the operator's list.

    Raises:
        IdentityError: It cannot be written; the pinned one stays.
    """
    folder = update.folder
    enrolment = replace(
        update.enrolment,
        members_version=update.listed.version,
        operator=update.listed.witness.hex(),
    )
    pin(
        {
            folder / "members.toml": members_toml(update.listed.pinned()).encode(),
            folder / NAME: enrolment.content(),
        }
    )
    return enrolment


def rotate_node_key(folder: Path, now: Callable[[], float] = time.time) -> bytes:
    """Replace the node's key; return the new public half.

    The new key is on the disk before the operator hears of it: where the answer is lost, the same
    key is asked for again.

    Raises:
        HansaError: As `fetch_members`; the old key stays.
    """
    enrolment, keys, at = read_enrolment(folder), read_keys(folder), int(now())
    following = folder / _NEXT_KEY
    try:
        if not following.exists():
            write_new(following, make_node_key(), 0o600)
    except OSError as error:
        raise IdentityError(f"{following}: cannot be written ({error.strerror})") from None
    node = node_public(following)
    statement = rotate_statement(enrolment.operator_key, enrolment.merchant, node, at)
    fields = {
        "merchant": enrolment.merchant,
        "node": node.decode("ascii"),
        "at": at,
        "signature": keys.identity.sign(statement).hex(),
    }
    _update(folder, enrolment, enrolment.link.ask("rotate", fields))
    try:
        following.replace(folder / NODE_KEY)
    except OSError as error:
        raise IdentityError(f"{folder / NODE_KEY}: cannot be written ({error.strerror})") from None
    return node


def _check_folder(token: Token, folder: Path) -> None:
    """Raise an `IdentityError` where a token cannot be used in a folder."""
    if (folder / NAME).exists():
        raise IdentityError(
            f"{folder / NAME}: is enrolled already; to enrol anew, move it away together with "
            "contract.toml and members.toml"
        )
    if not (folder / FILE).exists():
        raise IdentityError(f"{folder}: has no {FILE} yet; run hansa merchant init {folder}")
    keys = read_keys(folder)
    if keys.identity.merchant != token.merchant:
        raise IdentityError(
            f"{folder / FILE}: merchant.id is '{keys.identity.merchant}', the token is for "
            f"'{token.merchant}'"
        )
    contract = folder / "contract.toml"
    if contract.exists() and read_contract(contract).sha256 != token.contract:
        raise ContractError(
            f"{contract}: is another contract than the token's, {grouped(token.contract)}; move it "
            "away if you mean to follow the token"
        )


def _offer(token: Token, operator: Operator, answer: dict[str, Any]) -> Offer:
    """Check an answer against the token."""
    key = bytes.fromhex(token.operator)
    contract = _contract(token, key, answer)
    listed = parse_list(answer.get("list"), answer.get("signature"), key)
    return Offer(token, operator, contract, listed)


def _contract(token: Token, operator: bytes, answer: dict[str, Any]) -> Contract:
    text = answer.get("contract")
    if not isinstance(text, str):
        raise EnrolmentError("the operator's answer holds no contract")
    try:
        contract = parse_contract(tomllib.loads(text), source="the operator's contract")
    except (tomllib.TOMLDecodeError, RecursionError):
        raise EnrolmentError("the operator's contract is not valid TOML") from None
    if contract.sha256 != token.contract:
        raise EnrolmentError(
            "the operator's contract is another one than your token names.\n  shown: "
            f"{grouped(contract.sha256)}\n  token: {grouped(token.contract)}"
        )
    statement = contract_statement(contract.sha256)
    if not signed(operator, statement, answer.get("contract_signature")):
        raise EnrolmentError("the operator whose key the token names did not sign the contract")
    return contract


def _update(folder: Path, enrolment: Enrolment, answer: dict[str, Any]) -> Update:
    """Check an answer against what was pinned; pin an authority that was announced."""
    key = enrolment.operator_key
    listed = parse_list(answer.get("list"), answer.get("signature"), key)
    found = difference(read_members(folder / "members.toml"), enrolment.members_version, listed)
    pem, later = answer.get("ca_pem"), answer.get("next_ca_pem")
    if not isinstance(pem, str) or not isinstance(later, str):
        raise EnrolmentError("the operator's answer names no certificate authority")
    if not signed(listed.witness, authority_statement(pem, later), answer.get("ca_signature")):
        raise EnrolmentError("the operator whose key was pinned did not sign its authority")
    check_pem(pem + later)
    if pem + later != enrolment.ca_pem:
        enrolment = replace(enrolment, ca_pem=pem + later)
        try:
            write_atomically(folder / NAME, enrolment.content())
        except OSError as error:
            raise IdentityError(f"{folder / NAME}: cannot be written ({error.strerror})") from None
    return Update(folder, enrolment, listed, found)


def _check_list(folder: Path, listed: SignedList) -> None:
    """Raise an `EnrolmentError` where a list that is there says something else than the new one."""
    path = folder / "members.toml"
    if path.exists():
        found = difference(read_members(path), 0, listed)
        if found.changed:
            raise EnrolmentError(
                f"{path}: has another key of {', '.join(sorted(found.changed))} than the "
                "operator's list; find out which is right, or move the file away"
            )
