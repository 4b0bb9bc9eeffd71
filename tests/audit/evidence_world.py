"""Honest evidence of a small federation, made without the code that makes it in earnest.

Totals are drawn, not summed; everything that an audit may check is as it would be: chains,
countersignatures, rosters, plans, the optimizer's steps, and the published files.
"""

import base64
import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from safetensors.numpy import save

from common import statements
from common.accounting import epsilon
from common.bundle import write_bundle
from common.chain import (
    NO_LINK,
    Countersignature,
    Entry,
    body_bytes,
    link_after,
    signed_head,
)
from common.contract import Contract, contract_toml, parse_contract
from common.events import Event, from_document, to_document
from common.evidence import write_evidence
from common.fixed_point import from_lattice
from common.identity import Identity
from common.plan import CENSUS, EVALUATION, PROFILE, UPDATE, evaluation_rounds, lattice_of, plan_of
from common.session import Advert, Roster, session_context
from common.start import starting_parameters
from server.optimizers import Optimizer
from server.outcome import NoisySum, Outcome
from server.publishing import metrics_document, privacy_document, segments_document

BEGAN = 1_760_000_000.0
CODE, VERSION = "c0de" * 16, "0.1.0"
DAY_S = 86_400.0

Document = dict[str, Any]


def small_contract(**sections: Document) -> Contract:
    """Return a contract of three rounds and five numbers a sum."""
    contract = parse_contract(
        {
            "federation": {"name": "Evidence", "min_merchants": 4},
            "features": [{"name": "spend", "high": 100.0}, {"name": "member", "kind": "flag"}],
            "segments": {"names": ["low", "high"]},
            "model": {"family": "linear"},
            "training": {"rounds": 3, "spare_rounds": 2},
            "privacy": {"epsilon": 1.0, "delta": 1e-5},
            "aggregation": {"min_survivors": 3},
            "publication": {"evaluate_every": 2},
        },
        source="test",
    )
    return contract.revised(**sections) if sections else contract


@dataclass
class Shop:
    """A merchant and its ledger."""

    identity: Identity
    policy: Document
    entries: list[Entry] = field(default_factory=list)
    seen: list[Countersignature] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Return its id."""
        return self.identity.merchant

    @property
    def documents(self) -> list[Document]:
        """Return what its entries say, as copies."""
        return [entry.document for entry in self.entries]

    def append(self, **document: Any) -> None:
        """Sign one more entry."""
        body = body_bytes(document)
        seq, link = len(self.entries) + 1, link_after(self.link, body)
        signature = self.identity.sign(signed_head(self.identity.public, seq, link))
        self.entries.append(Entry(seq, body, link, signature))

    @property
    def link(self) -> bytes:
        """Return the link of its last entry."""
        return self.entries[-1].link if self.entries else NO_LINK

    def rewrite(self, documents: list[Document]) -> None:
        """Write the ledger anew, as a merchant can who has its own key."""
        self.entries = []
        for document in documents:
            self.append(**document)

    def index(self, kind: str, number: int = 0) -> int:
        """Return the place of an entry of a kind, counted from 0."""
        return [i for i, found in enumerate(self.documents) if found["kind"] == kind][number]


@dataclass
class World:
    """A federation, and everything that it leaves as evidence."""

    contract: Contract
    shops: list[Shop]
    server: Identity
    log: list[Document] = field(default_factory=list)
    records: dict[str, list[Document]] = field(default_factory=dict)
    bundles: dict[str, dict[str, bytes]] = field(default_factory=dict)
    contracts: dict[str, Contract] = field(default_factory=dict)
    now: float = BEGAN
    members: Document = field(default_factory=dict)
    start: bytes | None = None  # what the contract starts from, if it says so

    @classmethod
    def founded(cls, contract: Contract, shops: int = 4, **policy: Any) -> "World":
        """Return a federation in which nothing happened yet."""
        caps = {
            "epsilon": 5.0,
            "delta": contract.privacy.delta,
            "epsilon_towards_server": None,
            "refresh_days": None,
            "purposes": {},
            **policy,
        }
        world = cls(contract, [], Identity.generate("coordinator"))
        for number in range(shops):
            shop = Shop(Identity.generate(f"shop-{number}"), dict(caps))
            world.shops.append(shop)
            world.enter(
                shop,
                kind="open",
                v=1,
                ledger="ab" * 16,
                merchant=shop.name,
                key=shop.identity.public.hex(),
                unit=statements.UNIT,
                relation=statements.RELATION,
                hansa=VERSION,
                code=CODE,
            )
        world.members = {
            "members": {shop.name: shop.identity.public.hex() for shop in world.shops},
            "witness": {"key": world.server.public.hex()},
        }
        return world

    def clone(self) -> "World":
        """Return a copy that can be tampered with; keys are shared."""
        other = replace(self)
        for name in ("log", "records", "bundles", "contracts", "members"):
            setattr(other, name, copy.deepcopy(getattr(self, name)))
        other.shops = [
            replace(s, policy=dict(s.policy), entries=list(s.entries), seen=list(s.seen))
            for s in self.shops
        ]
        return other

    def tick(self) -> float:
        """Return a time after all others."""
        self.now += 1.0
        return self.now

    def enter(self, shop: Shop, **document: Any) -> None:
        """Let a merchant write an entry."""
        shop.append(at=self.tick(), salt="5a" * 16, **document)

    def countersign(self, shop: Shop) -> None:
        """Let the witness countersign a merchant's head."""
        seq, link, key = len(shop.entries), shop.link, shop.identity.public
        body = Countersignature.statement(key, seq, link, self.tick())
        signature = self.server.sign(Countersignature.signed(body))
        shop.seen.append(Countersignature(body, signature))
        self.log.append(
            {
                "merchant": shop.name,
                "seq": seq,
                "link": link.hex(),
                "signature": shop.entries[-1].signature.hex(),
                "body": body.decode(),
                "countersignature": signature.hex(),
            }
        )

    def write(self, folder: Path, *, suffix: str = ".zip") -> Path:
        """Write everybody's evidence into a folder."""
        for shop in self.shops:
            self.write_shop(shop, folder / f"{shop.name}{suffix}")
        self.write_server(folder / f"coordinator{suffix}")
        return folder

    def write_shop(self, shop: Shop, path: Path, **files: bytes) -> None:
        """Write one merchant's evidence."""
        found = {**self.shop_files(shop), **files}
        key, at = shop.identity.key, self.now
        write_evidence(path, "merchant", shop.name, found, key, at, VERSION, CODE)

    def write_server(self, path: Path) -> None:
        """Write the coordinator's evidence."""
        found, key = self.server_files(), self.server.key
        write_evidence(path, "server", "coordinator", found, key, self.now, VERSION, CODE)

    def shop_files(self, shop: Shop) -> dict[str, bytes]:
        """Return the files of a merchant's evidence."""
        contracts = {
            f"contracts/{sha256}.toml": contract_toml(contract).encode()
            for sha256, contract in self.contracts.items()
        }
        return {
            "ledger.jsonl": ledger_jsonl(shop.entries),
            "witness.jsonl": lines(
                {"body": one.body.decode(), "signature": one.signature.hex()} for one in shop.seen
            ),
            "members.toml": tomli_w.dumps(self.members).encode(),
            "policy.json": json.dumps({**shop.policy, "min_cohort": 3}).encode(),
            **contracts,
        }

    def server_files(self) -> dict[str, bytes]:
        """Return the files of the coordinator's evidence."""
        files = {
            "members.toml": tomli_w.dumps(self.members).encode(),
            "witness.jsonl": lines(self.log),
        }
        for run, record in self.records.items():
            for contract in self.contracts.values():  # there is one
                files[f"runs/{run}/contract.toml"] = contract_toml(contract).encode()
            files[f"runs/{run}/run.jsonl"] = lines(record)
            if self.start is not None:
                files[f"runs/{run}/contract.start"] = self.start
            for name, content in self.bundles.get(run, {}).items():
                files[f"runs/{run}/bundle/{name}"] = content
        return files

    def witness_anew(self, shop: Shop) -> None:
        """Let a witness that colludes forget all, and countersign every entry of a ledger."""
        entries, shop.seen, at = list(shop.entries), [], self.now
        for number in range(1, len(entries) + 1):
            shop.entries = entries[:number]
            self.countersign(shop)
        self.now = at

    def run(
        self, name: str, folder: Path, *, settle: bool = True, lies: frozenset[str] = frozenset()
    ) -> None:
        """Carry out a whole run; `folder` is for the bundle's files on their way.

        A lie `overstated` counts the shop that dropped out of round 2; `unwritten` lets the first
        shop forget one release; `unasked` lets the coordinator forget the first of two attempts.
        """
        _Run(self, name, np.random.default_rng(len(self.records)), lies).carry_out(folder)
        for shop in self.shops:
            if settle:
                self.enter(shop, kind="settle", run=name)
            self.countersign(shop)


def lines(documents: Iterator[Document] | list[Document]) -> bytes:
    """Return a JSON-lines file."""
    return b"".join(json.dumps(document, sort_keys=True).encode() + b"\n" for document in documents)


def ledger_jsonl(entries: list[Entry]) -> bytes:
    """Return a ledger as evidence holds it."""
    return lines(
        {
            "seq": entry.seq,
            "body": entry.body.decode(),
            "link": entry.link.hex(),
            "signature": entry.signature.hex(),
        }
        for entry in entries
    )


def sha256_of(parameters: np.ndarray) -> str:
    """Return a model's hash."""
    return hashlib.sha256(parameters.astype("<f8").tobytes()).hexdigest()


def charged(shop: Shop) -> list[tuple[str, Event]]:
    """Return (run, event) of all that counts as spent, worked out the slow and simple way."""
    documents = shop.documents
    settled = {found["run"] for found in documents if found["kind"] == "settle"}
    spent = []
    for found in documents:
        if found["kind"] == "reserve" and found["run"] not in settled:
            spent += [(found["run"], from_document(item["event"])) for item in found["releases"]]
        if found["kind"] == "release" and found["run"] in settled:
            spent.append((found["run"], from_document(found["event"])))
    return spent


@dataclass
class _Run:
    world: World
    name: str
    random: np.random.Generator
    lies: frozenset[str]
    sums: int = 0
    per_merchant: float = 0.0

    def __post_init__(self) -> None:
        self.contract = self.world.contract
        self.plan = plan_of(self.contract)
        self.theta = starting_parameters(self.contract, self.world.start)
        self.outcome = Outcome(self.name, self.theta, 0.0)
        self.outcome.merchants = [shop.name for shop in self.world.shops]
        self.record: list[Document] = self.world.records.setdefault(self.name, [])
        self.roster = ""

    def carry_out(self, folder: Path) -> None:
        contract, outcome = self.contract, self.outcome
        self.world.contracts[contract.sha256] = contract
        self.begin()
        census = self.sum(CENSUS, 0, self.theta)
        outcome.customers = max(float(census.total[0]), 1.0)
        self.per_merchant = outcome.customers / len(census.merchants)
        optimizer = Optimizer(contract.training, self.theta)
        for number in range(1, contract.training.rounds + 1):
            if number == 2:
                self.sum(UPDATE, number, optimizer.theta, failed=True)
            update = self.sum(UPDATE, number, optimizer.theta, attempt=int(number == 2))
            optimizer.step(self.gradient(update))
            if number in evaluation_rounds(contract):
                found = self.sum(EVALUATION, number, optimizer.published)
                outcome.evaluations.append(found)
        outcome.parameters = optimizer.published
        self.record.append({"kind": "end", "parameters": sha256_of(outcome.parameters)})
        outcome.profile = self.sum(PROFILE, contract.training.rounds, outcome.parameters)
        self.publish(folder)

    def gradient(self, update: NoisySum) -> np.ndarray:
        if self.contract.training.mode == "local":
            return -update.total / len(update.merchants)
        return update.total / (self.per_merchant * len(update.merchants))

    def begin(self) -> None:
        self.record.append(
            {
                "kind": "start",
                "run": self.name,
                "contract": self.contract.sha256,
                "at": self.world.tick(),
                "merchants": self.outcome.merchants,
                "parameters": sha256_of(self.theta),
                "hansa": VERSION,
                "code": CODE,
            }
        )
        for shop in self.world.shops:
            self.reserve(shop)
            self.world.countersign(shop)
        if self.contract.aggregation.secure:
            self.session()

    def reserve(self, shop: Shop) -> None:
        shares = self.contract.exposed_contributors
        releases = []
        for release in self.plan.releases():
            count = release.event.count * release.times
            if count:
                towards = release.towards_server(shares)
                releases.append(
                    {
                        "stage": release.stage,
                        "event": to_document(replace(release.event, count=count)),
                        "towards_server": to_document(replace(towards, count=count)),
                    }
                )
        spent = [event for _, event in charged(shop)]
        new = [from_document(item["event"]) for item in releases]
        delta = shop.policy["delta"]
        self.world.enter(
            shop,
            kind="reserve",
            run=self.name,
            contract=self.contract.sha256,
            releases=releases,
            last=[PROFILE, self.contract.training.rounds],
            policy=dict(shop.policy),
            before=epsilon(spent, delta),
            after=epsilon([*spent, *new], delta),
            lifetime=epsilon([*spent, *new], delta),
            accountant="closed form",
            hansa=VERSION,
            code=CODE,
        )

    def session(self) -> None:
        context = session_context(self.name, 1, self.contract.sha256)
        adverts = []
        for shop in self.world.shops:
            keys = self.random.bytes(32), self.random.bytes(32)
            unsigned = Advert(shop.name, *keys, shop.link, b"")
            signature = shop.identity.sign(unsigned.signed(context))
            adverts.append(replace(unsigned, signature=signature))
        roster = Roster(context, tuple(adverts))
        self.roster = roster.hash.hex()
        self.record.append(
            {
                "kind": "session",
                "session": 1,
                "context": context.hex(),
                "adverts": [advert.to_bytes().hex() for advert in adverts],
            }
        )
        for shop in self.world.shops:
            count = len(self.world.shops)
            self.world.enter(
                shop, kind="join", run=self.name, session=1, roster=self.roster, members=count
            )

    def sum(
        self,
        stage: str,
        number: int,
        parameters: np.ndarray,
        *,
        attempt: int = 0,
        failed: bool = False,
    ) -> NoisySum:
        """Ask for a sum; where the number is even, the last shop releases and drops out."""
        release = self.plan.release_of(stage, number, self.contract.training.rounds)
        assert release is not None
        self.sums += 1
        names = self.outcome.merchants
        merchants = names[:-1] if number % 2 == 0 and number else names
        lattice = lattice_of(release, self.contract)
        values = self.random.uniform(50.0, 400.0, release.length)
        total = np.rint(values / lattice.step).astype(np.int64)
        occasion = {"stage": stage, "round": number, "attempt": attempt}
        shown = {"event": to_document(release.event), "parameters": sha256_of(parameters)}
        towards = to_document(release.towards_server(self.contract.exposed_contributors))
        forgetful = (
            {names[0]} if "unwritten" in self.lies and (stage, number) == (UPDATE, 3) else {}
        )
        for shop in self.world.shops:
            if shop.name in forgetful:
                continue
            self.world.enter(
                shop,
                kind="release",
                run=self.name,
                contract=self.contract.sha256,
                step=f"{self.roster}/{self.sums}" if self.roster else "",
                towards_server=towards,
                **occasion,
                **shown,
            )
        for shop in self.world.shops:
            if shop.name in {*merchants} - {*forgetful} and self.roster and not failed:
                told = {"survivors": len(merchants)}
                self.world.enter(shop, kind="sum", run=self.name, **occasion, **told)
        if "overstated" in self.lies:
            merchants = names
        if "unasked" in self.lies and failed:
            return NoisySum(stage, number, np.zeros(0), 1.0, (), {})
        self.record.append(
            {
                "kind": "sum",
                **occasion,
                **shown,
                "customers_per_merchant": self.per_merchant,
                "asked": names,
                "merchants": None if failed else merchants,
                "fewest": None if failed else len(merchants),
                "lattice_step": lattice.step,
                "total": None if failed else encoded(total),
            }
        )
        self.outcome.events.append((stage, release.event))
        self.outcome.survivors.append(None if failed else len(merchants))
        values = from_lattice(total, lattice.step)
        share = release.event.noise_multiplier * release.sensitivity
        stddev = share * np.sqrt(len(merchants) / self.contract.noise_contributors)
        return NoisySum(stage, number, values, float(stddev), tuple(merchants), {})

    def publish(self, folder: Path) -> None:
        outcome, contract = self.outcome, self.contract
        documents = {
            "privacy.json": privacy_document(outcome, contract),
            "metrics.json": metrics_document(outcome.evaluations[-1], contract),
            "segments.json": segments_document(outcome.profile, contract),
        }
        files = {name: json.dumps(document).encode() for name, document in documents.items()}
        tensors = {"parameters": outcome.parameters.astype(np.float32)}
        files["model.safetensors"] = save(tensors)
        files["contract.toml"] = contract_toml(contract).encode()
        self.world.bundles[self.name] = bundled(files, self.world.server, folder / self.name)


def bundled(files: Mapping[str, bytes], identity: Identity, folder: Path) -> dict[str, bytes]:
    """Return the files of a signed bundle."""
    names = [name for name in files if name != "manifest.json"]
    write_bundle(folder, {name: files[name] for name in names}, identity.key)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def encoded(total: np.ndarray) -> str:
    """Return a total as a record holds it."""
    return base64.b64encode(total.astype("<i8").tobytes()).decode()


def decoded(text: str) -> np.ndarray:
    """Read a total back."""
    return np.frombuffer(base64.b64decode(text), "<i8").copy()
