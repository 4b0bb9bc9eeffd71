"""Tests of the audit: honest evidence passes, and every lie is called by its name."""

import contextlib
import copy
import json
import re
import secrets
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from audit import codes
from audit.advice import ADVICE
from audit.codes import CODES, Flaw
from audit.epsilon import recompute
from audit.findings import Audit
from audit.ledger import check_chain, read_document
from audit.runs import release_of
from audit.spending import epsilon_of, quick_epsilon
from audit.verify import verify
from audit.witness import Anchor, read_anchors
from common.chain import Entry, body_bytes, link_after, signed_head
from common.errors import EvidenceError
from common.events import GaussianSum, to_document
from common.evidence import read_evidence, write_evidence
from common.identity import Identity
from common.network import parameters_sha256
from common.start import to_bytes
from tests.audit.evidence_world import (
    DAY_S,
    Document,
    Shop,
    World,
    bundled,
    charged,
    decoded,
    encoded,
    small_contract,
)

ROOT = Path(__file__).parent.parent.parent
MODES: dict[str, Document] = {
    "secure": {},
    "plain": {"aggregation": {"secure": False}},
    "local": {"training": {"mode": "local", "optimizer": "sgd", "momentum": 0.5}},
}
Tamper = Callable[[World], None]
WARM = np.array([0.5, -0.25, 0.1, -0.5, 0.25, -0.1])  # a start that a contract names


@pytest.fixture(scope="session")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    """Give two finished runs in each mode, and one that is not settled."""
    found = {}
    for name, sections in MODES.items():
        found[name] = World.founded(small_contract(**sections))
        for run in ("run-1", "run-2"):
            found[name].run(run, tmp_path_factory.mktemp(name))
    training = {"mode": "local", "sampling_rate": 0.1, "rounds": 2, "optimizer": "yogi"}
    found["sampled"] = World.founded(small_contract(training=training))
    found["sampled"].run("run-1", tmp_path_factory.mktemp("sampled"), settle=False)
    found["warm"] = World.founded(small_contract(model={"start": parameters_sha256(WARM)}))
    found["warm"].start = to_bytes(WARM)
    found["warm"].run("run-1", tmp_path_factory.mktemp("warm"))
    found["open"] = World.founded(small_contract())
    found["open"].run("run-1", tmp_path_factory.mktemp("open"), settle=False)
    return found


@pytest.fixture
def world(worlds: dict[str, World]) -> World:
    """Give a copy of two finished runs with secure sums."""
    return worlds["secure"].clone()


@pytest.fixture
def opened(worlds: dict[str, World]) -> World:
    """Give a copy of one run that was not settled."""
    return worlds["open"].clone()


def serious(audit: Audit) -> set[str]:
    """Return the codes of findings that are no mere notes."""
    return {finding.code for finding in audit.findings if finding.severity != "note"}


def of_shop(world: World, folder: Path, shop: Shop | None = None) -> set[str]:
    """Return what is found in one merchant's evidence by itself."""
    chosen = world.shops[0] if shop is None else shop
    world.write_shop(chosen, folder / "shop.zip")
    return serious(verify([folder / "shop.zip"]))


def of_all(world: World, folder: Path) -> set[str]:
    """Return what is found in everybody's evidence."""
    return serious(verify([world.write(folder / "evidence")]))


class TestHonest:
    """Nothing is found where nothing is wrong."""

    @pytest.mark.parametrize("mode", [*MODES, "open", "sampled"])
    @pytest.mark.parametrize("suffix", [".zip", ""])
    def test_passes(self, worlds: dict[str, World], mode: str, suffix: str, tmp_path: Path) -> None:
        """No finding at all, and everything was checked."""
        world = worlds[mode]
        audit = verify([world.write(tmp_path, suffix=suffix)])
        assert audit.findings == ()
        assert audit.passed
        entries = sum(len(shop.entries) for shop in world.shops)
        assert audit.checks["ledger entries"] == entries
        assert audit.checks["sums replayed"] == sum(
            line["kind"] == "sum" for record in world.records.values() for line in record
        )
        names = tuple(shop.name for shop in world.shops)
        for run in audit.runs:
            assert run.matched == run.merchants == names
            assert run.replayed
            assert run.finished
            assert run.fewest == 3
            assert run.privacy["epsilon"] == pytest.approx(run.recomputed, rel=0.01)

    def test_spending(self, worlds: dict[str, World], tmp_path: Path) -> None:
        """What is told as spent is what the settled runs released."""
        world = worlds["secure"]
        spending = verify([world.write(tmp_path)]).spending
        assert [one.merchant for one in spending] == [shop.name for shop in world.shops]
        for one, shop in zip(spending, world.shops, strict=True):
            found = charged(shop)
            documents = [to_document(event) for _, event in found]
            assert one.lifetime == pytest.approx(recompute(documents, one.delta), rel=1e-9)
            assert one.lifetime == pytest.approx(one.opinions["Opacus PRV"], abs=0.03)
            by_run = [to_document(event) for run, event in found if run == "run-2"]
            assert one.by_run["run-2"] == pytest.approx(recompute(by_run, one.delta), rel=1e-9)
            assert set(one.by_purpose) == {"census", "update", "evaluation", "profile"}
            assert max(one.by_purpose.values()) < one.lifetime
            assert [point[1] for point in one.timeline] == ["run-1", "run-2"]
            assert one.cap == 5.0

    def test_open_runs_cost_what_was_reserved(
        self, worlds: dict[str, World], tmp_path: Path
    ) -> None:
        """A run that was not settled counts whole."""
        opened = verify([worlds["open"].write(tmp_path / "open")]).spending[0]
        settled = verify([worlds["secure"].write(tmp_path / "settled")]).spending[0]
        assert opened.by_run["run-1"] > settled.by_run["run-1"]

    def test_refusals_are_told(self, opened: World, tmp_path: Path) -> None:
        """What a merchant refused is part of its spending's story."""
        occasion = {"run": "run-9", "stage": "reserve", "round": 0, "attempt": 0}
        reason = "would bring this merchant to epsilon 7"
        opened.enter(opened.shops[0], kind="refuse", contract="", **occasion, reason=reason)
        audit = verify([opened.write(tmp_path)])
        assert not serious(audit)
        assert [refusal[1:] for refusal in audit.spending[0].refusals] == [("run-9", reason)]

    def test_one_merchant_alone(self, world: World, tmp_path: Path) -> None:
        """A single evidence passes; that nothing else was there is noted."""
        world.write_shop(world.shops[0], tmp_path / "shop.zip")
        audit = verify([tmp_path / "shop.zip"])
        assert [finding.code for finding in audit.findings] == ["no-evidence-of-server"]
        assert audit.passed

    def test_coordinator_alone(self, world: World, tmp_path: Path) -> None:
        """The coordinator's own evidence passes; whose is missing is noted."""
        world.write_server(tmp_path / "server")
        audit = verify([tmp_path])
        assert {finding.code for finding in audit.findings} == {"no-evidence-of-merchant"}
        assert all("shop-3" in finding.message for finding in audit.findings)
        assert [run.matched for run in audit.runs] == [(), ()]
        assert [run.replayed for run in audit.runs] == [True, True]

    def test_every_party_is_described(self, world: World, tmp_path: Path) -> None:
        """A report can tell what was audited."""
        audit = verify([world.write(tmp_path)])
        kinds = sorted((one["kind"], one["name"]) for one in audit.evidence)
        assert kinds == sorted(
            [("server", "coordinator"), *(("merchant", shop.name) for shop in world.shops)]
        )
        assert all(one["code"] and one["files"]["members.toml"] for one in audit.evidence)


class TestFiles:
    """Finding evidence, and evidence as such."""

    def test_extra_file(self, world: World, tmp_path: Path) -> None:
        """Evidence that was added to is not used; the rest is."""
        world.write(tmp_path, suffix="")
        (tmp_path / "shop-0" / "notes.txt").write_text("trust me")
        audit = verify([tmp_path])
        assert serious(audit) == {"evidence-invalid"}
        assert [one.merchant for one in audit.spending] == ["shop-1", "shop-2", "shop-3"]

    def test_same_place_twice(self, world: World, tmp_path: Path) -> None:
        """A place that is named twice is read once; hidden folders and other zips are left."""
        world.write(tmp_path / "a" / "b")
        world.write(tmp_path / ".c")
        with zipfile.ZipFile(tmp_path / "a" / "pictures.zip", "w") as archive:
            archive.writestr("picture", b"")
        audit = verify([tmp_path, tmp_path / "a" / "b" / "shop-1.zip"])
        assert len(audit.evidence) == 5
        assert [finding.code for finding in audit.findings] == ["not-evidence"]

    @pytest.mark.parametrize("name", ["missing", "empty"])
    def test_nothing_to_audit(self, tmp_path: Path, name: str) -> None:
        """An audit of nothing does not pass: it is an error."""
        (tmp_path / "empty").mkdir()
        with pytest.raises(EvidenceError, match=name):
            verify([tmp_path / name])

    @pytest.mark.parametrize("name", ["ledger.jsonl", "witness.jsonl", "members.toml"])
    def test_missing_file(self, world: World, tmp_path: Path, name: str) -> None:
        """What the format asks for must be there."""
        shop = world.shops[0]
        files = {n: c for n, c in world.shop_files(shop).items() if n != name}
        write_evidence(tmp_path / "a", "merchant", shop.name, files, shop.identity.key, 1.0, "", "")
        assert serious(verify([tmp_path])) == {"evidence-incomplete"}

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("members.toml", b"members = 3"),
            ("members.toml", b"\xff"),
            ("policy.json", b"{}"),
            ("policy.json", b"[]"),
            ("policy.json", b'{"epsilon": true}'),
        ],
    )
    def test_malformed_file(self, world: World, tmp_path: Path, name: str, content: bytes) -> None:
        """A file that cannot be read is named."""
        world.write_shop(world.shops[0], tmp_path / "shop.zip", **{name: content})
        audit = verify([tmp_path])
        assert serious(audit) == {"evidence-incomplete"}
        assert name in audit.findings[0].message

    def test_contract_that_is_none(self, world: World, tmp_path: Path) -> None:
        """A contract's file that cannot be read is a finding; the rest is audited."""
        (sha256,) = world.contracts
        files = {f"contracts/{sha256}.toml": b"nonsense = "}
        world.write_shop(world.shops[0], tmp_path / "shop.zip", **files)
        assert serious(verify([tmp_path])) == {"contract-differs", "contract-missing"}

    def test_broken_zip_in_a_folder(self, world: World, tmp_path: Path) -> None:
        """A zip file that cannot be opened may be evidence that somebody broke."""
        world.write_shop(world.shops[0], tmp_path / "shop.zip")
        (tmp_path / "broken.zip").write_bytes(b"PK")
        assert serious(verify([tmp_path])) == {"evidence-invalid"}

    def test_bundle_whose_files_are_no_json(self, world: World, tmp_path: Path) -> None:
        """A document that cannot be read has none of the expected figures."""
        files = {**world.bundles["run-1"], "privacy.json": b"[" * 100_000, "metrics.json": b"1"}
        world.bundles["run-1"] = bundled(files, world.server, tmp_path / "bundle")
        world.write_server(tmp_path / "server.zip")
        audit = verify([tmp_path / "server.zip"])
        assert serious(audit) == {"privacy-differs", "published-differs"}

    def test_foreign_key(self, world: World, tmp_path: Path) -> None:
        """Who is not enrolled with the key that signed is somebody else."""
        shop = world.shops[0]
        shop.identity = Identity.generate(shop.name)
        world.write_shop(shop, tmp_path / "shop.zip")
        assert serious(verify([tmp_path])) >= {"not-enrolled", "entry-signature"}

    def test_ledger_of_another(self, world: World, tmp_path: Path) -> None:
        """A merchant cannot show another key's ledger as its own."""
        shop = world.shops[0]
        documents = shop.documents
        documents[0]["key"] = world.shops[1].identity.public.hex()
        shop.rewrite(documents)
        world.witness_anew(shop)
        assert of_shop(world, tmp_path) == {"ledger-foreign"}

    def test_coordinator_with_another_key(self, world: World, tmp_path: Path) -> None:
        """The coordinator's evidence is signed with the key that merchants pinned as witness."""
        members = dict(world.members)
        world.members = {**members, "witness": {"key": Identity.generate("x").public.hex()}}
        world.log = []
        world.write_server(tmp_path / "server.zip")
        assert serious(verify([tmp_path])) == {"not-enrolled", "bundle-differs"}

    def test_other_members(self, world: World, tmp_path: Path) -> None:
        """A list of members that differs from the others' is found."""
        honest = world.members
        others = {**honest["members"], "ghost": Identity.generate("ghost").public.hex()}
        world.members = {**honest, "members": others}
        world.write_shop(world.shops[0], tmp_path / "shop-0.zip")
        world.members = honest
        for shop in world.shops[1:]:
            world.write_shop(shop, tmp_path / f"{shop.name}.zip")
        assert serious(verify([tmp_path])) == {"members-differ"}

    def test_exchanged_contract(self, world: World, tmp_path: Path) -> None:
        """A contract that lies under another's hash is found, at a merchant."""
        (sha256,) = world.contracts
        world.contracts = {sha256: small_contract(privacy={"epsilon": 2.0})}
        assert of_shop(world, tmp_path) == {"contract-differs", "contract-missing"}

    def test_exchanged_contract_of_a_run(self, world: World, tmp_path: Path) -> None:
        """A contract that is not the one of the record is found, at the coordinator."""
        (sha256,) = world.contracts
        world.contracts = {sha256: small_contract(privacy={"epsilon": 2.0})}
        world.write_server(tmp_path / "server.zip")
        assert serious(verify([tmp_path])) == {"contract-differs"}


def bits(entry: Entry) -> int:
    """Return the number of bits of an entry that a chain covers."""
    return 8 * (len(entry.body) + len(entry.link) + len(entry.signature))


def flipped(entries: Sequence[Entry], at: int, bit: int) -> list[Entry]:
    """Return entries with one bit changed: of a body, a link or a signature."""
    found = list(entries)
    entry = found[at]
    for name in ("body", "link", "signature"):
        value = bytearray(getattr(entry, name))
        if bit < 8 * len(value):
            value[bit // 8] ^= 1 << bit % 8
            found[at] = replace(entry, **{name: bytes(value)})
            return found
        bit -= 8 * len(value)
    raise AssertionError


@pytest.fixture(scope="session")
def fifty(worlds: dict[str, World]) -> tuple[list[Entry], bytes]:
    """Give the first fifty entries of a ledger, fewer if it has fewer, and its key."""
    shop = worlds["secure"].shops[0]
    extended = replace(shop, entries=list(shop.entries))
    while len(extended.entries) < 50:
        extended.append(kind="settle", run="none", at=0.0)
    return extended.entries[:50], shop.identity.public


class TestChain:
    """The chain of a ledger."""

    def test_holds(self, fifty: tuple[list[Entry], bytes]) -> None:
        """An honest ledger, and every beginning of it, holds."""
        entries, public = fifty
        assert len(entries) == 50
        for length in range(0, 51, 10):
            assert check_chain(entries[:length], public) is None

    def test_any_bit(self, fifty: tuple[list[Entry], bytes]) -> None:
        """A flipped bit is found, in the entry that it is in: 300 of them, drawn anew."""
        entries, public = fifty
        for _ in range(300):
            at = secrets.randbelow(50)
            bit = secrets.randbelow(bits(entries[at]))
            found = check_chain(flipped(entries, at, bit), public)
            assert found is not None
            assert found.seq == at + 1
            assert found.code in {"chain-broken", "entry-signature"}

    @pytest.mark.slow
    def test_every_bit(self, fifty: tuple[list[Entry], bytes]) -> None:
        """No single bit of fifty entries can be flipped unnoticed."""
        entries, public = fifty
        for at, entry in enumerate(entries):
            for bit in range(bits(entry)):
                found = check_chain(flipped(entries, at, bit), public)
                assert found is not None
                assert found.seq == at + 1

    @given(st.integers(0, 49), st.integers(0, 49))
    def test_order(self, fifty: tuple[list[Entry], bytes], one: int, other: int) -> None:
        """Entries that changed places are found."""
        entries, public = fifty
        found = list(entries)
        found[one], found[other] = found[other], found[one]
        problem = check_chain(found, public)
        assert (problem is None) == (one == other)
        assert problem is None or problem.code == "chain-gap"

    @given(st.integers(0, 48))
    def test_deleted(self, fifty: tuple[list[Entry], bytes], at: int) -> None:
        """An entry that is missing before the end is found."""
        entries, public = fifty
        problem = check_chain([*entries[:at], *entries[at + 1 :]], public)
        assert problem is not None
        assert (problem.code, problem.seq) == ("chain-gap", at + 1)

    @given(st.integers(0, 48))
    def test_deleted_and_numbered_anew(self, fifty: tuple[list[Entry], bytes], at: int) -> None:
        """Numbering the rest anew does not hide it: links differ."""
        entries, public = fifty
        rest = [replace(entry, seq=entry.seq - 1) for entry in entries[at + 1 :]]
        problem = check_chain([*entries[:at], *rest], public)
        assert problem is not None
        assert (problem.code, problem.seq) == ("chain-broken", at + 1)

    @given(st.integers(0, 49))
    def test_repeated(self, fifty: tuple[list[Entry], bytes], at: int) -> None:
        """An entry that is there twice is found."""
        entries, public = fifty
        problem = check_chain([*entries[: at + 1], *entries[at:]], public)
        assert problem is not None
        assert (problem.code, problem.seq) == ("chain-gap", at + 2)

    def test_signed_by_another(self, fifty: tuple[list[Entry], bytes]) -> None:
        """Every single signature counts: one by another key is found, at either end."""
        entries, public = fifty
        other = Identity.generate("other")
        for at in (0, 24, 49):
            found, entry = list(entries), entries[at]
            signature = other.sign(signed_head(public, entry.seq, entry.link))
            found[at] = replace(entry, signature=signature)
            problem = check_chain(found, public)
            assert problem is not None
            assert (problem.code, problem.seq) == ("entry-signature", at + 1)

    def test_inserted(self, fifty: tuple[list[Entry], bytes]) -> None:
        """An entry that is put in between, links and all, lacks the merchant's signatures."""
        entries, public = fifty
        found, link = list(entries[:20]), entries[19].link
        bodies = [b'{"kind":"settle"}', *(entry.body for entry in entries[20:])]
        for seq, body in enumerate(bodies, start=21):
            link = link_after(link, body)
            signature = entries[min(seq, 50) - 1].signature
            found.append(Entry(seq, body, link, signature))
        problem = check_chain(found, public)
        assert problem is not None
        assert (problem.code, problem.seq) == ("entry-signature", 21)

    def test_large_ledgers_are_checked_in_parts(self) -> None:
        """A wrong signature is found in whichever part it is, and the first one is told."""
        shop = Shop(Identity.generate("shop"), {})
        for number in range(400):
            shop.append(number=number)
        public = shop.identity.public
        assert check_chain(shop.entries, public) is None
        for at in (0, 130, 399):
            found = list(shop.entries)
            for wrong in {at, 399}:
                found[wrong] = replace(found[wrong], signature=found[wrong - 1].signature)
            problem = check_chain(found, public)
            assert problem is not None
            assert problem.seq == at + 1


class TestEntries:
    """What an entry must look like, though it is signed."""

    @pytest.mark.parametrize(
        "body",
        [
            b"[]",
            b"nonsense",
            b'{"at":1.0,"kind":"settle","run":"run-1","run":"run-2","salt":""}',
            b'{"kind":"settle","run":"run-1","at":1.0,"salt":""}',
            b'{"at":1.0,"kind":"settle","run":"run-1","salt":"" }',
            b'{"at":NaN,"kind":"settle","run":"run-1","salt":""}',
            b'{"at":1.0,"kind":"bonus","run":"run-1","salt":""}',
            b'{"at":1.0,"kind":["settle"],"run":"run-1","salt":""}',
            b'{"at":1.0,"kind":"settle","salt":""}',
            b'{"at":1.0,"kind":"settle","more":1,"run":"run-1","salt":""}',
            b'{"at":true,"kind":"settle","run":"run-1","salt":""}',
            b'{"at":-1.0,"kind":"settle","run":"run-1","salt":""}',
            b'{"at":1.0,"kind":"settle","run":1,"salt":""}',
        ],
    )
    def test_schema(self, world: World, tmp_path: Path, body: bytes) -> None:
        """What could be read in two ways, or is not known, fails: a newer version may know it."""
        shop = world.shops[0]
        seq, link = len(shop.entries) + 1, link_after(shop.link, body)
        signature = shop.identity.sign(signed_head(shop.identity.public, seq, link))
        shop.entries.append(Entry(seq, body, link, signature))
        assert of_shop(world, tmp_path) == {"entry-schema"}

    @pytest.mark.parametrize("kind", ["open", "reserve", "join", "release", "sum", "settle"])
    def test_every_field_is_looked_at(self, worlds: dict[str, World], kind: str) -> None:
        """A field that is missing or of another kind fails, in every kind of entry."""
        shop = worlds["secure"].shops[0]
        honest = shop.documents[shop.index(kind)]
        assert read_document(Entry(1, body_bytes(honest), b"", b"")) == honest
        for name in set(honest) - {"kind"}:
            missing = {field: value for field, value in honest.items() if field != name}
            wrong = [{**honest, name: value} for value in (None, [[]], -1, True)]
            for document in [*wrong, missing] if name != "notes" else wrong:
                with pytest.raises(Flaw, match=f"'{name}' is missing, wrong"):
                    read_document(Entry(1, body_bytes(document), b"", b""))

    @pytest.mark.parametrize(
        "line",
        [
            b"nonsense",
            b"[]",
            b'{"seq": 1}',
            b'{"seq": true, "body": "", "link": "%s", "signature": ""}' % (b"0" * 64),
            b'{"seq": 1, "body": "\\ud800", "link": "%s", "signature": ""}' % (b"0" * 64),
            b'{"seq": 1, "body": "", "link": "%s", "signature": "xy"}' % (b"0" * 64),
            b"",
        ],
    )
    def test_lines(self, world: World, tmp_path: Path, line: bytes) -> None:
        """A file that is no ledger is refused as a whole."""
        shop = world.shops[0]
        world.write_shop(shop, tmp_path / "shop.zip", **{"ledger.jsonl": line + b"\n"})
        assert serious(verify([tmp_path])) == {"ledger-unreadable"}

    def test_no_entry(self, world: World, tmp_path: Path) -> None:
        """An empty ledger was never opened."""
        world.write_shop(world.shops[0], tmp_path / "shop.zip", **{"ledger.jsonl": b""})
        assert "open-rule" in serious(verify([tmp_path]))


def rewritten(change: Callable[[World, Shop, list[Document]], list[Document]]) -> Tamper:
    """Return what a merchant does that writes its ledger anew, with a witness that colludes."""

    def tamper(world: World) -> None:
        shop = world.shops[0]
        shop.rewrite(change(world, shop, shop.documents))
        world.witness_anew(shop)

    return tamper


def without(kind: str) -> Tamper:
    """Return the tampering that leaves out the first entry of a kind."""
    return rewritten(
        lambda _, shop, found: [d for i, d in enumerate(found) if i != shop.index(kind)]
    )


def again(kind: str, **changes: Any) -> Tamper:
    """Return the tampering that writes the first entry of a kind a second time, behind it."""

    def change(_world: World, shop: Shop, found: list[Document]) -> list[Document]:
        at = shop.index(kind)
        return [*found[: at + 1], {**found[at], **changes}, *found[at + 1 :]]

    return rewritten(change)


def edited(kind: str, **changes: Any) -> Tamper:
    """Return the tampering that changes fields of the first entry of a kind."""

    def change(_world: World, shop: Shop, found: list[Document]) -> list[Document]:
        at = shop.index(kind)
        return [*found[:at], {**found[at], **changes}, *found[at + 1 :]]

    return rewritten(change)


def policy(**changes: Any) -> Tamper:
    """Return the tampering that changes the policy of the first reservation."""

    def change(_world: World, shop: Shop, found: list[Document]) -> list[Document]:
        at = shop.index("reserve")
        told = {**found[at], "policy": {**found[at]["policy"], **changes}}
        return [*found[:at], told, *found[at + 1 :]]

    return rewritten(change)


def cheaper(kind: str) -> Tamper:
    """Return the tampering that makes the first entry of a kind cost less than it does."""

    def change(_world: World, shop: Shop, found: list[Document]) -> list[Document]:
        at, document = shop.index(kind), json.loads(json.dumps(found[shop.index(kind)]))
        parts = document["releases"] if kind == "reserve" else [document]
        for part in parts:
            for name in ("event", "towards_server"):
                part[name]["noise_multiplier"] *= 10
        return [*found[:at], document, *found[at + 1 :]]

    return rewritten(change)


def behind(kind: str, other: str) -> Tamper:
    """Return the tampering that moves the first entry of a kind behind all of another."""

    def change(_world: World, shop: Shop, found: list[Document]) -> list[Document]:
        moved = found[shop.index(kind)]
        rest = [document for document in found if document is not moved]
        last = max(i for i, document in enumerate(rest) if document["kind"] == other)
        return [*rest[: last + 1], moved, *rest[last + 1 :]]

    return rewritten(change)


OPEN_RULES: dict[str, tuple[Tamper, set[str]]] = {
    "opened twice": (again("open"), {"open-rule"}),
    "reserved twice": (again("reserve"), {"reserve-twice"}),
    "released twice": (again("release", step=""), {"release-twice"}),
    "step taken twice": (again("release", attempt=1), {"step-twice"}),
    "joined twice": (again("join"), {"step-twice"}),
    "not reserved": (without("reserve"), {"release-without-reserve", "entry-without-reserve"}),
    "not joined": (without("join"), {"step-not-joined"}),
    "not released": (without("release"), {"sum-without-release"}),
    "released under another contract": (
        edited("release", contract="ab" * 32),
        {"contract-switched"},
    ),
    "released what is not planned": (
        edited("release", round=4),
        {
            "release-not-planned",
            "sum-without-release",
        },
    ),
    "stage not planned": (
        edited("release", stage="gossip"),
        {
            "release-not-planned",
            "sum-without-release",
        },
    ),
    "released for less": (cheaper("release"), {"release-not-planned"}),
    "reserved for less": (cheaper("reserve"), {"release-not-covered"}),
    "told less before": (edited("reserve", after=0.1), {"epsilon-differs"}),
    "told a shorter life": (edited("reserve", lifetime=0.5), {"epsilon-differs"}),
    "reserved above the cap": (policy(epsilon=0.5), {"cap-exceeded"}),
    "claims to be above the cap": (edited("reserve", after=5.1), {"cap-exceeded"}),
    "reserved above a purpose's cap": (policy(purposes={"update": 0.3}), {"cap-exceeded"}),
    "reserved above the cap towards the server": (
        policy(epsilon_towards_server=0.5),
        {"cap-exceeded"},
    ),
    "another unit": (edited("open", unit="one purchase"), {"unit-differs"}),
    "ran other code": (edited("reserve", code="d0d0" * 16), set()),
    "refreshes": (policy(refresh_days=30.0), {"refresh-period"}),
}


class TestRules:
    """A merchant that holds its own key, and whose witness colludes, still has rules to keep."""

    @pytest.mark.parametrize("name", OPEN_RULES)
    def test_rule(self, opened: World, tmp_path: Path, name: str) -> None:
        """Each rule that is broken has its own code."""
        tamper, expected = OPEN_RULES[name]
        tamper(opened)
        assert of_shop(opened, tmp_path) == expected

    @pytest.mark.parametrize("kind", ["settle", "expire"])
    def test_released_after_the_end(self, opened: World, tmp_path: Path, kind: str) -> None:
        """Nothing is released for a run that was closed, and a run is closed once."""
        shop = opened.shops[0]
        documents = shop.documents
        last = shop.index("release", -1)
        closing = {"kind": kind, "run": "run-1", "at": documents[last]["at"], "salt": ""}
        shop.rewrite([*documents[:last], closing, *documents[last:], closing])
        opened.witness_anew(shop)
        found = of_shop(opened, tmp_path)
        assert found - {"expired-early"} == {"release-after-close", "close-twice"}

    def test_later_reservations_count_earlier_runs(self, world: World, tmp_path: Path) -> None:
        """A reservation that forgets what was spent before is found."""
        shop = world.shops[0]
        documents = shop.documents
        first, second = (documents[shop.index("reserve", number)] for number in (0, 1))
        second.update({name: first[name] for name in ("before", "after", "lifetime")})
        own = [d for d in documents if d.get("run") == "run-2"]
        own[0] = second
        shop.rewrite([d for d in documents if d.get("run") != "run-2"] + own)
        world.witness_anew(shop)
        assert of_shop(world, tmp_path) == {"epsilon-differs"}

    @pytest.mark.parametrize(
        ("changes", "noted"),
        [
            ({"epsilon": 6.0}, True),
            ({"epsilon": 4.0}, False),
            ({"delta": 1e-4}, True),
            ({"purposes": {"update": 4.0}}, False),
        ],
    )
    def test_raised_policy(
        self, world: World, tmp_path: Path, changes: Document, noted: bool
    ) -> None:
        """A merchant that loosens its own policy may; the auditor is told."""
        world.shops[0].policy.update(changes)
        world.write_shop(world.shops[0], tmp_path / "shop.zip")
        found = verify([tmp_path])
        assert ("policy-raised" in {f.code for f in found.findings}) == noted
        assert serious(found) == set()

    def test_a_policy_without_its_cap_is_looser(self, world: World, tmp_path: Path) -> None:
        """A cap that is dropped is a cap that is raised."""
        policy(epsilon_towards_server=4.0)(world)
        world.write_shop(world.shops[0], tmp_path / "shop.zip")
        assert "policy-raised" in {f.code for f in verify([tmp_path]).findings}

    def test_sampled_sums_are_covered_one_by_one(
        self, worlds: dict[str, World], tmp_path: Path
    ) -> None:
        """What was reserved for sampled sums pays for those very sums only, and as often."""
        world = worlds["sampled"].clone()
        shop = world.shops[0]
        documents = shop.documents
        reserve = documents[shop.index("reserve")]
        (update,) = [item for item in reserve["releases"] if item["stage"] == "update"]
        for name in ("event", "towards_server"):
            update[name]["noise_multiplier"] *= 0.9  # costs more, and is another mechanism
        reserve["after"] = reserve["lifetime"] = 4.0
        shop.rewrite(documents)
        world.witness_anew(shop)
        assert of_shop(world, tmp_path) == {"release-not-covered"}

    @pytest.mark.parametrize(("days", "early"), [(40.0, False), (20.0, True)])
    @pytest.mark.parametrize("whose", ["merchant", "witness"])
    def test_expiry_by_both_clocks(
        self, tmp_path: Path, days: float, early: bool, whose: str
    ) -> None:
        """A run expires when the refresh period is over by both clocks, not by one alone."""
        world = World.founded(small_contract(), refresh_days=30.0)
        world.run("run-1", tmp_path)
        shop = world.shops[0]
        began = world.now
        world.now = began + (days if whose == "witness" else 40.0) * DAY_S
        world.countersign(shop)
        world.now = began + (days if whose == "merchant" else 40.0) * DAY_S
        world.enter(shop, kind="expire", run="run-1")
        expected = {"refresh-period"} | ({"expired-early"} if early else set())
        assert of_shop(world, tmp_path) == expected
        assert verify([tmp_path / "shop.zip"]).spending[0].lifetime > 0.5

    def test_expired_runs_do_not_count_in_the_period(self, tmp_path: Path) -> None:
        """After expiry the cap is there again; the lifetime forgets nothing."""
        world = World.founded(small_contract(), refresh_days=30.0)
        world.run("run-1", tmp_path)
        world.now += 40 * DAY_S
        for shop in world.shops:
            world.countersign(shop)
            world.enter(shop, kind="expire", run="run-1")
        world.run("run-2", tmp_path)
        shop = world.shops[0]
        documents = shop.documents
        second = documents[shop.index("reserve", 1)]
        second["before"], second["after"] = 0.0, second["after"] / 1.3
        shop.rewrite(documents)
        world.witness_anew(shop)
        assert of_shop(world, tmp_path) - {"expired-early"} == {"refresh-period"}
        second["lifetime"] = second["after"]
        shop.rewrite(documents)
        world.witness_anew(shop)
        assert "epsilon-differs" in of_shop(world, tmp_path)


class TestWitness:
    """What a merchant cannot change, because the witness saw it."""

    def test_truncated(self, world: World, tmp_path: Path) -> None:
        """A ledger that ends before what was countersigned is found without the coordinator."""
        world.shops[0].entries = world.shops[0].entries[:-5]
        assert of_shop(world, tmp_path) == {"truncated"}

    def test_written_anew(self, world: World, tmp_path: Path) -> None:
        """A merchant that writes its ledger anew with its own key holds two ledgers."""
        shop = world.shops[0]
        documents = shop.documents
        documents[shop.index("release")]["salt"] = "other"
        shop.rewrite(documents)
        assert of_shop(world, tmp_path) == {"forked"}

    def test_never_witnessed(self, opened: World, tmp_path: Path) -> None:
        """Sums whose reservation no witness saw are found."""
        opened.shops[0].seen = []
        assert of_shop(opened, tmp_path) == {"not-witnessed"}

    def test_witnessed_too_early(self, opened: World, tmp_path: Path) -> None:
        """A countersignature of the entry before the reservation does not cover it."""
        shop = opened.shops[0]
        opened.witness_anew(shop)
        shop.seen = shop.seen[: shop.index("reserve")]
        assert of_shop(opened, tmp_path) == {"not-witnessed"}

    def test_countersigned_by_somebody(self, opened: World, tmp_path: Path) -> None:
        """A countersignature by another key than the pinned one is none."""
        opened.server = Identity.generate("coordinator")
        opened.witness_anew(opened.shops[0])
        assert of_shop(opened, tmp_path) == {"countersignature-invalid"}

    def test_countersignature_of_another_ledger(self, opened: World, tmp_path: Path) -> None:
        """Another merchant's countersignature is none."""
        opened.shops[0].seen = opened.shops[1].seen
        assert of_shop(opened, tmp_path) == {"countersignature-invalid"}

    @pytest.mark.parametrize(
        "line", [b"", b"[]", b"{}", b'{"body": "{}", "signature": "00"}', b"nonsense"]
    )
    def test_malformed(self, opened: World, tmp_path: Path, line: bytes) -> None:
        """A file that holds something else is refused."""
        files = {"witness.jsonl": line + b"\n"}
        opened.write_shop(opened.shops[0], tmp_path / "shop.zip", **files)
        assert serious(verify([tmp_path])) == {"countersignature-invalid"}

    def test_clock(self, opened: World, tmp_path: Path) -> None:
        """A witness whose clock goes backwards is worth a question."""
        shop = opened.shops[0]
        opened.now -= 1000.0
        opened.countersign(shop)
        opened.now += 1000.0
        assert of_shop(opened, tmp_path) == {"witness-clock"}

    def test_restored_backup(self, world: World, tmp_path: Path) -> None:
        """A merchant that puts back an old ledger, witness file and all, meets the witness's."""
        shop = world.shops[0]
        cut = shop.index("reserve", 1)
        shop.entries = shop.entries[:cut]
        shop.seen = [one for one in shop.seen if json.loads(one.body)["seq"] <= cut]
        assert of_shop(world, tmp_path) == set()
        assert of_all(world, tmp_path) == {"rolled-back", "release-without-event"}

    def test_forked_for_the_coordinator(self, world: World, tmp_path: Path) -> None:
        """A second ledger is found by the witness's log, though the merchant shows no other."""
        shop = world.shops[0]
        documents = shop.documents
        documents[-1]["salt"] = "other"
        shop.rewrite(documents)
        shop.seen = shop.seen[:-1]
        assert of_shop(world, tmp_path) == set()
        assert of_all(world, tmp_path) == {"forked"}

    def test_older_evidence(self, world: World, tmp_path: Path) -> None:
        """Honest evidence from before a run is told from a ledger that was put back."""
        shop = world.shops[0]
        cut, now = shop.index("reserve", 1), world.now
        early = replace(
            shop,
            entries=shop.entries[:cut],
            seen=[one for one in shop.seen if json.loads(one.body)["seq"] <= cut],
        )
        world.now = early.entries[-1].document["at"] + 1.0
        world.write_shop(early, tmp_path / "shop-0.zip")
        world.now = now
        world.write_server(tmp_path / "server.zip")
        assert serious(verify([tmp_path])) == {"evidence-older"}

    def test_forgetful_witness(self, world: World, tmp_path: Path) -> None:
        """A merchant that holds what the witness's log lacks shows that the log was shortened."""
        world.log = world.log[:-1]
        assert of_all(world, tmp_path) == {"witness-log-short"}

    @pytest.mark.parametrize("name", ["signature", "countersignature", "body", "merchant", "link"])
    def test_forged_log(self, world: World, tmp_path: Path, name: str) -> None:
        """Both signatures in the witness's log are checked."""
        world.log[0] = {**world.log[0], name: world.log[1][name]}
        world.write_server(tmp_path / "server.zip")
        assert serious(verify([tmp_path])) == {"countersignature-invalid"}

    @pytest.mark.parametrize(
        "changes", [{"merchant": "ghost"}, {"seq": "1"}, {"signature": "xy"}, {"seq": 3}]
    )
    def test_malformed_log(self, world: World, tmp_path: Path, changes: Document) -> None:
        """A log that speaks of strangers, or cannot be read, is refused."""
        world.log[0].update(changes)
        world.write_server(tmp_path / "server.zip")
        assert serious(verify([tmp_path])) == {"countersignature-invalid"}

    def test_two_evidences_of_one_merchant(self, world: World, tmp_path: Path) -> None:
        """An older evidence is how the newer one begins, or there are two ledgers."""
        shop = world.shops[0]
        earlier = replace(shop, entries=shop.entries[:20], seen=shop.seen[:1])
        world.write_shop(earlier, tmp_path / "old.zip")
        world.write_shop(shop, tmp_path / "new.zip")
        audit = verify([tmp_path])
        assert serious(audit) == set()
        assert len(audit.spending) == 1
        assert set(audit.spending[0].by_run) == {"run-1", "run-2"}
        documents = shop.documents
        documents[10]["salt"] = "other"
        shop.rewrite(documents)
        world.witness_anew(shop)
        world.write_shop(shop, tmp_path / "new.zip")
        assert serious(verify([tmp_path])) == {"forked"}


class TestAnchors:
    """Heads that an auditor knows from earlier."""

    def test_no_file(self, tmp_path: Path) -> None:
        """The file is named."""
        with pytest.raises(EvidenceError, match="heads: cannot be read"):
            read_anchors(tmp_path / "heads")

    def test_heads_of_an_audit_are_anchors_of_the_next(self, world: World, tmp_path: Path) -> None:
        """What one audit tells is what the next one can hold a ledger against."""
        world.write(tmp_path / "evidence")
        heads = [one["head"] for one in verify([tmp_path]).evidence if one["kind"] == "merchant"]
        (tmp_path / "anchors").write_text("# of May\n\n" + "\n".join(heads) + "\n")
        anchors = read_anchors(tmp_path / "anchors")
        assert len(anchors) == 4
        audit = verify([tmp_path / "evidence"], anchors)
        assert audit.findings == ()
        assert audit.checks["heads known from earlier"] == 4

    def test_shortened(self, world: World, tmp_path: Path) -> None:
        """A ledger that lost what the auditor saw is found, though everybody else colludes."""
        shop = world.shops[0]
        anchor = Anchor(shop.identity.public, len(shop.entries), shop.link)
        shop.entries = shop.entries[:-1]
        world.witness_anew(shop)
        world.write_shop(shop, tmp_path / "shop.zip")
        assert serious(verify([tmp_path])) == set()
        assert serious(verify([tmp_path], [anchor])) == {"anchor-missing"}
        forked = replace(anchor, seq=5)
        assert serious(verify([tmp_path], [forked])) == {"anchor-missing"}

    def test_of_nobody(self, world: World, tmp_path: Path) -> None:
        """An anchor whose ledger is not there is noted."""
        world.write_shop(world.shops[0], tmp_path / "shop.zip")
        audit = verify([tmp_path], [Anchor(bytes(32), 1, bytes(32))])
        assert "anchor-unknown" in {finding.code for finding in audit.findings}
        assert audit.passed

    @pytest.mark.parametrize(
        "line", ["hansa head", "x", "hansa head " + "0" * 64 + " 0 " + "0" * 64]
    )
    def test_malformed(self, tmp_path: Path, line: str) -> None:
        """The line is named."""
        (tmp_path / "anchors").write_text(f"# heads\n{line}\n")
        with pytest.raises(EvidenceError, match="line 2"):
            read_anchors(tmp_path / "anchors")


def first_sum(world: World, stage: str, number: int, *, last: bool = False) -> Document:
    """Return a recorded sum that came about, to be changed."""
    found = [
        line
        for line in world.records["run-1"]
        if line["kind"] == "sum" and (line["stage"], line["round"]) == (stage, number)
    ]
    return found[-1 if last else 0]


def add_to_total(stage: str, number: int) -> Tamper:
    """Return the tampering that adds one unit to one number of a recorded sum."""

    def tamper(world: World) -> None:
        line = first_sum(world, stage, number, last=True)
        total = decoded(line["total"])
        total[0] += round(1 / line["lattice_step"])
        line["total"] = encoded(total)

    return tamper


def change_sum(stage: str, number: int, **changes: Any) -> Tamper:
    """Return the tampering that changes fields of a recorded sum."""
    return lambda world: first_sum(world, stage, number, last=True).update(changes)


def change_event(world: World) -> None:
    """Tell that a sum cost less."""
    first_sum(world, "update", 1)["event"]["noise_multiplier"] *= 2


def drop_line(kind: str, number: int = 0) -> Tamper:
    """Return the tampering that leaves a line out of the record."""

    def tamper(world: World) -> None:
        lines = world.records["run-1"]
        chosen = [line for line in lines if line["kind"] == kind][number]
        lines.remove(chosen)

    return tamper


def edit_advert(world: World) -> None:
    """Put other keys into an advert, as whoever wants to read a merchant's messages would."""
    (session,) = [line for line in world.records["run-1"] if line["kind"] == "session"]
    raw = bytearray.fromhex(session["adverts"][1])
    raw[10] ^= 1
    session["adverts"][1] = raw.hex()


def swap_adverts(world: World) -> None:
    """Put adverts into another order."""
    (session,) = [line for line in world.records["run-1"] if line["kind"] == "session"]
    session["adverts"][0], session["adverts"][1] = session["adverts"][1], session["adverts"][0]


def other_session(world: World) -> None:
    """Show a roster of another run, whose adverts are signed for that one."""
    sessions = {
        run: next(line for line in lines if line["kind"] == "session")
        for run, lines in world.records.items()
    }
    sessions["run-1"].update(sessions["run-2"])


def repeat_sum(world: World) -> None:
    """Ask for a sum again that came about."""
    lines = world.records["run-1"]
    lines.insert(lines.index(first_sum(world, "census", 0)), first_sum(world, "census", 0))


def edit_bundle(name: str, change: Callable[[Document], None]) -> Tamper:
    """Return the tampering that changes a document of a bundle and signs it anew."""

    def tamper(world: World) -> None:
        files = dict(world.bundles["run-1"])
        document = json.loads(files[name])
        change(document)
        files[name] = json.dumps(document).encode()
        with tempfile.TemporaryDirectory() as folder:
            world.bundles["run-1"] = bundled(files, world.server, Path(folder) / "bundle")

    return tamper


def typical(found: Document) -> Document:
    """Return the profile's first cell of the first segment."""
    cell: Document = found["segments"][0]["profile"]["spend"]
    assert cell["typical"] is not None
    return cell


def flip_model(world: World) -> None:
    """Publish another model than the sums give, properly signed."""
    files = dict(world.bundles["run-1"])
    theta = load(files["model.safetensors"])["parameters"].copy()
    theta[0] = np.nextafter(theta[0], np.float32(9))
    files["model.safetensors"] = save({"parameters": theta})
    with tempfile.TemporaryDirectory() as folder:
        world.bundles["run-1"] = bundled(files, world.server, Path(folder) / "bundle")


def break_bundle(world: World) -> None:
    """Change a file of a bundle after it was signed."""
    world.bundles["run-1"]["metrics.json"] += b" "


SERVER: dict[str, tuple[Tamper, set[str]]] = {
    "census edited": (add_to_total("census", 0), {"replay-differs"}),
    "update edited": (add_to_total("update", 1), {"replay-differs"}),
    "retried update edited": (add_to_total("update", 2), {"replay-differs"}),
    "last update edited": (add_to_total("update", 3), {"replay-differs"}),
    "last evaluation edited": (add_to_total("evaluation", 3), {"published-differs"}),
    "profile edited": (add_to_total("profile", 3), {"published-differs"}),
    "model edited": (change_sum("update", 2, parameters="ab" * 32), {"replay-differs"}),
    "customers edited": (change_sum("update", 1, customers_per_merchant=7.0), {"replay-differs"}),
    "final model edited": (
        lambda world: world.records["run-1"][-2].update(parameters="ab" * 32),
        {"replay-differs"},
    ),
    "published model edited": (flip_model, {"replay-differs"}),
    "event edited": (change_event, {"sum-differs", "privacy-differs"}),
    "lattice edited": (change_sum("evaluation", 2, lattice_step=0.5), {"sum-differs"}),
    "length edited": (change_sum("evaluation", 2, total=encoded(np.zeros(3))), {"sum-differs"}),
    "update of another length": (
        change_sum("update", 1, total=encoded(np.zeros(3))),
        {"sum-differs", "replay-differs"},
    ),
    "sum over nobody": (
        change_sum("update", 1, merchants=[], fewest=0),
        {"below-threshold", "replay-differs", "privacy-differs"},
    ),
    "too few merchants": (
        change_sum("evaluation", 2, merchants=["shop-0", "shop-1"], fewest=2),
        {"below-threshold", "privacy-differs"},
    ),
    "fewest overstated": (
        change_sum("evaluation", 2, fewest=4),
        {"sum-differs", "below-threshold"},
    ),
    "a stranger counted": (
        change_sum("evaluation", 2, merchants=["shop-0", "shop-1", "shop-2", "stranger"]),
        {"sum-differs"},
    ),
    "a merchant counted twice": (
        change_sum("evaluation", 2, merchants=["shop-0", "shop-0", "shop-1", "shop-2"]),
        {"sum-differs"},
    ),
    "attempt beyond the plan": (change_sum("evaluation", 2, attempt=3), {"sum-differs"}),
    "asked twice": (repeat_sum, {"sum-repeated", "replay-differs", "privacy-differs"}),
    "sum left out": (drop_line("sum", 1), {"replay-differs", "privacy-differs"}),
    "roster left out": (drop_line("session"), {"sum-differs"}),
    "advert edited": (edit_advert, {"advert-invalid"}),
    "adverts swapped": (swap_adverts, {"advert-invalid"}),
    "roster of another run": (other_session, {"session-differs"}),
    "start left out": (drop_line("start"), {"record-schema"}),
    "end told twice": (
        lambda world: world.records["run-1"].append(world.records["run-1"][-2]),
        {"record-schema"},
    ),
    "unknown line": (
        lambda world: world.records["run-1"].append({"kind": "bribe"}),
        {"record-schema"},
    ),
    "unknown field": (change_sum("census", 0, more=1), {"record-schema"}),
    "total missing": (change_sum("census", 0, total=None), {"record-schema"}),
    "total no base64": (change_sum("census", 0, total="%%%"), {"record-schema"}),
    "bundle broken": (break_bundle, {"bundle-invalid"}),
    "bundle left out": (lambda world: world.bundles.pop("run-1"), {"bundle-missing"}),
    "bundle exchanged": (
        lambda world: world.bundles.update({"run-1": world.bundles["run-2"]}),
        {"privacy-differs", "published-differs", "replay-differs"},
    ),
    "epsilon told smaller": (
        edit_bundle("privacy.json", lambda found: found.update(epsilon=0.3)),
        {"privacy-differs"},
    ),
    "epsilon told larger": (
        edit_bundle("privacy.json", lambda found: found.update(epsilon=3.0)),
        {"privacy-differs"},
    ),
    "epsilon towards the server": (
        edit_bundle("privacy.json", lambda found: found.update(epsilon_towards_server=0.3)),
        {"privacy-differs"},
    ),
    "achieved epsilon": (
        edit_bundle("privacy.json", lambda found: found["achieved"].update(epsilon=0.3)),
        {"privacy-differs"},
    ),
    "achieved survivors": (
        edit_bundle("privacy.json", lambda found: found["achieved"].update(survivors_min=4)),
        {"privacy-differs"},
    ),
    "epsilon with colluders": (
        edit_bundle("privacy.json", lambda found: found["colluders"][-1].update(epsilon=0.3)),
        {"privacy-differs"},
    ),
    "an event less": (
        edit_bundle("privacy.json", lambda found: found["events"].pop("census")),
        {"privacy-differs"},
    ),
    "confusion matrix": (
        edit_bundle("metrics.json", lambda found: found["confusion"][0].reverse()),
        {"published-differs"},
    ),
    "profile of a segment": (
        edit_bundle("segments.json", lambda found: typical(found).update(typical=12.0)),
        {"published-differs"},
    ),
    "profile of a segment, no number": (
        edit_bundle("segments.json", lambda found: typical(found).update(typical="12")),
        {"published-differs"},
    ),
    "a segment less": (
        edit_bundle("segments.json", lambda found: found["segments"].pop()),
        {"published-differs"},
    ),
    "a segment that is none": (
        edit_bundle("segments.json", lambda found: found.update(segments=[1, 2])),
        {"published-differs"},
    ),
    "a feature less": (
        edit_bundle("segments.json", lambda found: found["segments"][0]["profile"].pop("member")),
        {"published-differs"},
    ),
    "no profile recorded": (
        drop_line("sum", -1),
        {"published-differs", "privacy-differs"},
    ),
    "another length of the profile": (
        change_sum("profile", 3, total=encoded(np.zeros(5))),
        {"published-differs", "sum-differs"},
    ),
    "another length of the last evaluation": (
        change_sum("evaluation", 3, total=encoded(np.zeros(5))),
        {"published-differs", "sum-differs"},
    ),
    "colluders that are no list": (
        edit_bundle("privacy.json", lambda found: found.update(colluders=[{"colluders": "x"}])),
        {"privacy-differs"},
    ),
    "epsilon that is no number": (
        edit_bundle("privacy.json", lambda found: found.update(epsilon="small")),
        {"privacy-differs"},
    ),
    "events that cannot be read": (
        edit_bundle("privacy.json", lambda found: found.update(events={"census": [{}]})),
        {"privacy-differs"},
    ),
    "all colluding, and noise claimed": (
        edit_bundle(
            "privacy.json",
            lambda found: found["colluders"].append({"colluders": 99, "epsilon": 5.0}),
        ),
        {"privacy-differs"},
    ),
    "all colluding, and none claimed": (
        edit_bundle(
            "privacy.json",
            lambda found: found["colluders"].append({"colluders": 99, "epsilon": None}),
        ),
        set(),
    ),
    "documents that are none": (
        edit_bundle("metrics.json", lambda found: found.clear()),
        {"published-differs"},
    ),
    "share of a segment": (
        edit_bundle("segments.json", lambda found: found["segments"][0].update(share=0.123)),
        {"published-differs"},
    ),
}


class TestRecord:
    """A coordinator that signs what it likes is held against its own sums."""

    @pytest.mark.parametrize("name", SERVER)
    def test_tampering(self, world: World, tmp_path: Path, name: str) -> None:
        """Each change has its own code, in the coordinator's evidence alone."""
        tamper, expected = SERVER[name]
        tamper(world)
        world.write_server(tmp_path / "server.zip")
        audit = verify([tmp_path])
        assert serious(audit) == expected
        assert {run.run for run in audit.runs if run.replayed} >= {"run-2"}

    def test_replay_names_the_round(self, world: World, tmp_path: Path) -> None:
        """The first sum that does not follow is told."""
        add_to_total("update", 1)(world)
        world.write_server(tmp_path / "server.zip")
        (finding,) = [f for f in verify([tmp_path]).findings if f.code == "replay-differs"]
        assert "update of round 2" in finding.message
        assert finding.where == "run run-1"

    def test_another_contracts_bundle(self, world: World, tmp_path: Path) -> None:
        """A bundle under another contract is not this run's."""
        other = World.founded(small_contract(privacy={"epsilon": 2.0}))
        other.run("run-1", tmp_path)
        world.bundles["run-1"] = other.bundles["run-1"]
        world.write_server(tmp_path / "server.zip")
        assert serious(verify([tmp_path / "server.zip"])) == {"bundle-differs"}

    def test_unfinished_run(self, world: World, tmp_path: Path) -> None:
        """A run that broke off is no finding: what there is of it is checked."""
        lines = world.records["run-1"]
        world.records["run-1"] = lines[:8]
        del world.bundles["run-1"]
        world.write_server(tmp_path / "server.zip")
        audit = verify([tmp_path])
        assert serious(audit) == set()
        run = audit.runs[0]
        assert (run.finished, run.replayed, run.privacy) == (False, None, {})

    def test_written_anew(self, world: World, tmp_path: Path) -> None:
        """A record that an older evidence tells differently was written anew."""
        honest = world.clone()
        honest.records["run-1"] = honest.records["run-1"][:6]
        del honest.bundles["run-1"]
        honest.now -= 5.0
        honest.write_server(tmp_path / "old.zip")
        world.write_server(tmp_path / "new.zip")
        assert serious(verify([tmp_path])) == set()
        honest.records["run-1"][3]["customers_per_merchant"] = 5.0
        honest.write_server(tmp_path / "old.zip")
        assert serious(verify([tmp_path])) == {"record-rewritten"}

    def test_missing_file(self, world: World, tmp_path: Path) -> None:
        """A run without its record is incomplete."""
        world.records["run-1"] = [world.records["run-1"][0]]
        world.write_server(tmp_path / "server")
        files = read_evidence(tmp_path / "server").files
        del files["runs/run-1/run.jsonl"]
        key = world.server.key
        write_evidence(tmp_path / "server", "server", "coordinator", files, key, 1.0, "", "")
        assert serious(verify([tmp_path])) == {"evidence-incomplete"}


def lied(*lies: str) -> Callable[[Path], World]:
    """Return the function that makes a world in which somebody lies from the beginning."""

    def make(folder: Path) -> World:
        world = World.founded(small_contract())
        world.run("run-1", folder, lies=frozenset(lies))
        return world

    return make


class TestBothDirections:
    """Coordinator and merchants, each held against the other."""

    @pytest.mark.parametrize(
        ("lie", "expected"),
        [
            ("overstated", {"survivors-overstated"}),
            ("unwritten", {"release-without-event"}),
            ("unasked", {"unknown-to-server"}),
        ],
    )
    def test_consistent_lies(self, tmp_path: Path, lie: str, expected: set[str]) -> None:
        """A lie that its own evidence does not show is found in the others'."""
        world = lied(lie)(tmp_path / "bundle")
        world.write_server(tmp_path / "server" / "server.zip")
        assert serious(verify([tmp_path / "server"])) == set()
        assert of_shop(world, tmp_path) == set()
        assert of_all(world, tmp_path) == expected

    def test_understated(self, world: World, tmp_path: Path) -> None:
        """A coordinator that counts fewer than merchants confirmed is worth a question."""
        line = first_sum(world, "evaluation", 3)
        line.update(merchants=line["merchants"][:3], fewest=3)
        assert of_all(world, tmp_path) == {"survivors-understated", "published-differs"}

    def test_another_model(self, world: World, tmp_path: Path) -> None:
        """A model that a merchant was not shown is found, however the record explains it."""
        change_sum("update", 3, parameters="ab" * 32)(world)
        assert of_all(world, tmp_path) == {"release-differs", "replay-differs"}

    def test_another_roster(self, world: World, tmp_path: Path) -> None:
        """A roster that no merchant joined is found."""
        edit_advert(world)
        assert of_all(world, tmp_path) == {"advert-invalid", "release-differs"}

    def test_run_that_the_coordinator_forgot(self, world: World, tmp_path: Path) -> None:
        """A whole run that only merchants know is worth a question."""
        del world.records["run-1"]
        assert of_all(world, tmp_path) == {"run-unknown-to-server"}

    def test_run_that_a_merchant_forgot(self, world: World, tmp_path: Path) -> None:
        """A merchant whose ledger does not know a run that it is counted in."""
        shop = world.shops[0]
        rest = [document for document in shop.documents if document.get("run") != "run-2"]
        shop.rewrite(rest)
        world.witness_anew(shop)
        found = of_all(world, tmp_path)
        assert found >= {"release-without-event"}

    def test_record_that_ends_early(self, world: World, tmp_path: Path) -> None:
        """A coordinator that was stopped while it asked is told from one that hides a sum."""
        shop_lines = world.records["run-2"]
        sums = [i for i, line in enumerate(shop_lines) if line["kind"] == "sum"]
        del world.bundles["run-2"]
        for shop in world.shops:
            documents = shop.documents
            last = shop.index("release", -1)
            shop.rewrite(documents[: last + 1])
            world.witness_anew(shop)
        world.log = [line for line in world.log if line["seq"] <= len(world.shops[0].entries)]
        world.records["run-2"] = [line for line in shop_lines[: sums[-1]] if line["kind"] != "end"]
        found = of_all(world, tmp_path)
        assert "record-ends-early" in found
        assert "unknown-to-server" not in found

    def test_advert_before_the_reservation(self, tmp_path: Path) -> None:
        """An advert that is bound to a ledger without the reservation is found."""
        world = World.founded(small_contract())
        world.run("run-1", tmp_path)
        shop = world.shops[0]
        documents = shop.documents
        at = shop.index("reserve")
        for _ in range(2):
            documents.insert(
                at,
                {
                    "kind": "refuse",
                    "run": "x",
                    "stage": "reserve",
                    "round": 0,
                    "attempt": 0,
                    "contract": "",
                    "reason": "",
                    "at": 0.0,
                    "salt": "",
                },
            )
        shop.rewrite(documents)
        world.witness_anew(shop)
        world.log = []
        found = of_all(world, tmp_path) - {"evidence-older"}
        assert found == {"advert-head-unknown", "witness-log-short"}

    def test_other_code(self, world: World, tmp_path: Path) -> None:
        """Parties that ran different code are named."""
        world.records["run-1"][0]["code"] = "d0d0" * 16
        audit = verify([world.write(tmp_path)])
        assert serious(audit) == {"code-differs"}
        (finding,) = audit.findings
        assert "the coordinator" in finding.message

    def test_missing_counterparts_are_notes(self, world: World, tmp_path: Path) -> None:
        """Who gave no evidence is told; that alone fails nothing."""
        world.write_server(tmp_path / "server.zip")
        world.write_shop(world.shops[2], tmp_path / "shop.zip")
        audit = verify([tmp_path])
        assert serious(audit) == set()
        assert {f.code for f in audit.findings} == {"no-evidence-of-merchant"}
        assert all("shop-0, shop-1, shop-3" in f.message for f in audit.findings)
        assert [run.matched for run in audit.runs] == [("shop-2",), ("shop-2",)]


JUNK = st.sampled_from(
    [None, True, -1, 0, 3, 1e308, 10**400, float("nan"), "", "x", "\ud800", [], {}, [[]], "ab" * 32,
     2**53 - 1, ["shop-0"], "AAAAAAAAAAA=", "update", {"kind": "gaussian-sum"}]
)  # fmt: skip


def spoiled(data: st.DataObject, value: Any) -> Any:
    """Return a JSON value in which something, somewhere, is junk."""
    if isinstance(value, dict | list) and value and data.draw(st.integers(0, 5)):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = data.draw(st.sampled_from(keys))
        found = copy.copy(value)
        found[key] = spoiled(data, value[key])
        return found
    return data.draw(JUNK)


class TestJunk:
    """Who makes evidence may write anything; an audit tells, and does not break."""

    @pytest.mark.slow
    @settings(max_examples=30)
    @given(data=st.data())
    def test_anything_anywhere(
        self,
        worlds: dict[str, World],
        tmp_path_factory: pytest.TempPathFactory,
        data: st.DataObject,
    ) -> None:
        """Junk in a ledger, a record, a log or a bundle becomes findings."""
        world = worlds[data.draw(st.sampled_from(["secure", "plain"]))].clone()
        where = data.draw(st.sampled_from(["record", "log", "bundle", "policy"]))
        if where == "record":
            lines = world.records["run-1"]
            at = data.draw(st.integers(0, len(lines) - 1))
            lines[at] = spoiled(data, lines[at])
        elif where == "log":
            world.log = spoiled(data, world.log[:3])
        elif where == "policy":
            world.shops[0].policy = spoiled(data, {"policy": world.shops[0].policy})
        else:
            name = data.draw(st.sampled_from(["privacy.json", "metrics.json", "segments.json"]))
            document = json.loads(world.bundles["run-1"][name])
            junk = spoiled(data, document)
            edit_bundle(name, lambda found: found.update(junk if isinstance(junk, dict) else {}))(
                world
            )
        folder = tmp_path_factory.mktemp("junk")
        with contextlib.suppress(TypeError):  # what is no list cannot be written as lines
            world.write(folder)
            assert isinstance(verify([folder]), Audit)


class TestAccounting:
    """What an audit composes."""

    @given(st.lists(st.tuples(st.floats(3.0, 80.0), st.integers(1, 9)), min_size=1, max_size=4))
    def test_quick_and_slow_agree(self, found: list[tuple[float, int]]) -> None:
        """Adding up sums over all customers in mu^2 is exact."""
        events = [GaussianSum(sigma, 1.0, count) for sigma, count in found]
        assert quick_epsilon(events, 1e-5) == pytest.approx(
            epsilon_of(events, 1e-5), rel=0.005, abs=1e-3
        )

    def test_a_contract_without_a_plan(self) -> None:
        """What no noise can pay for is planned by no contract."""
        impossible = small_contract(aggregation={"max_customers": 10**12})
        assert release_of(impossible, "census", 0) is None
        assert release_of(small_contract(), "census", 0) is not None
        assert release_of(small_contract(), "update", 4) is None

    def test_no_noise_to_speak_of(self) -> None:
        """Events that no library can compose cost without bound; nothing breaks."""
        assert quick_epsilon([GaussianSum(1e-200, 1.0)], 1e-5) == float("inf")
        assert epsilon_of([GaussianSum(1e-200, 1.0)], 1e-5) == float("inf")
        assert epsilon_of([], 1e-5) == 0.0


class TestCodes:
    """The codes are the audit's interface."""

    def test_all_are_documented(self) -> None:
        """docs/auditors.md lists every code with its severity, and no other."""
        text = (ROOT / "docs" / "auditors.md").read_text(encoding="utf-8")
        rows = re.findall(r"^\| `([a-z-]+)` \| (fail|warning|note) \|", text, re.MULTILINE)
        assert len(rows) == len(dict(rows))
        of_reports = {code for code, _ in rows} - CODES.keys()
        assert {code: severity for code, severity in rows if code in CODES} == CODES
        assert of_reports <= ADVICE.keys()

    def test_all_are_used(self) -> None:
        """No code is listed that no check writes down."""
        source = "".join(
            path.read_text(encoding="utf-8")
            for path in Path(codes.__file__).parent.glob("*.py")
            if path.name != "codes.py"
        )
        assert not [code for code in CODES if f'"{code}"' not in source]

    def test_bodies_are_canonical(self) -> None:
        """The format's canonical JSON is what an auditor checks."""
        assert body_bytes({"b": 1, "a": "é"}) == b'{"a":"\\u00e9","b":1}'


class TestStart:
    """Runs whose contract names parameters to start from."""

    def test_honest(self, worlds: dict[str, World], tmp_path: Path) -> None:
        """The model follows from the start in the evidence and the sums."""
        audit = verify([worlds["warm"].clone().write(tmp_path / "evidence")])
        assert {finding.severity for finding in audit.findings} <= {"note"}
        assert [run.replayed for run in audit.runs] == [True]

    @pytest.mark.parametrize(
        "content",
        [
            None,
            b"",
            to_bytes(WARM)[:-1],
            to_bytes(WARM) + b"\0",
            to_bytes(WARM + 1e-16),
            to_bytes(np.full(6, np.nan)),
            to_bytes(np.zeros(7)),
        ],
        ids=["left out", "empty", "cut", "longer", "a bit", "not numbers", "another model's"],
    )
    def test_exchanged(
        self, worlds: dict[str, World], tmp_path: Path, content: bytes | None
    ) -> None:
        """Whatever the coordinator hands in instead of what the contract names is a failure."""
        world = worlds["warm"].clone()
        world.start = content
        assert "start-differs" in of_all(world, tmp_path)

    def test_started_elsewhere(self, worlds: dict[str, World], tmp_path: Path) -> None:
        """A run that was not started from what the contract names does not replay."""
        world = World.founded(worlds["warm"].contract)
        with pytest.MonkeyPatch.context() as patch:
            swapped = "tests.audit.evidence_world.starting_parameters"
            patch.setattr(swapped, lambda _contract, _start: WARM[::-1].copy())
            world.run("run-1", tmp_path)
        world.start = to_bytes(WARM)
        assert "replay-differs" in of_all(world, tmp_path)

    def test_first_line_tells_another(self, worlds: dict[str, World], tmp_path: Path) -> None:
        """Also where only the record's first line lies."""
        world = worlds["warm"].clone()
        world.records["run-1"][0]["parameters"] = "ab" * 32
        assert of_all(world, tmp_path) == {"replay-differs"}

    def test_signed_contract_without_start(self, worlds: dict[str, World], tmp_path: Path) -> None:
        """Taking the start out of the contract makes another contract than merchants signed."""
        world = worlds["warm"].clone()
        world.start = None
        cold = world.contract.revised(model={"start": None})
        world.contracts = {cold.sha256: cold}
        world.records["run-1"][0]["contract"] = cold.sha256
        assert of_all(world, tmp_path) & {"contract-switched", "release-differs", "replay-differs"}
