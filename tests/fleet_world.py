"""Flower's own SuperLink in this process, over TLS on loopback, and a merchant's node for it."""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message, RecordDict
from flwr.app.metadata import Metadata
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_children_ids_from_object_content,
    get_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.superlink.main import create_app

from clients.pinned import NAME, Enrolment
from clients.places import Places
from clients.preparing import make_node_key
from server.certificates import make_tls
from tests.enrolment_world import free_port, serving, tls_server


def until(question: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
    """Wait until a question has a true answer; return it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        answer = question()
        if answer:
            return answer
        time.sleep(0.02)
    raise AssertionError(f"never: {what}")


class SuperLink:
    """Flower's application with its state in memory; it outlives the server in front of it."""

    def __init__(self, folder: Path) -> None:
        self.tls = folder / "tls"
        make_tls(self.tls, "test", ("127.0.0.1",))
        self.port = free_port()
        self.app = create_app()
        self.state: Any = self.app.state.linkstate_factory.state()
        self.runs: dict[int, int] = {}

    @property
    def url(self) -> str:
        """Where it is."""
        return f"https://127.0.0.1:{self.port}"

    @property
    def ca_pem(self) -> str:
        """Its certificate authority."""
        return (self.tls / "ca.crt").read_text()

    @contextmanager
    def up(self) -> Iterator[None]:
        """Serve."""
        with serving(tls_server(self.app, self.port, self.tls)):
            yield

    def register(self, public: bytes) -> int:
        """Let a node in."""
        return int(self.state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, public, 0))

    def revoke(self, node_id: int) -> None:
        """Let a node in no longer."""
        self.state.delete_node(NOOP_FLWR_AID, node_id)

    def begin_run(self, fab: bytes | None = None) -> int:
        """Begin a run, with an app bundle or without."""
        app: tuple[str | None, ...] = (None, None, None)
        if fab is not None:
            app = ("hansa/hansa-deployed", "1.0.0", hashlib.sha256(fab).hexdigest())
            self.state.store_fab(Fab(str(app[2]), fab, {}))
        run = self.state.create_run(
            *app, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        task = next(task for task in self.state.get_tasks() if task.run_id == run)
        self.state.claim_task(task.task_id)
        self.state.activate_task(task.task_id)
        self.runs[run] = task.task_id
        return int(run)

    def end_run(self, run: int) -> None:
        """End a run."""
        self.state.finish_task(self.runs[run], "completed", "")

    def send(
        self, run: int, node_id: int, kind: str, content: RecordDict, ttl: float = 60.0
    ) -> str:
        """Send a message to a node; return its id."""
        metadata = Metadata(
            run_id=run,
            message_id="",
            src_node_id=SUPERLINK_NODE_ID,
            dst_node_id=node_id,
            reply_to_message_id="",
            group_id="",
            created_at=time.time(),
            ttl=ttl,
            message_type=kind,
            src_task_id=self.runs[run],
            dst_task_id=None,
        )
        message = Message(metadata=metadata, content=content)  # type: ignore[call-overload]
        metadata.__dict__["_message_id"] = message.object_id
        session = self.state.start_session(run)
        stored, wanted = self.state.store_message_and_object_tree(
            message, get_object_tree(message), session
        )
        assert stored
        for object_id, found in get_all_nested_objects(message).items():
            if object_id in wanted:
                assert self.state.store_object(run, session, object_id, found.deflate())
        return str(message.object_id)

    def reply(self, run: int, message_id: str) -> Message:
        """Wait for the reply to a message, all of it."""

        def whole() -> Message | None:
            for found in self.state.get_message_res({message_id}, run):
                return self._whole(run, found)
            return None

        return until(whole, "a reply")  # type: ignore[no-any-return]

    def _whole(self, run: int, found: Message) -> Message:
        if found.has_error():
            return found
        root = found.metadata.message_id
        contents: dict[str, bytes] = {}

        def gather(object_id: str) -> None:
            content = until(lambda: self.state.get_object(run, object_id), "an object")
            contents[object_id] = content
            for child in get_object_children_ids_from_object_content(content):
                gather(child)

        gather(root)
        message = inflate_object_from_contents(root, contents)
        assert isinstance(message, Message)
        return message


def node_folder(folder: Path, superlink: SuperLink, merchant: str = "shop") -> tuple[Places, bytes]:
    """Make what a node needs of a merchant's folder; return it and the node's public key."""
    places = Places(folder)
    places.run.mkdir(parents=True, mode=0o700)
    content = make_node_key()
    places.node_key.write_bytes(content)
    places.node_key.chmod(0o600)
    enrolment = Enrolment(superlink.url, superlink.ca_pem, "0" * 64, "0" * 64, 1, merchant, 0.0)
    (folder / NAME).write_bytes(enrolment.content())
    key: Any = load_ssh_private_key(content, None)
    return places, public_key_to_bytes(key.public_key())


@contextmanager
def running(run: Callable[[], None], stop: Callable[[], None]) -> Iterator[None]:
    """Run something in a thread until the end of the block."""
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop()
        thread.join(30)
        assert not thread.is_alive()
