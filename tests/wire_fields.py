"""A packed message's fields by name, to be changed as no honest sender would."""

from typing import Any

import msgpack
from flwr.app import ConfigRecord, RecordDict


def opened(content: RecordDict) -> dict[str, Any]:
    """Return the protocol's version and all fields."""
    config = dict(content.config_records["hansa"])
    return {**config, **msgpack.unpackb(config.pop("fields"))}


def closed(fields: dict[str, Any]) -> RecordDict:
    """Return the record that holds these fields."""
    named = dict(fields)
    version = {"protocol": named.pop("protocol")} if "protocol" in named else {}
    return RecordDict({"hansa": ConfigRecord({**version, "fields": msgpack.packb(named)})})
