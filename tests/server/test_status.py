"""Tests of the status document, and of the picture of it."""

import io
import json
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from rich.console import Console

from hansa.commands.status_table import picture, state_of_merchant
from server.registry import Registry
from server.runs import MerchantRow, RunState, RunStore
from server.settings import Settings
from server.status import Standing, healthy, merchants_document, status_document
from tests.operated import enrol_unasked, make_operator


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Give the settings of a new operator's folder."""
    return make_operator(tmp_path / "operator")


def checked(settings: Settings, now: float | None = None) -> dict[str, Any]:
    """Return the document, which keeps the schema that the package ships."""
    document = status_document(settings.folder, now)
    text = (files("hansa") / "schemas" / "status.schema.json").read_text(encoding="utf-8")
    jsonschema.validate(json.loads(json.dumps(document, allow_nan=False)), json.loads(text))
    return document


def drawn(document: dict[str, Any], width: int = 120) -> str:
    """Return the picture as plain text."""
    console = Console(file=io.StringIO(), width=width)
    console.print(picture(document), soft_wrap=True)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


class TestDocument:
    """The document for machines."""

    def test_a_new_folder_has_nothing_yet(self, settings: Settings) -> None:
        """No service, no run, no merchant; and no problem either."""
        document = checked(settings)
        assert document["services"]["pid"] is None
        assert not document["services"]["healthy"]
        assert {child["state"] for child in document["services"]["children"]} == {"stopped"}
        assert document["run"] is None
        assert document["merchants"] == []
        assert document["problems"] == []
        assert 390 < document["certificate"]["days_left"] < 400

    def test_a_run_is_told_as_its_coordinator_tells_it(self, settings: Settings) -> None:
        """Round, epsilon, cohort and every merchant of it."""
        lease = RunStore(settings.store_url).begin("r1", "c0ffee", 7, "42")
        lease.running()
        lease.save(b"x", round=3, epsilon=0.25, cohort=2)
        lease.beat("round 4 of 7")
        lease.merchants([MerchantRow("m1", "silent", 3, "no answer in 30 s", time.time())])
        document = checked(settings)
        run = document["run"]
        assert (run["state"], run["round"], run["rounds"]) == ("running", 3, 7)
        assert (run["epsilon"], run["cohort"]) == (0.25, 2)
        assert run["alive"]
        assert run["message"] == "round 4 of 7"
        (merchant,) = document["merchants"]
        assert merchant["state"] == "silent"
        assert merchant["last_error"] == "no answer in 30 s"
        assert not merchant["enrolled"]

    def test_a_dead_coordinator_is_not_alive(self, settings: Settings) -> None:
        """After 20 s without a sign of life."""
        RunStore(settings.store_url).begin("r1", "c0ffee", 7, "42")
        assert not checked(settings, time.time() + 21)["run"]["alive"]

    def test_enrolled_and_revoked_merchants_are_listed(self, settings: Settings) -> None:
        """With no SuperLink nobody can tell who is connected."""
        enrol_unasked(settings, "m1", node=11)
        enrol_unasked(settings, "m2", node=12)
        Registry(settings.folder).revoke("m2")
        first, second = checked(settings)["merchants"]
        assert (first["merchant"], first["enrolled"], first["connected"]) == ("m1", True, None)
        assert (second["merchant"], second["enrolled"], second["connected"]) == ("m2", False, False)

    def test_what_cannot_be_found_out_is_a_problem(self, settings: Settings) -> None:
        """A run store that is broken hides nothing of the rest."""
        (settings.folder / "runs.sqlite").write_bytes(b"not a database" * 100)
        (settings.tls / "server.crt").unlink()
        document = checked(settings)
        assert len(document["problems"]) == 2
        assert "runs.sqlite" in " ".join(document["problems"])
        assert document["certificate"]["days_left"] is None

    @pytest.mark.parametrize(
        ("states", "expected"),
        [
            (("running", "running", "running"), True),
            (("running", "starting", "running"), False),
            (("running", "running"), False),
            ((), False),
        ],
    )
    def test_all_services_must_run(self, states: tuple[str, ...], expected: bool) -> None:
        """One that starts, failed or is missing is one too few."""
        names = ("superlink", "superexec", "gateway")
        assert healthy({n: {"state": s} for n, s in zip(names, states, strict=False)}) == expected

    def test_merchants_come_by_name(self) -> None:
        """Those of the list and those of the run together, each once."""
        rows = [MerchantRow("b", "takes part", 1, "", 1.0), MerchantRow("c", "out", 1, "", 1.0)]
        found = merchants_document([Standing("b", True, True), Standing("a", True, False)], rows)
        assert [merchant["merchant"] for merchant in found] == ["a", "b", "c"]


class TestPicture:
    """The picture for people."""

    def test_it_says_what_to_do_next(self, settings: Settings) -> None:
        """In an empty folder every line names the next command."""
        text = drawn(status_document(settings.folder))
        for told in ("hansa server start", "hansa server run", "hansa server invite"):
            assert told in text

    def test_it_shows_the_run_and_its_merchants(self, settings: Settings) -> None:
        """Round of rounds, epsilon, message, and each merchant's last error."""
        enrol_unasked(settings, "m1", node=11)
        lease = RunStore(settings.store_url).begin("r1", "c0ffee", 7, "42")
        lease.save(b"x", round=3, epsilon=0.25, cohort=2)
        lease.beat("waits for 1 more merchant")
        lease.merchants([MerchantRow("m1", "refused", 3, "budget is spent", time.time())])
        text = drawn(status_document(settings.folder))
        for told in ("r1", "round 3/7", "epsilon 0.25", "waits for 1 more", "refused", "is spent"):
            assert told in text

    def test_a_dead_coordinator_is_told_with_the_remedy(self, settings: Settings) -> None:
        """Resume is named."""
        RunStore(settings.store_url).begin("r1", "c0ffee", 7, "42")
        assert "hansa server resume" in drawn(status_document(settings.folder, time.time() + 60))

    def test_a_certificate_that_runs_out_is_told(self, settings: Settings) -> None:
        """A month before and after."""
        document = status_document(settings.folder)
        for days, told in ((12.0, "in 12 days"), (-1.0, "already")):
            document["certificate"]["days_left"] = days
            assert told in drawn(document)

    def test_a_stranger_s_text_does_nothing_to_the_terminal(self, settings: Settings) -> None:
        """Control characters and markup are shown, not obeyed."""
        document = status_document(settings.folder)
        document["merchants"] = [
            {
                "merchant": "m\x1b[31m",
                "enrolled": True,
                "connected": True,
                "state": "[red]x[/red]",
                "round": 1,
                "last_error": "[bold]\x1b]0;title\x07",
                "seen_at": 1.0,
            }
        ]
        text = drawn(document)
        assert "\x1b" not in text
        assert "\x07" not in text
        assert "[bold]" in text

    @pytest.mark.parametrize(
        ("enrolled", "connected", "state", "alive", "expected"),
        [
            (True, True, "takes part", True, "takes part"),
            (True, True, "takes part", False, "connected"),  # the run is over
            (True, False, "", True, "not connected"),
            (True, None, "", True, "unknown"),
            (False, False, "takes part", True, "not on the list"),
        ],
    )
    def test_a_merchant_s_state_in_a_word(
        self, enrolled: bool, connected: bool | None, state: str, alive: bool, expected: str
    ) -> None:
        """What the run says counts while it goes on; the list counts always."""
        merchant = {"enrolled": enrolled, "connected": connected, "state": state}
        assert state_of_merchant(merchant, {"alive": alive}) == expected

    def test_every_state_of_a_run_can_be_drawn(self, settings: Settings) -> None:
        """Finished ones with their bundle, failed ones with the reason."""
        lease = RunStore(settings.store_url).begin("r1", "c0ffee", 7, "42")
        lease.fail("too few merchants")
        assert "too few merchants" in drawn(status_document(settings.folder))
        lease.finish("a/bundle")
        document = status_document(settings.folder)
        assert document["run"]["state"] == RunState.FINISHED.value
        assert "a/bundle" in drawn(document)
