"""A merchant's metrics for Prometheus, on 127.0.0.1 alone: nothing about customers.

What is spent of the budget is from the merchant's ledger; everything else is about messages and
processes.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from clients.places import Places
from clients.pulse import is_alive, read_pulse
from clients.worker_link import WorkerLink
from common.errors import ServiceError
from common.supervision import state_of


class MerchantMetrics(Collector):
    """Reads a merchant's own files and asks its worker, at each question.

    Args:
        places: The merchant's folder.
        worker: The way to its worker.
    """

    def __init__(self, places: Places, worker: WorkerLink) -> None:
        self._places = places
        self._worker = worker

    def collect(self) -> Iterable[Metric]:
        """Return all metrics."""
        yield from message_metrics(self._places.node_state)
        yield from process_metrics(self._places.run)
        yield from budget_metrics(self._worker.budget())


def message_metrics(path: Path) -> Iterable[Metric]:
    """Return what a node says of messages and of its connection."""
    pulse = read_pulse(path)
    connected = GaugeMetricFamily(
        "hansa_merchant_connected", "Whether the node is logged in at the operator's server (0, 1)."
    )
    is_connected = pulse.get("state") == "connected" and is_alive(path)
    connected.add_metric([], float(is_connected))
    yield connected
    messages = CounterMetricFamily(
        "hansa_merchant_messages",
        "Messages by type and outcome, since the node was started.",
        labels=["type", "outcome"],
    )
    seconds = SummaryMetricFamily(
        "hansa_merchant_message_seconds",
        "Seconds from a message's arrival to its answer's departure, by type.",
        labels=["type"],
    )
    for kind, outcomes in pulse.get("messages", {}).items():
        for outcome, count in outcomes.items():
            messages.add_metric([kind, outcome], count)
        total = pulse.get("seconds", {}).get(kind, 0.0)
        seconds.add_metric([kind], count_value=sum(outcomes.values()), sum_value=total)
    yield messages
    yield seconds


def process_metrics(run: Path) -> Iterable[Metric]:
    """Return how worker and node fare."""
    restarts = CounterMetricFamily(
        "hansa_merchant_restarts",
        "How often a process was started again, since its supervisor was started.",
        labels=["process"],
    )
    running = GaugeMetricFamily(
        "hansa_merchant_running", "Whether a process runs and is well (0, 1).", labels=["process"]
    )
    state = state_of(run) or {"children": {}}
    for name, child in state["children"].items():
        restarts.add_metric([name], child["restarts"])
        running.add_metric([name], float(child["state"] == "running"))
    yield restarts
    yield running


def budget_metrics(found: dict[str, Any] | None) -> Iterable[Metric]:
    """Return what the ledger adds up to; nothing where the worker does not answer."""
    if found is None:
        return
    for name, text in (
        ("epsilon", "Epsilon spent, of the runs that count against the cap."),
        ("cap", "The most epsilon that this merchant spends."),
        ("delta", "The delta of both."),
    ):
        full = "hansa_merchant_epsilon_cap" if name == "cap" else f"hansa_merchant_{name}"
        yield GaugeMetricFamily(full, text, value=found[name])


def serve(port: int, places: Places, worker: WorkerLink) -> None:
    """Serve a merchant's metrics from a thread, until this process ends.

    Raises:
        ServiceError: The port cannot be had.
    """
    registry = CollectorRegistry()
    registry.register(MerchantMetrics(places, worker))
    try:
        start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as error:
        raise ServiceError(
            f"127.0.0.1:{port}: the metrics cannot listen there ({error.strerror}); end what "
            "does, or change node.metrics_port in merchant.toml"
        ) from None
