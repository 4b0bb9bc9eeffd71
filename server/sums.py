"""How the coordinator gets one sum over the cohort: plainly, or without seeing its parts.

Both ways return the same multiples of the lattice step for the same answers.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from jaxtyping import Int, UInt

from common.chain import Head
from common.contract import MAX_COHORT, Contract
from common.errors import SecureSumError, WireError
from common.fixed_point import Lattice
from common.plan import CENSUS, EVALUATION, PROFILE, UPDATE
from common.session import Advert, occasion_hash, session_context
from common.wire import (
    Advertise,
    Advertised,
    Confirm,
    Confirmed,
    Record,
    Reveal,
    Revealed,
    Share,
    Shared,
    SumAnswer,
    SumRequest,
    pack,
    unpack,
)
from server.archive import RunRecord
from server.cohort import Cohort
from server.secure_sum import CoordinatorSession, groups

MESSAGE_TYPES = {
    CENSUS: "query.census",
    UPDATE: "train.update",
    EVALUATION: "evaluate.confusion",
    PROFILE: "query.profile",
}
_RENEWAL_STEPS = 10  # a session that lost members is set up anew after so many steps
Answer = TypeVar("Answer", Advertised, Shared, SumAnswer, Confirmed, Revealed)


@dataclass(frozen=True)
class LatticeSum:
    """A sum over the merchants that answered, in multiples of the lattice step."""

    total: Int[np.ndarray, " P"]
    merchants: tuple[str, ...]
    fewest: int  # merchants in the smallest part that was summed apart
    parts: dict[str, Int[np.ndarray, " P"]] = field(default_factory=dict)  # plain sums only


Ask = Callable[[SumRequest, int, Lattice], LatticeSum | None]  # (request, length, lattice)


class PlainSums:
    """Asks for vectors and adds them up; the coordinator sees each of them."""

    def __init__(self, cohort: Cohort, contract: Contract, run: str) -> None:
        self._cohort = cohort
        self._contract = contract
        self._run = run
        self._reserved: set[int] = set()  # nodes whose ledgers were countersigned
        self._asked = 0

    def ask(self, request: SumRequest, length: int, lattice: Lattice) -> LatticeSum | None:
        """Return the sum; None where too few merchants answered.

        Raises:
            SecureSumError: Nobody could be asked; nothing is spent.
        """
        if self._asked % _RENEWAL_STEPS == 0 or len(self._ready) < self._contract.min_survivors:
            self._reserve()
        if len(self._ready) < self._contract.min_survivors:
            raise SecureSumError("too few merchants reserved what the run costs; nobody was asked")
        self._asked += 1
        contents = {
            node: pack(replace(request, countersigned=self._cohort.countersigned(node)))
            for node in self._ready
        }
        records = self._cohort.ask(MESSAGE_TYPES[request.stage], contents)
        vectors = {
            self._cohort.members[node]: answer.vector
            for node, answer in _answers(self._cohort, records, length, lattice).items()
        }
        if len(vectors) < self._contract.min_survivors:
            return None
        parts = {merchant: lattice.from_ring(vector) for merchant, vector in vectors.items()}
        total = np.sum(list(vectors.values()), axis=0, dtype=lattice.dtype)
        return LatticeSum(lattice.from_ring(total), tuple(parts), len(parts), parts)

    @property
    def _ready(self) -> list[int]:
        """Nodes that take part and may be asked."""
        return sorted(self._reserved & self._cohort.members.keys())

    def _reserve(self) -> None:
        """Let merchants that did not yet reserve what the run costs, and see their ledgers."""
        contents = {
            node: pack(Advertise(self._run, self._contract.sha256, 0, self._cohort.renewed(node)))
            for node in sorted(self._cohort.members.keys() - self._reserved)
        }
        for node, _ in _usable(self._cohort, "query.advertise", contents, Advertised):
            self._reserved.add(node)


@dataclass
class _Group:
    """Merchants that are summed together, and their session."""

    number: int
    session: CoordinatorSession
    nodes: list[int]  # in the order of the roster
    steps: int = 0

    def at(self, positions: Iterable[int]) -> list[int]:
        """Return the nodes at some positions."""
        return [self.nodes[position] for position in positions]


class SecureSums:
    """Asks for masked vectors; the coordinator sees their sum over a group, and nothing else."""

    def __init__(self, cohort: Cohort, contract: Contract, run: str, record: RunRecord) -> None:
        self._cohort = cohort
        self._contract = contract
        self._run = run
        self._record = record
        self._sessions = 0
        self._groups: list[_Group] = []
        self._left_over = 0  # merchants that no group has room for
        self._liars: set[str] = set()  # merchants that a third of their group or more accuse

    def ask(self, request: SumRequest, length: int, lattice: Lattice) -> LatticeSum | None:
        """Return the sum over all groups that could be unmasked; None where there is none.

        Raises:
            SecureSumError: Nobody could be asked; nothing is spent.
        """
        if self._stale():
            self._set_up()
        occasion = occasion_hash(
            request.stage,
            request.round,
            request.attempt,
            request.customers_per_merchant,
            request.parameters,
        )
        under_way = [
            group for group in self._groups if self._begun(group, occasion, length, lattice)
        ]
        if not under_way:
            raise SecureSumError("too few merchants are in a session; nobody was asked")
        self._collect(under_way, request, length, lattice)
        under_way = self._confirm(under_way)
        return self._unmasked(self._reveal(under_way), lattice)

    def _stale(self) -> bool:
        """Tell whether sessions are missing, too small, or without members that came back."""
        if not self._groups:
            return True
        ready = [len(group.session.ready) for group in self._groups]
        if any(
            count < group.session.needed for count, group in zip(ready, self._groups, strict=True)
        ):
            return True
        missing = len(self._present()) - sum(ready) - self._left_over
        return missing > 0 and min(group.steps for group in self._groups) >= _RENEWAL_STEPS

    def _set_up(self) -> None:
        """Set up a session for every group of merchants that are there."""
        nodes = self._present()
        divided = groups(nodes, MAX_COHORT, self._contract.min_survivors)
        self._groups = []
        for names in divided:
            self._sessions += 1
            group = self._advertised(self._sessions, [nodes[name] for name in names])
            if group is not None:
                self._groups.append(group)
        rest = nodes.keys() - {name for names in divided for name in names}
        self._left_over = len(rest)
        for name in rest:
            self._cohort.failures[name] = "left over when merchants were divided into groups"

    def _present(self) -> dict[str, int]:
        """Return merchant -> node of all that take part and were not found to lie."""
        members = self._cohort.members.items()
        return {merchant: node for node, merchant in members if merchant not in self._liars}

    def _put_out_liars(self, group: _Group) -> None:
        """Go on without a member that a third of its group or more accuse: not all of them lie."""
        names = {advert.merchant for advert in group.session.roster.adverts}
        for name in names & self._cohort.accusers.keys():
            if len(self._cohort.accusers[name] & names) > (len(names) - 1) // 3:
                self._liars.add(name)
                group.session.put_out(name)

    def _advertised(self, number: int, nodes: list[int]) -> _Group | None:
        """Collect keys, show them to everybody, and collect the first shares."""
        run, sha256, cohort = self._run, self._contract.sha256, self._cohort
        context = session_context(run, number, sha256)
        session = CoordinatorSession(context, cohort.enrolled, self._contract.min_survivors)
        joined: dict[str, int] = {}

        def advertised(node: int, answer: Advertised) -> None:
            if Advert.from_bytes(answer.advert).head != Head.from_bytes(answer.head).link:
                raise WireError("field 'advert': is bound to another head than the ledger's")
            name = session.take_advert(answer.advert, cohort.members[node])
            joined[name] = node

        contents = {
            node: pack(Advertise(run, sha256, number, cohort.renewed(node))) for node in nodes
        }
        self._stage("query.advertise", contents, Advertised, advertised)
        try:
            roster = session.close_roster()
        except SecureSumError as error:
            cohort.failures[f"session {number}"] = str(error)
            return None
        self._record.session(number, context, roster)
        order = [joined[name] for name in sorted(joined)]
        positions = {node: position for position, node in enumerate(order)}
        contents = {
            node: pack(Share(run, sha256, number, cohort.countersigned(node), roster))
            for node in order
        }
        self._stage(
            "query.share",
            contents,
            Shared,
            lambda node, answer: session.take_escrow(positions[node], answer.escrow),
        )
        return _Group(number, session, order)

    def _begun(self, group: _Group, occasion: bytes, length: int, lattice: Lattice) -> bool:
        try:
            group.session.begin(occasion, length, lattice.dtype)
        except SecureSumError as error:
            self._note(group, error)
            return False
        group.steps += 1
        return True

    def _collect(
        self, under_way: list[_Group], request: SumRequest, length: int, lattice: Lattice
    ) -> None:
        """Ask all active members of all groups for masked vectors and add them up."""
        places = self._places(under_way)
        contents = {}
        for node, (group, position) in places.items():
            active, boxes = group.session.request(position)
            contents[node] = pack(
                replace(
                    request,
                    session=group.number,
                    step=group.session.step,
                    active=active,
                    boxes=boxes,
                    countersigned=self._cohort.countersigned(node),
                )
            )
        records = self._cohort.ask(MESSAGE_TYPES[request.stage], contents)
        for node, answer in _answers(self._cohort, records, length, lattice).items():
            group, position = places[node]
            try:
                group.session.take_masked(position, answer.vector, answer.escrow)
            except WireError as error:
                self._cohort.failures[self._cohort.name(node)] = str(error)
        for group in under_way:
            self._put_out_liars(group)

    def _confirm(self, under_way: list[_Group]) -> list[_Group]:
        """Let survivors vouch for the set of survivors; return the groups that go on."""
        contents, going = {}, []
        for group in under_way:
            try:
                content = pack(Confirm(group.number, group.session.step, group.session.close_sum()))
            except SecureSumError as error:
                self._note(group, error)
                continue
            going.append(group)
            contents.update(dict.fromkeys(group.at(group.session.survivors), content))
        places = self._places(going)

        def confirmed(node: int, answer: Confirmed) -> None:
            group, position = places[node]
            group.session.take_confirmations(position, answer.confirmations)

        self._stage("query.confirm", contents, Confirmed, confirmed)
        return going

    def _reveal(self, under_way: list[_Group]) -> list[_Group]:
        """Hand round the confirmations and collect shares; return the groups that go on."""
        asked: dict[int, tuple[_Group, int]] = {}
        going = []
        for group in under_way:
            try:
                confirmed = group.session.confirmed
            except SecureSumError as error:
                self._note(group, error)
                continue
            going.append(group)
            asked |= {group.nodes[position]: (group, position) for position in confirmed}
        places = dict(asked)

        def revealed(node: int, answer: Revealed) -> None:
            group, position = places[node]
            group.session.take_shares(position, answer.shares)

        wrong: dict[int, set[str]] = {node: set() for node in asked}
        for node, known in wrong.items():
            self._accuses(node, known)
        while asked:  # who finds a confirmation wrong is asked again without it
            contents = {
                node: pack(
                    Reveal(
                        group.number,
                        group.session.step,
                        *group.session.confirmations_for(position, wrong[node]),
                    )
                )
                for node, (group, position) in asked.items()
            }
            self._stage("query.reveal", contents, Revealed, revealed)
            asked = {node: asked[node] for node in asked if self._accuses(node, wrong[node])}
        for group in going:
            self._put_out_liars(group)
        return going

    def _accuses(self, node: int, known: set[str]) -> bool:
        """Tell whether a merchant accuses a member that it did not accuse before; note whom.

        It is heard as long as it accuses no more than the third that may lie.
        """
        name, members = self._cohort.name(node), set(self._cohort.members.values())
        accusers = self._cohort.accusers
        new = {liar for liar in accusers.keys() & members if name in accusers[liar]} - known
        known |= new
        return bool(new) and len(known) <= (len(members) - 1) // 3

    def _note_conflicts(self, group: _Group) -> None:
        """Count two members that left different keys of their pair as accusing each other."""
        adverts = group.session.roster.adverts
        for one, other in group.session.conflicts:
            names = adverts[one].merchant, adverts[other].merchant
            self._cohort.accusers.setdefault(names[0], set()).add(names[1])
            self._cohort.accusers.setdefault(names[1], set()).add(names[0])
        group.session.conflicts.clear()
        self._put_out_liars(group)

    def _unmasked(self, under_way: list[_Group], lattice: Lattice) -> LatticeSum | None:
        totals: list[UInt[np.ndarray, " P"]] = []
        counts: list[int] = []
        merchants: list[str] = []
        for group in under_way:
            survivors = group.session.survivors
            counts.append(len(survivors))  # of a group that fails, too: its members counted on it
            try:
                totals.append(group.session.total())
            except SecureSumError as error:
                self._note(group, error)
                continue
            finally:
                self._cohort.failures.update(group.session.blamed)
                self._note_conflicts(group)
            merchants += [group.session.roster.adverts[i].merchant for i in survivors]
        if not totals:
            return None
        total = np.zeros_like(lattice.from_ring(totals[0]))
        for part in totals:
            total += lattice.from_ring(part)
        return LatticeSum(total, tuple(sorted(merchants)), min(counts))

    def _places(self, under_way: list[_Group]) -> dict[int, tuple[_Group, int]]:
        """Return node -> (group, position) of all active members."""
        return {
            group.nodes[position]: (group, position)
            for group in under_way
            for position in group.session.active
        }

    def _stage(
        self,
        message_type: str,
        contents: dict[int, Record],
        kind: type[Answer],
        take: Callable[[int, Answer], None],
    ) -> None:
        """Ask, and hand over each usable answer; note what is wrong with the others."""
        for node, answer in _usable(self._cohort, message_type, contents, kind):
            try:
                take(node, answer)
            except WireError as error:
                self._cohort.failures[self._cohort.name(node)] = str(error)

    def _note(self, group: _Group, error: SecureSumError) -> None:
        self._cohort.failures[f"secure sum {group.number}.{group.steps}"] = str(error)


def _usable(
    cohort: Cohort, message_type: str, contents: dict[int, Record], kind: type[Answer]
) -> Iterator[tuple[int, Answer]]:
    """Ask, and yield each usable answer; note what is wrong with the others."""
    answers: dict[int, Answer] = {}
    for node, record in cohort.ask(message_type, contents).items():
        try:
            answer = unpack(kind, record)
            _check_name(cohort, node, answer.merchant)
        except WireError as error:
            cohort.failures[cohort.name(node)] = str(error)
            continue
        answers[node] = answer
    if kind in {Advertised, Shared}:
        answers = cohort.witnessed(answers)
    yield from answers.items()


def _answers(
    cohort: Cohort, records: dict[int, Record], length: int, lattice: Lattice
) -> dict[int, SumAnswer]:
    """Return the usable answers by node; go on without merchants that refused."""
    found = {}
    for node, record in records.items():
        try:
            answer = unpack(SumAnswer, record)
            _check_name(cohort, node, answer.merchant)
            if answer.refusal:
                cohort.dismiss(node, answer.refusal)
                continue
            _check_vector(answer.vector, length, lattice)
        except WireError as error:
            cohort.failures[cohort.name(node)] = str(error)
            continue
        found[node] = answer
    return cohort.witnessed(found)


def _check_name(cohort: Cohort, node: int, merchant: str) -> None:
    if merchant != cohort.members[node]:
        raise WireError("field 'merchant': differs from what the node attested")


def _check_vector(vector: np.ndarray, length: int, lattice: Lattice) -> None:
    if vector.shape != (length,) or vector.dtype != lattice.dtype:
        raise WireError(
            f"field 'vector': expected {length} numbers of type {lattice.dtype.__name__}"
        )
