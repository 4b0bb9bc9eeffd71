"""Tests of the contract: every rule, its message, the hash, the round trip."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.contract import Contract, contract_toml, parse_contract, read_contract
from common.errors import ContractError

SHIPPED = sorted((Path(__file__).parents[2] / "hansa" / "contracts").glob("*.toml"))
DOCUMENT: dict[str, Any] = {
    "federation": {"name": "test", "min_merchants": 10},
    "features": [
        {"name": "spend", "high": 500.0, "transform": "log1p", "missing": 0},
        {"name": "member", "kind": "flag", "missing": "indicator"},
        {"name": "plan", "kind": "category", "categories": ["s", "m"]},
    ],
    "windows": {
        "features": ["2020-01-01", "2020-07-01"],
        "label": ["2020-07-01", "2020-10-01"],
    },
    "segments": {"names": ["x", "y", "z"]},
    "model": {},
    "training": {},
    "privacy": {"epsilon": 1.0, "delta": 1e-5, "split": {}},
    "aggregation": {},
    "publication": {},
}
LOCAL = {"mode": "local"}
SPEND = {"source": "spend"}


def changed(path: str, value: Any) -> dict[str, Any]:
    """Return the document with one key set; `None` takes it away."""
    document = copy.deepcopy(DOCUMENT)
    place: Any = document
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parents:
        place = place[part]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return document


def contract_of(**sections: Any) -> Contract:
    """Build the contract with whole sections replaced."""
    return parse_contract({**DOCUMENT, **sections}, source="c.toml")


class TestRules:
    """What a contract must not say."""

    @pytest.mark.parametrize(
        ("path", "value", "key", "says"),
        [
            ("federation.name", "", "federation.name", "at least 1 character"),
            ("federation.name", None, "federation.name", "required"),
            ("federation.min_merchants", 0, "federation.min_merchants", "greater than or equal"),
            ("federation.round_timeout_s", 0, "federation.round_timeout_s", "greater than 0"),
            ("federation.round_timeout_s", float("inf"), "federation.round_timeout_s", "finite"),
            ("format", 2, "format", "should be 1"),
            ("features", [], "features", "at least 1 item"),
            ("features.0.name", "member", "(whole file)", "used more than once"),
            ("features.0.kind", "text", "features.0.kind", "'number', 'flag' or 'category'"),
            ("features.0.high", 0.0, "features.0", "expected low < high, got low=0.0"),
            ("features.0.high", float("nan"), "features.0.high", "finite"),
            ("features.0.low", -1.0, "features.0", "needs low >= 0"),
            ("features.0.missing", float("inf"), "features.0.missing.float", "finite"),
            ("features.0.categories", ["a", "b"], "features.0", "of kind 'category' only"),
            ("features.0.measure", "age", "features.0", "unknown measure 'age'"),
            ("features.0.measure", "spend_last", "features.0", "needs a number of days"),
            ("features.0.measure", "spend_last:0", "features.0", "needs a number of days"),
            ("features.0.measure", "category_share", "features.0", "needs a category"),
            ("features.1.transform", "sqrt", "features.1", "of kind 'number' only"),
            ("features.2.categories", ["s"], "features.2", "at least two different"),
            ("features.2.categories", ["s", "s"], "features.2", "at least two different"),
            ("features.2.missing", 1.0, "features.2", "not as a number"),
            ("windows.label", ["2020-06-01", "2020-10-01"], "windows", "before the feature"),
            ("windows.label", ["2020-10-01", "2020-10-01"], "windows", "must start before"),
            ("windows.features", ["2020-13-01", "2020-10-01"], "windows.features.0", "date"),
            ("segments.names", ["x"], "segments.names", "at least 2 items"),
            ("segments.names", ["x", "x"], "segments", "must differ"),
            ("segments.actions", ["x"], "segments", "as many as"),
            ("segments", {**SPEND, "names": ["a", "b"]}, "segments", "2 segments need 1 cuts"),
            (
                "segments",
                {**SPEND, "names": ["a", "b", "c"], "cuts": [2, 1]},
                "segments",
                "cuts must rise",
            ),
            ("model.hidden", [], "model", "at least one hidden layer"),
            ("model.hidden", [0], "model.hidden.0", "greater than or equal to 1"),
            ("model.hidden", [1] * 9, "model.hidden", "at most 8 items"),
            ("model.family", "lstm", "model.family", "'mlp' or 'linear'"),
            ("training.rounds", 0, "training.rounds", "greater than or equal to 1"),
            ("training.sampling_rate", 0.5, "training", "takes all customers"),
            ("training.local_steps", 2, "training", "belong to mode 'local'"),
            ("training.proximal", 0.1, "training", "belong to mode 'local'"),
            ("training", {**LOCAL, "sampling_rate": 0.0}, "training.sampling_rate", "greater than"),
            ("training", {**LOCAL, "sampling_rate": 1.1}, "training.sampling_rate", "less than"),
            ("training.momentum", 0.9, "training", "belongs to optimizer 'sgd'"),
            ("training", {**LOCAL, "proximal": 1.0}, "training", "must be below 1"),
            ("training.local_optimizer", "adam", "training", "belong to mode 'local'"),
            ("training.local_momentum", 0.5, "training", "belong to mode 'local'"),
            (
                "training",
                {**LOCAL, "local_optimizer": "adam", "local_momentum": 0.5},
                "training",
                "local_momentum belongs to local_optimizer 'sgd'",
            ),
            (
                "training",
                {**LOCAL, "local_optimizer": "yogi"},
                "training.local_optimizer",
                "'sgd' or 'adam'",
            ),
            ("training", {**LOCAL, "local_momentum": 1.0}, "training.local_momentum", "less than"),
            (
                "training",
                {**LOCAL, "local_momentum": -0.1},
                "training.local_momentum",
                "greater than or",
            ),
            ("training.held_out", 1.0, "training.held_out", "less than 1"),
            ("privacy.epsilon", 0.0, "privacy.epsilon", "greater than 0"),
            ("privacy.epsilon", 101.0, "privacy.epsilon", "less than or equal to 100"),
            ("privacy.epsilon", float("nan"), "privacy.epsilon", "got nan"),
            ("privacy.delta", 0.02, "privacy.delta", "less than or equal to 0.01"),
            ("privacy.delta", 1e-13, "privacy.delta", "greater than or equal"),
            ("privacy.clip_norm", float("inf"), "privacy.clip_norm", "finite"),
            ("privacy.split.training", 0.5, "privacy.split", "must add up to 1, got 0.62"),
            ("privacy.split.census", 0.0, "privacy.split.census", "greater than 0"),
            ("aggregation.secure", "yes", "aggregation.secure", "valid boolean"),
            ("aggregation.ring_bits", 16, "aggregation.ring_bits", "32 or 64"),
            ("aggregation.max_customers", 0, "aggregation.max_customers", "greater than"),
            ("aggregation.max_customers", 10**13, "aggregation.max_customers", "less than"),
            ("aggregation.min_survivors", 1, "(whole file)", "must lie between 2 and 200"),
            ("federation.min_merchants", 1, "(whole file)", "hides nothing of a single merchant"),
            ("aggregation.min_survivors", 11, "(whole file)", "larger than"),
            ("aggregation.colluders", 9, "(whole file)", "smaller than min_survivors"),
            ("publication.evaluate_every", 0, "publication.evaluate_every", "greater than or"),
        ],
    )
    def test_broken(self, path: str, value: Any, key: str, says: str) -> None:
        """A broken rule is told with file, key and what was expected."""
        with pytest.raises(ContractError) as caught:
            parse_contract(changed(path, value), source="c.toml")
        assert f"c.toml: {key}: " in str(caught.value)
        assert says in str(caught.value)

    @pytest.mark.parametrize(
        "path", ["x", "federation.x", "features.1.x", "privacy.split.x", "training.Rounds"]
    )
    def test_unknown_key(self, path: str) -> None:
        """A misspelt key is never ignored, in any section."""
        with pytest.raises(ContractError, match=f"{path}: this key is not known"):
            parse_contract(changed(path, 1), source="c.toml")

    def test_got(self) -> None:
        """The message repeats what was found."""
        with pytest.raises(ContractError, match="got -3"):
            parse_contract(changed("training.rounds", -3), source="c.toml")

    def test_all_findings(self) -> None:
        """Several faults are told at once, one a line."""
        document = changed("training.rounds", 0)
        document["privacy"] = {"epsilon": 0, "delta": 1e-5}
        with pytest.raises(ContractError) as caught:
            parse_contract(document, source="c.toml")
        assert len(str(caught.value).splitlines()) == 2

    def test_spend_needs_windows(self) -> None:
        """Labels from spend need a label window."""
        document = changed("windows", None)
        document["segments"] = {**SPEND, "names": ["a", "b"], "cuts": [1]}
        with pytest.raises(ContractError, match=r"needs a \[windows\] section"):
            parse_contract(document, source="c.toml")


class TestDerived:
    """Values that follow from the contract."""

    def test_inputs(self) -> None:
        """One a number, two a flag with indicator, one a category's value."""
        assert contract_of().inputs == 1 + 2 + 2

    @pytest.mark.parametrize(("merchants", "expected"), [(1, 1), (2, 1), (10, 9), (19, 17)])
    def test_default_survivors(self, merchants: int, expected: int) -> None:
        """Nine tenths, rounded down, at least one where sums are plain."""
        federation = {"name": "t", "min_merchants": merchants}
        found = contract_of(federation=federation, aggregation={"secure": False})
        assert found.min_survivors == expected

    @pytest.mark.parametrize(
        ("merchants", "expected"),
        [(2, 2), (3, 2), (10, 9), (19, 17), (200, 180), (201, 90), (250, 112), (1000, 180)],
    )
    def test_default_survivors_of_secure_sums(self, merchants: int, expected: int) -> None:
        """Nine tenths of a group of at most 200, rounded down, at least two."""
        federation = {"name": "t", "min_merchants": merchants}
        assert contract_of(federation=federation).min_survivors == expected

    @pytest.mark.parametrize(("survivors", "fits"), [(200, True), (201, False)])
    def test_survivors_of_secure_sums_fit_into_a_group(self, survivors: int, fits: bool) -> None:
        """More merchants than one secure sum holds cannot be asked for; in plain sums they can."""
        sections = {
            "federation": {"name": "t", "min_merchants": 300},
            "aggregation": {"min_survivors": survivors},
        }
        if fits:
            assert contract_of(**sections).min_survivors == survivors
        else:
            with pytest.raises(ContractError, match="must lie between 2 and 200"):
                contract_of(**sections)
        sections["aggregation"]["secure"] = False
        assert contract_of(**sections).min_survivors == survivors

    @pytest.mark.parametrize(("merchants", "expected"), [(2, 200), (50, 200), (51, 204), (1, 200)])
    def test_room_for_merchants(self, merchants: int, expected: int) -> None:
        """The ring has room for four times the merchants, and for 200 at least."""
        federation = {"name": "t", "min_merchants": merchants}
        found = contract_of(federation=federation, aggregation={"secure": False})
        assert found.max_merchants == expected

    def test_exposed_contributors(self) -> None:
        """A coordinator that sees single messages sees one share; of secure sums the whole."""
        aggregation = {"min_survivors": 8, "colluders": 3}
        assert contract_of(aggregation=aggregation).exposed_contributors == 1
        plain = contract_of(aggregation={**aggregation, "secure": False})
        assert plain.exposed_contributors == plain.noise_contributors == 5

    def test_noise_contributors(self) -> None:
        """Shares counted on are survivors less colluders; one in mode 'local'."""
        aggregation = {"min_survivors": 8, "colluders": 3}
        assert contract_of(aggregation=aggregation).noise_contributors == 5
        assert contract_of(aggregation=aggregation, training=LOCAL).noise_contributors == 1

    @pytest.mark.parametrize(("mode", "expected"), [("distributed", 0.1), ("local", 0.03)])
    def test_step_size(self, mode: str, expected: float) -> None:
        """The learning rate's default follows the mode, and what is stated wins."""
        assert contract_of(training={"mode": mode}).training.step_size == expected
        stated = contract_of(training={"mode": mode, "learning_rate": 0.5})
        assert stated.training.step_size == 0.5


class TestHash:
    """Contract.sha256."""

    def test_order_of_keys_does_not_matter(self) -> None:
        """The same contract in another order has the same hash."""
        reordered = json.loads(json.dumps(DOCUMENT, sort_keys=True))
        backwards = dict(reversed(reordered.items()))
        assert parse_contract(backwards, source="x").sha256 == contract_of().sha256

    def test_spelled_out_defaults_do_not_matter(self) -> None:
        """Writing a default down changes nothing."""
        stated = parse_contract(changed("training.rounds", 60), source="x")
        assert stated.sha256 == contract_of().sha256

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            ("federation.name", "Test"),
            ("federation.version", 2),
            ("features.0.high", 501.0),
            ("features.0.description", "x"),
            ("features.2.categories", ["m", "s"]),
            ("windows.label", ["2020-07-01", "2020-10-02"]),
            ("segments.names", ["x", "z", "y"]),
            ("training.rounds", 61),
            ("training.split_seed", 1),
            ("privacy.delta", 1.0000000001e-5),
            ("aggregation.min_survivors", 9),
            ("aggregation.secure", False),
            ("aggregation.ring_bits", 64),
            ("aggregation.max_customers", 999_999),
            ("publication.profiles", False),
        ],
    )
    def test_any_change_matters(self, path: str, value: Any) -> None:
        """Every change gives another hash."""
        assert parse_contract(changed(path, value), source="x").sha256 != contract_of().sha256

    @given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=30), st.floats(1e-12, 0.01))
    def test_toml_keeps_it(self, name: str, delta: float) -> None:
        """Written as TOML and read again, any contract has the same hash."""
        import tomllib

        contract = contract_of(federation={"name": name}, privacy={"epsilon": 1.0, "delta": delta})
        back = parse_contract(tomllib.loads(contract_toml(contract)), source="x")
        assert back.sha256 == contract.sha256

    @pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
    def test_shipped_contracts(self, path: Path, tmp_path: Path) -> None:
        """Every shipped contract is valid, and its full form has the same hash."""
        contract = read_contract(path)
        (tmp_path / "full.toml").write_text(contract_toml(contract), encoding="utf-8")
        assert read_contract(tmp_path / "full.toml").sha256 == contract.sha256


class TestRead:
    """read_contract."""

    def test_missing(self, tmp_path: Path) -> None:
        """A missing file is named."""
        with pytest.raises(ContractError, match=r"c\.toml: there is no such contract file"):
            read_contract(tmp_path / "c.toml")

    def test_folder(self, tmp_path: Path) -> None:
        """A folder is not read."""
        with pytest.raises(ContractError, match="cannot be read"):
            read_contract(tmp_path)

    @pytest.mark.parametrize(
        ("content", "says"), [(b"\xff\xfe", "UTF-8"), (b"a = ", "not valid TOML")]
    )
    def test_no_toml(self, tmp_path: Path, content: bytes, says: str) -> None:
        """Bytes that are no TOML are refused in words."""
        (tmp_path / "c.toml").write_bytes(content)
        with pytest.raises(ContractError, match=says):
            read_contract(tmp_path / "c.toml")


class TestRevised:
    """Contract.revised."""

    def test_changes_only_what_is_named(self) -> None:
        """A revision is a valid contract of its own."""
        revised = contract_of().revised(privacy={"epsilon": 2.0})
        assert (revised.privacy.epsilon, revised.privacy.delta) == (2.0, 1e-5)

    def test_is_checked(self) -> None:
        """A revision cannot break a rule."""
        with pytest.raises(ContractError, match=r"revised contract: privacy\.epsilon"):
            contract_of().revised(privacy={"epsilon": -2.0})
