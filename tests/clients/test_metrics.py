"""Tests of a merchant's metrics."""

import os
import socket
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Metric

from clients.metrics import MerchantMetrics, budget_metrics, message_metrics, serve
from clients.places import Places
from clients.pulse import Pulse
from clients.worker_link import WorkerLink
from common.errors import ServiceError
from tests.enrolment_world import free_port


def samples(metrics: list[Metric]) -> dict[str, float]:
    """Return every sample by name and labels."""
    return {
        f"{sample.name}{''.join(f'|{value}' for value in sample.labels.values())}": sample.value
        for metric in metrics
        for sample in metric.samples
    }


@pytest.fixture
def places(tmp_path: Path) -> Places:
    """Give a merchant's folder."""
    found = Places(tmp_path)
    found.run.mkdir()
    return found


def test_messages(places: Places) -> None:
    """Messages by type and outcome, their seconds, and whether the node is connected."""
    pulse = Pulse(places.node_state, frozenset({"query.attest"}))
    pulse.tell("connected")
    pulse.count("query.attest", "answer", 0.5)
    pulse.count("query.attest", "error", 0.25)
    pulse.close()
    found = samples(list(message_metrics(places.node_state)))
    assert found == {
        "hansa_merchant_connected": 1.0,
        "hansa_merchant_messages_total|query.attest|answer": 1.0,
        "hansa_merchant_messages_total|query.attest|error": 1.0,
        "hansa_merchant_message_seconds_count|query.attest": 2.0,
        "hansa_merchant_message_seconds_sum|query.attest": 0.75,
    }


def test_a_node_that_was_killed_is_not_connected(places: Places) -> None:
    """What it said last does not count for long."""
    pulse = Pulse(places.node_state, frozenset())
    pulse.tell("connected")
    pulse.close()
    old = time.time() - 60
    os.utime(places.node_state, (old, old))
    assert samples(list(message_metrics(places.node_state))) == {"hansa_merchant_connected": 0.0}


def test_budget() -> None:
    """What is spent, and the cap; nothing where the worker does not answer."""
    found = samples(list(budget_metrics({"epsilon": 0.5, "cap": 1.0, "delta": 1e-5})))
    assert found == {
        "hansa_merchant_epsilon": 0.5,
        "hansa_merchant_epsilon_cap": 1.0,
        "hansa_merchant_delta": 1e-5,
    }
    assert list(budget_metrics(None)) == []


def test_served_on_loopback(places: Places) -> None:
    """They can be read at 127.0.0.1, also while nothing else runs."""
    port, link = free_port(), WorkerLink(places.socket)
    serve(port, places, link)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    assert "hansa_merchant_connected 0.0" in text
    link.close()


def test_the_port_is_taken(places: Places) -> None:
    """Say which setting to change."""
    link = WorkerLink(places.socket)
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        pytest.raises(ServiceError, match=r"node\.metrics_port"),
    ):
        serve(other.getsockname()[1], places, link)
    link.close()


def test_names_are_those_of_the_documentation(places: Places) -> None:
    """Every metric has the prefix and a help text."""
    registry, link = CollectorRegistry(), WorkerLink(places.socket)
    registry.register(MerchantMetrics(places, link))
    for metric in registry.collect():
        assert metric.name.startswith("hansa_merchant_")
        assert metric.documentation.endswith(".")
    link.close()
