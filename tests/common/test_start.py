"""Tests of where training starts: by the contract's hash, and by nobody's word."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from common.contract import Contract, parse_contract
from common.errors import ContractError
from common.network import MAX_PARAMETER, initial_parameters, network_of, parameters_sha256
from common.start import read_start, start_path, starting_parameters, to_bytes


@pytest.fixture
def cold() -> Contract:
    """Give a small contract that names no start."""
    return parse_contract(
        {
            "federation": {"name": "test"},
            "features": [{"name": "spend", "high": 5000.0}],
            "segments": {"names": ["low", "high"]},
            "model": {"family": "linear"},
            "privacy": {"epsilon": 1.0, "delta": 1e-5},
        },
        source="test",
    )


def naming(contract: Contract, content: bytes) -> Contract:
    """Return a contract that starts from some bytes, whatever they are."""
    return contract.revised(model={"start": hashlib.sha256(content).hexdigest()})


THETA = np.array([0.5, -1.0, 0.25, 3.0])


class TestStartingParameters:
    """starting_parameters."""

    def test_nothing_named(self, cold: Contract) -> None:
        """What the hash gives, whatever lies beside the contract."""
        expected = initial_parameters(cold)
        for content in (None, b"", to_bytes(THETA)):
            assert np.array_equal(starting_parameters(cold, content), expected)

    def test_what_is_named(self, cold: Contract) -> None:
        """The very parameters, whose hash is that of the file."""
        content = to_bytes(THETA)
        contract = naming(cold, content)
        assert contract.model.start == parameters_sha256(THETA)
        found = starting_parameters(contract, content)
        assert found.tolist() == THETA.tolist()
        found += 1.0  # its own memory

    def test_missing(self, cold: Contract) -> None:
        """Says which hash is looked for, and what to do."""
        contract = naming(cold, to_bytes(THETA))
        with pytest.raises(ContractError, match=r"contract\.start: is missing.*put the file"):
            starting_parameters(contract, None)

    @pytest.mark.parametrize("bytes_", [0, 8, 31, 33, 40])
    def test_another_size(self, cold: Contract, bytes_: int) -> None:
        """Refused by size, before anything is made of it."""
        content = bytes(bytes_)
        with pytest.raises(ContractError, match="expected 32 bytes, 4 parameters"):
            starting_parameters(naming(cold, content), content)

    @pytest.mark.parametrize("place", [0, 7, 31])
    @pytest.mark.parametrize("bit", [0, 7])
    def test_one_bit_swapped(self, cold: Contract, place: int, bit: int) -> None:
        """The smallest change after the contract was signed."""
        content = bytearray(to_bytes(THETA))
        contract = naming(cold, bytes(content))
        content[place] ^= 1 << bit
        with pytest.raises(ContractError, match="it was changed, or is another contract's"):
            starting_parameters(contract, bytes(content))

    @pytest.mark.parametrize(
        "value", [np.nan, -np.nan, np.inf, -np.inf, 1.1 * MAX_PARAMETER, -1e300]
    )
    def test_numbers_that_no_merchant_accepts(self, cold: Contract, value: float) -> None:
        """Refused though the contract names them, before anybody pays for a census."""
        content = to_bytes(np.array([0.0, value, 0.0, 0.0]))
        with pytest.raises(ContractError, match="not finite, or beyond"):
            starting_parameters(naming(cold, content), content)

    def test_the_largest_that_merchants_accept(self, cold: Contract) -> None:
        """The bound is theirs."""
        content = to_bytes(np.full(4, -MAX_PARAMETER))
        assert starting_parameters(naming(cold, content), content)[0] == -MAX_PARAMETER


class TestReadStart:
    """read_start."""

    def test_beside_the_contract(self, cold: Contract, tmp_path: Path) -> None:
        """By the contract's own name."""
        content = to_bytes(THETA)
        (tmp_path / "shoes.start").write_bytes(content)
        assert read_start(tmp_path / "shoes.toml", naming(cold, content)) == content

    def test_not_named_is_not_read(self, cold: Contract, tmp_path: Path) -> None:
        """A file that the contract does not speak of is nobody's."""
        (tmp_path / "contract.start").write_bytes(b"nonsense")
        assert read_start(tmp_path / "contract.toml", cold) is None

    def test_missing(self, cold: Contract, tmp_path: Path) -> None:
        """Names the place."""
        with pytest.raises(ContractError, match=str(tmp_path / "contract.start")):
            read_start(tmp_path / "contract.toml", naming(cold, to_bytes(THETA)))

    def test_a_folder(self, cold: Contract, tmp_path: Path) -> None:
        """What cannot be read is told."""
        (tmp_path / "contract.start").mkdir()
        with pytest.raises(ContractError, match="cannot be read"):
            read_start(tmp_path / "contract.toml", naming(cold, to_bytes(THETA)))

    def test_a_huge_file_is_not_read_whole(self, cold: Contract, tmp_path: Path) -> None:
        """One byte more than expected is enough to know."""
        with (tmp_path / "contract.start").open("wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(ContractError, match="got more than 32"):
            read_start(tmp_path / "contract.toml", naming(cold, to_bytes(THETA)))

    def test_path(self) -> None:
        """Beside the contract."""
        assert start_path(Path("a/contract.toml")) == Path("a/contract.start")


class TestContract:
    """model.start."""

    def test_a_contract_without_keeps_its_hash(self, cold: Contract) -> None:
        """Keys that came later: merchants that signed before them need not sign anew."""
        document = cold.model_dump(mode="json")
        del document["model"]["start"]
        del document["training"]["local_optimizer"], document["training"]["local_momentum"]
        old = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        assert cold.sha256 == hashlib.sha256(old.encode()).hexdigest()

    def test_another_start_is_another_contract(self, cold: Contract) -> None:
        """Nobody can exchange it under the same hash."""
        found = {naming(cold, bytes([n])).sha256 for n in range(5)} | {cold.sha256}
        assert len(found) == 6

    @pytest.mark.parametrize("start", ["", "ab", "AB" * 32, "zz" * 32, "ab" * 33])
    def test_no_hash(self, cold: Contract, start: str) -> None:
        """Lower-case hexadecimal digits, so that one hash has one spelling."""
        with pytest.raises(ContractError, match=r"model\.start"):
            cold.revised(model={"start": start})

    def test_another_model_starts_anew(self, cold: Contract) -> None:
        """Parameters are a model's own; whatever else changes, they stay."""
        contract = naming(cold, to_bytes(THETA))
        assert contract.revised(training={"rounds": 3}).model.start == contract.model.start
        assert contract.revised(model={"family": "mlp"}).model.start is None
        assert network_of(contract).size == 4
