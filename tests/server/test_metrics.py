"""Tests of the operator's metrics and health, asked over HTTP."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.metrics import serve
from server.registry import Registry
from server.runs import MerchantRow, RunStore
from server.settings import Settings
from tests.operated import enrol_unasked, make_operator

Labels = frozenset[tuple[str, str]]


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    """Serve the metrics of a new operator's folder; no service runs."""
    found = make_operator(tmp_path / "operator")
    server = serve(found.folder, found)
    yield found
    server.shutdown()
    server.server_close()


def asked(settings: Settings, path: str) -> tuple[int, str]:
    """Return status and body of an answer."""
    url = f"http://127.0.0.1:{settings.metrics_port}{path}"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def figures(settings: Settings) -> dict[tuple[str, Labels], float]:
    """Return every figure by its name and labels, as Prometheus reads them."""
    status, text = asked(settings, "/metrics")
    assert status == 200
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def figure(settings: Settings, name: str, **labels: str) -> float | None:
    """Return one figure."""
    return figures(settings).get((name, frozenset(labels.items())))


class TestMetrics:
    """/metrics."""

    def test_a_new_folder_has_no_run(self, settings: Settings) -> None:
        """Services are down, the run store answers, the certificate is good for a year."""
        found = figures(settings)
        assert found["hansa_run_store_up", frozenset()] == 1
        for service in ("superlink", "superexec", "gateway"):
            assert found["hansa_service_up", frozenset({("service", service)})] == 0
            assert found["hansa_service_restarts_total", frozenset({("service", service)})] == 0
        days = found["hansa_certificate_expiry_days", frozenset({("certificate", "server")})]
        assert 390 < days < 400
        assert not any(name.startswith("hansa_run_round") for name, _ in found)

    def test_the_last_run_is_told(self, settings: Settings) -> None:
        """State, round, epsilon, cohort, merchants by state; earlier runs are only counted."""
        store = RunStore(settings.store_url)
        store.begin("r0", "c0ffee", 7, "41").fail("too few")
        time.sleep(0.01)
        lease = store.begin("r1", "c0ffee", 7, "42")
        lease.running()
        lease.save(b"x", round=3, epsilon=0.25, cohort=2)
        lease.merchants(
            [
                MerchantRow("m1", "takes part", 3, "", time.time()),
                MerchantRow("m2", "takes part", 3, "", time.time()),
                MerchantRow("m3", "silent", 3, "", time.time()),
            ]
        )
        assert figure(settings, "hansa_run_info", run="r1", contract="c0ffee") == 1
        assert figure(settings, "hansa_run_state", state="running") == 1
        assert figure(settings, "hansa_run_state", state="failed") == 0
        for name, value in (("round", 3), ("rounds", 7), ("epsilon", 0.25), ("cohort", 2)):
            assert figure(settings, f"hansa_run_{name}") == value
        assert figure(settings, "hansa_run_alive") == 1
        assert figure(settings, "hansa_run_processes") == 1
        assert figure(settings, "hansa_runs", state="failed") == 1
        assert figure(settings, "hansa_run_merchants", state="takes part") == 2
        assert figure(settings, "hansa_run_merchants", state="silent") == 1

    def test_no_merchant_is_named(self, settings: Settings) -> None:
        """Counts by state are all that a monitoring system learns of merchants."""
        enrol_unasked(settings, "merchant-of-venice", node=11)
        enrol_unasked(settings, "merchant-of-bremen", node=12)
        Registry(settings.folder).revoke("merchant-of-bremen")
        lease = RunStore(settings.store_url).begin("r1", "c0ffee", 7, "42")
        lease.merchants([MerchantRow("merchant-of-venice", "silent", 1, "why", time.time())])
        assert figure(settings, "hansa_members", state="enrolled") == 1
        assert figure(settings, "hansa_members", state="revoked") == 1
        assert "merchant-of" not in asked(settings, "/metrics")[1]

    def test_a_broken_run_store_is_a_figure(self, settings: Settings) -> None:
        """What else is known is still told."""
        (settings.folder / "runs.sqlite").write_bytes(b"no database" * 100)
        assert figure(settings, "hansa_run_store_up") == 0
        assert figure(settings, "hansa_members", state="enrolled") == 0

    def test_a_missing_certificate_has_no_figure(self, settings: Settings) -> None:
        """No figure is better than a wrong one."""
        (settings.tls / "server.crt").unlink()
        assert figure(settings, "hansa_certificate_expiry_days", certificate="server") is None
        assert figure(settings, "hansa_certificate_expiry_days", certificate="ca") is not None


class TestHealth:
    """/health, and what else is not there."""

    def test_services_that_do_not_run_are_not_healthy(self, settings: Settings) -> None:
        """503, and which one it is."""
        status, text = asked(settings, "/health")
        document: dict[str, Any] = json.loads(text)
        assert status == 503
        assert not document["healthy"]
        assert set(document["services"]) == {"superlink", "superexec", "gateway"}

    def test_nothing_else_is_there(self, settings: Settings) -> None:
        """Other paths answer 404."""
        for path in ("/", "/metrics/x", "/status"):
            assert asked(settings, path)[0] == 404
