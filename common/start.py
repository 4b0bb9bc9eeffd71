"""Where training starts: what the contract's hash gives, or parameters that the contract names.

Parameters that were trained beforehand, on customers that nobody has to protect, cost no privacy.
They cannot be computed anew (training rounds otherwise on another machine), so that they travel:
the contract holds their SHA-256, and a file beside it the parameters, as little-endian float64 and
nothing else. `sha256sum contract.start` prints what `model.start` says.

Whoever gives the file is not trusted: it is used if it is what the contract names, or not at all.
"""

import hashlib
from pathlib import Path

import numpy as np
from jaxtyping import Float

from common.contract import Contract
from common.errors import ContractError
from common.network import MAX_PARAMETER, initial_parameters, network_of

SUFFIX = ".start"
START = f"contract{SUFFIX}"  # beside `contract.toml`
LEARNING_RATE = 0.01  # from a good start; 0.1 undoes most of it (benchmarks/defaults.py)
_BYTES = 8


def start_path(contract: Path) -> Path:
    """Return where the starting parameters of a contract's file lie.

    >>> start_path(Path("contracts/shoes.toml")).name
    'shoes.start'
    """
    return contract.with_suffix(SUFFIX)


def to_bytes(theta: Float[np.ndarray, " P"]) -> bytes:
    """Return parameters as their file holds them."""
    return np.ascontiguousarray(theta, dtype="<f8").tobytes()


def starting_from(contract: Contract, content: bytes) -> Contract:
    """Return the contract that starts from parameters, as their file holds them.

    A learning rate that is not stated becomes the one that suits a good start.

    Raises:
        ContractError: They are no parameters of the contract's model.
    """
    stated = contract.training.learning_rate
    found = contract.revised(
        contract.federation.name,
        model={"start": hashlib.sha256(content).hexdigest()},
        training={"learning_rate": LEARNING_RATE if stated is None else stated},
    )
    starting_parameters(found, content)
    return found


def read_start(path: Path, contract: Contract) -> bytes | None:
    """Read and check what lies beside a contract's file; None if the contract names nothing.

    Args:
        path: Of the contract.
        contract: What the file holds.

    Raises:
        ContractError: The file is missing, or is not what the contract names.
    """
    if contract.model.start is None:
        return None
    place = start_path(path)
    try:
        with place.open("rb") as file:
            content = file.read(_expected_size(contract) + 1)
    except FileNotFoundError:
        content = None
    except OSError as error:
        raise ContractError(f"{place}: cannot be read ({error.strerror})") from None
    starting_parameters(contract, content, str(place))
    return content


def starting_parameters(
    contract: Contract, content: bytes | None, source: str = START
) -> Float[np.ndarray, " P"]:
    """Return the parameters that a run under this contract starts from.

    Args:
        contract: Names them by hash, or does not.
        content: What the file beside the contract holds; None if there is none.
        source: Name of the file, which starts every message.

    Raises:
        ContractError: The contract names parameters, and the content is missing, has another size
            or hash, or a number that no merchant accepts.
    """
    named = contract.model.start
    if named is None:
        return initial_parameters(contract)
    if content is None:
        raise ContractError(
            f"{source}: is missing; the contract starts from parameters with SHA-256 "
            f"{named[:16]}… (model.start): put the file there that came with the contract"
        )
    size = _expected_size(contract)
    if len(content) != size:
        held = f"{len(content):,}" if len(content) < size else f"more than {size:,}"
        raise ContractError(
            f"{source}: expected {size:,} bytes, {size // _BYTES:,} parameters of the contract's "
            f"model, got {held}; it is another model's, or not whole"
        )
    found = hashlib.sha256(content).hexdigest()
    if found != named:
        raise ContractError(
            f"{source}: has SHA-256 {found[:16]}…, the contract names {named[:16]}… (model.start): "
            "it was changed, or is another contract's; put the file back that came with this one"
        )
    theta = np.frombuffer(content, dtype="<f8").astype(np.float64)
    if not np.all(np.abs(theta) <= MAX_PARAMETER):  # false for what is not a number
        raise ContractError(
            f"{source}: holds a number that is not finite, or beyond {MAX_PARAMETER:g}, which no "
            "merchant accepts; make file and contract anew: hansa pretrain"
        )
    return theta


def _expected_size(contract: Contract) -> int:
    return _BYTES * network_of(contract).size
