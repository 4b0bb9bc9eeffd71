"""Metrics and health of the operator's side, on 127.0.0.1 only.

    /metrics   Prometheus' text format
    /health    JSON; 200 where every service runs and answers, else 503

Every figure is one that the coordinator may know: states, rounds, epsilon, counts of merchants.
No merchant is named.
"""

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from common.errors import ArchiveError, HansaError
from server.certificates import read_certificate
from server.registry import Registry
from server.runs import RunRow, RunState, RunStore
from server.services import LOOPBACK, Places
from server.settings import Settings
from server.status import services_document

_LOG = logging.getLogger(__name__)
Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class OperatorMetrics:
    """Collects every figure anew when it is asked for.

    Args:
        folder: The operator's.
        settings: Of the folder.
        now: Seconds since 1970.
    """

    def __init__(
        self, folder: Path, settings: Settings, now: Callable[[], float] = time.time
    ) -> None:
        self._folder = folder
        self._settings = settings
        self._now = now
        self._store: RunStore | None = None

    def collect(self) -> Iterator[Metric]:
        """Yield every metric."""
        yield from self._services()
        yield from self._certificates()
        yield from self._members()
        yield from self._runs()

    def _services(self) -> Iterator[Metric]:
        up = GaugeMetricFamily(
            "hansa_service_up", "1 where a service runs and answers.", labels=["service"]
        )
        restarts = CounterMetricFamily(
            "hansa_service_restarts",
            "Times that a service was started again since `hansa server start`.",
            labels=["service"],
        )
        for child in services_document(self._folder)["children"]:
            up.add_metric([child["name"]], float(child["state"] == "running"))
            restarts.add_metric([child["name"]], child["restarts"])
        yield up
        yield restarts

    def _certificates(self) -> Iterator[Metric]:
        days = GaugeMetricFamily(
            "hansa_certificate_expiry_days",
            "Days until a certificate expires; negative: it has.",
            labels=["certificate"],
        )
        places = Places(self._folder)
        for name, path in (("server", places.certificate), ("ca", places.ca)):
            try:
                left_s = read_certificate(path).not_valid_after_utc.timestamp() - self._now()
            except HansaError as error:  # no figure is better than a wrong one
                _LOG.warning("%s", error)
                continue
            days.add_metric([name], left_s / 86_400)
        yield days

    def _members(self) -> Iterator[Metric]:
        try:
            state = Registry(self._folder).state()
        except HansaError as error:
            _LOG.warning("%s", error)
            return
        counts = Counter(enrolled=len(state.members), revoked=len(state.revoked))
        yield _counted("hansa_members", "Merchants on the signed list.", counts)

    def _runs(self) -> Iterator[Metric]:
        try:
            store = self._opened()
            rows = store.rows()
            merchants = store.merchants(rows[0].run) if rows else []
        except ArchiveError as error:
            _LOG.warning("%s", error)
            yield GaugeMetricFamily("hansa_run_store_up", "1 where the run store answers.", 0)
            return
        yield GaugeMetricFamily("hansa_run_store_up", "1 where the run store answers.", 1)
        yield _counted("hansa_runs", "Runs in the run store.", _states(rows))
        if rows:
            yield from _last_run(rows[0], alive=store.is_alive(rows[0]))
            states = Counter(row.state for row in merchants)
            yield _counted("hansa_run_merchants", "Merchants of the last run.", states)

    def _opened(self) -> RunStore:
        if self._store is None:
            self._store = RunStore(self._settings.store_url)
        return self._store


def _last_run(row: RunRow, *, alive: bool) -> Iterator[Metric]:
    info = GaugeMetricFamily(
        "hansa_run_info", "The last run; always 1.", labels=["run", "contract"]
    )
    info.add_metric([row.run, row.contract], 1)
    yield info
    state = GaugeMetricFamily(
        "hansa_run_state", "1 for the state of the last run.", labels=["state"]
    )
    for known in RunState:
        state.add_metric([known.value], float(row.state == known))
    yield state
    figures: tuple[tuple[str, str, float], ...] = (
        ("round", "Last round with a checkpoint.", row.round),
        ("rounds", "Rounds that the contract asks for.", row.rounds),
        ("epsilon", "Spent so far by a merchant that answered everything.", row.epsilon),
        ("cohort", "Merchants in the last round's sum.", row.cohort),
        ("alive", "1 where the coordinator gives signs of life.", alive),
        ("processes", "Coordinators of the run so far: more than 1 after a resume.", row.epoch),
        ("started_timestamp_seconds", "Start of the run.", row.started_at),
        ("updated_timestamp_seconds", "Last checkpoint or change of state.", row.updated_at),
    )
    for name, help_text, value in figures:
        yield GaugeMetricFamily(f"hansa_run_{name}", help_text, float(value))


def _states(rows: Iterable[RunRow]) -> Counter[str]:
    counts = Counter({state.value: 0 for state in RunState})
    counts.update(row.state.value for row in rows)
    return counts


def _counted(name: str, help_text: str, counts: Counter[str]) -> Metric:
    metric = GaugeMetricFamily(name, help_text, labels=["state"])
    for state, count in sorted(counts.items()):
        metric.add_metric([state], count)
    return metric


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """Bind without asking a name server who we are, as the parent class does."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = LOOPBACK, self.server_address[1]
        self.setup_environ()


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing for a request that was answered."""


def application(folder: Path, collector: Any) -> Application:
    """Return a WSGI application with /metrics and /health."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    figures: Application = make_wsgi_app(registry)

    def answer(environment: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = environment.get("PATH_INFO", "")
        if path == "/metrics":
            return figures(environment, start)
        document: dict[str, Any] = {"error": "only /metrics and /health are here"}
        status = "404 Not Found"
        if path == "/health":
            services = services_document(folder)
            status = "200 OK" if services["healthy"] else "503 Service Unavailable"
            states = {child["name"]: child["state"] for child in services["children"]}
            document = {"healthy": services["healthy"], "services": states}
        body = json.dumps(document).encode() + b"\n"
        start(status, [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]

    return answer


def serve(folder: Path, settings: Settings) -> _Server:
    """Serve metrics and health in a thread of this process; `shutdown()` ends it.

    Raises:
        OSError: The port is taken.
    """
    app = application(folder, OperatorMetrics(folder, settings))
    server = make_server(
        LOOPBACK,
        settings.metrics_port,
        app,
        server_class=_Server,
        handler_class=_Quiet,
    )
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server
