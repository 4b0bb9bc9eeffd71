"""Where a session is kept: sealed, whole, and on the disk before anything is answered."""

import errno
import fcntl
import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clients.secure_sum import State, state_to_bytes
from clients.session_store import FileStore, MemoryStore, SessionStore
from common.errors import PolicyError, SecureSumError
from common.identity import Identity
from tests.secure_world import ANSWER, World, vectors_of


@pytest.fixture
def identity() -> Identity:
    """Give an identity."""
    return Identity.generate("shop")


@pytest.fixture(scope="module")
def state() -> State:
    """Give a state with everything in it: a step under way and a member that is out."""
    world = World(4, 2).set_up()
    world.update(vectors_of(4, 3, np.uint32, 1), {3: ("update", ANSWER)})
    world.confirm()
    return world.at(0).state


@pytest.fixture
def store(identity: Identity, tmp_path: Path) -> FileStore:
    """Give a store in a folder of its own."""
    return FileStore(tmp_path / "session", identity)


def another(state: State) -> State:
    """Return a state that differs."""
    return State(state.context, 77, state.phase, b"", b"", b"")


class TestMemoryStore:
    """In this process."""

    def test_it_keeps_replaces_and_forgets(self, state: State) -> None:
        """One state at a time."""
        store = MemoryStore()
        with pytest.raises(SecureSumError, match="no session under way"):
            store.load()
        store.save(state)
        assert store.load() == state
        store.save(another(state))
        assert store.load().number == 77
        store.erase()
        with pytest.raises(SecureSumError, match="no session under way"):
            store.load()


class TestFileStore:
    """In a sealed file."""

    def test_it_keeps_replaces_and_forgets(self, store: FileStore, state: State) -> None:
        """One state at a time; forgetting twice is no error."""
        with pytest.raises(SecureSumError, match="no session under way; set one up anew"):
            store.load()
        store.save(state)
        assert store.load() == state
        store.save(another(state))
        assert store.load().number == 77
        for _ in range(2):
            store.erase()
            with pytest.raises(SecureSumError, match="no session under way"):
                store.load()

    def test_it_keeps_a_whole_session(self, tmp_path: Path) -> None:
        """Every merchant goes through its file after every message."""
        world = World(3, 2)
        stores = {name: FileStore(tmp_path / name, one) for name, one in world.identities.items()}

        def through_files() -> None:
            for name, session in world.merchants.items():
                stores[name].save(session.state)
                session.state = stores[name].load()

        vectors = vectors_of(3, 5, np.uint64, 1)
        world.advertise()
        through_files()
        world.share()
        for _ in range(2):
            through_files()
            world.update(vectors)
            through_files()
            world.confirm()
            through_files()
            world.reveal()
            np.testing.assert_array_equal(
                world.coordinator.total(), world.plain(vectors, [0, 1, 2])
            )

    @pytest.mark.parametrize("mask", [0o000, 0o077])
    def test_only_its_owner_reads_it(
        self, store: FileStore, state: State, tmp_path: Path, mask: int
    ) -> None:
        """Mode 0600, whatever the umask, also when it is replaced."""
        before = os.umask(mask)
        try:
            for _ in range(2):
                store.save(state)
                assert (tmp_path / "session").stat().st_mode & 0o777 == 0o600
        finally:
            os.umask(before)

    def test_no_secret_is_in_the_file(self, store: FileStore, state: State, tmp_path: Path) -> None:
        """Neither as bytes nor in hexadecimal, nor any other part of the state."""
        store.save(state)
        raw = (tmp_path / "session").read_bytes()
        secrets = [state.next_self, state.next_share, state.next_keys, state.own_advert]
        secrets += [part for pair in state.pairs.values() for part in vars(pair).values()]
        secrets += state.step.shares.values() if state.step else []
        assert len(secrets) > 20
        for secret in (*secrets, *(name.encode() for name in state.names), b"confirmed"):
            for start in range(0, len(secret) - 7, 8):
                piece = secret[start : start + 8]
                assert piece == bytes(8) or piece not in raw
                assert piece == bytes(8) or piece.hex().encode() not in raw

    def test_every_save_is_sealed_anew(
        self, store: FileStore, state: State, tmp_path: Path
    ) -> None:
        """The same state gives another file: no nonce is used twice."""
        found = set()
        for _ in range(3):
            store.save(state)
            found.add((tmp_path / "session").read_bytes()[:12])
        assert len(found) == 3

    def test_a_changed_file_is_refused(
        self, store: FileStore, state: State, tmp_path: Path
    ) -> None:
        """Any bit, cut short, made longer, or something else altogether."""
        store.save(state)
        path = tmp_path / "session"
        raw = path.read_bytes()
        changed = [raw[:-1], raw + b"\0", b"", b"x" * 11, b"x" * 12, b"x" * 27, raw[12:], raw[::-1]]
        for position in (0, 11, 12, len(raw) // 2, len(raw) - 1):
            changed.append(raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :])
        for wrong in changed:
            path.write_bytes(wrong)
            with pytest.raises(SecureSumError, match="cannot be read; set one up anew"):
                store.load()
        path.write_bytes(raw)
        assert store.load() == state

    def test_another_identity_cannot_open_it(
        self, store: FileStore, state: State, tmp_path: Path
    ) -> None:
        """Also where it goes by the same name."""
        store.save(state)
        with pytest.raises(SecureSumError, match="cannot be read"):
            FileStore(tmp_path / "session", Identity.generate("shop")).load()

    def test_a_folder_in_its_place_is_told(self, identity: Identity, tmp_path: Path) -> None:
        """As errors of the merchant's own files, without what was to be written."""
        (tmp_path / "session").mkdir()
        with pytest.raises(SecureSumError, match="cannot be read"):
            FileStore(tmp_path / "session", identity).load()

    def test_a_missing_folder_is_told(
        self, identity: Identity, state: State, tmp_path: Path
    ) -> None:
        """The message names the file."""
        with pytest.raises(PolicyError, match=r"session: cannot be written \(No such file"):
            FileStore(tmp_path / "no" / "session", identity).save(state)

    def test_a_file_in_place_of_its_folder_is_told(
        self, identity: Identity, state: State, tmp_path: Path
    ) -> None:
        """The error is the one that is promised."""
        (tmp_path / "file").write_text("x")
        with pytest.raises(PolicyError, match="cannot be written"):
            FileStore(tmp_path / "file" / "session", identity).save(state)

    def test_what_cannot_be_deleted_is_told(self, identity: Identity, tmp_path: Path) -> None:
        """A session that should be forgotten and is not is no success."""
        (tmp_path / "session").mkdir()
        with pytest.raises(PolicyError, match="cannot be deleted"):
            FileStore(tmp_path / "session", identity).erase()


class TestLock:
    """One message at a time."""

    def test_a_file_is_one_processes_at_a_time(
        self, store: FileStore, state: State, tmp_path: Path
    ) -> None:
        """From load to save nobody else gets the lock; after that somebody does."""

        def free() -> bool:
            handle = os.open(tmp_path / ".session.lock", os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            finally:
                os.close(handle)
            return True

        with store.locked():
            assert not free()
            store.save(state)
            assert not free()
        assert free()
        with pytest.raises(SecureSumError), store.locked():
            raise SecureSumError("no")
        assert free()

    def test_a_folder_that_is_missing_is_told(self, identity: Identity, tmp_path: Path) -> None:
        """Without a lock nothing is answered."""
        store = FileStore(tmp_path / "no" / "session", identity)
        with pytest.raises(PolicyError, match="cannot be locked"), store.locked():
            pass

    @pytest.mark.parametrize("kind", ["memory", "file"])
    def test_threads_take_turns(
        self, kind: str, identity: Identity, state: State, tmp_path: Path
    ) -> None:
        """Forty increments by four threads are forty."""
        where = tmp_path / "session"
        shared: SessionStore = MemoryStore() if kind == "memory" else FileStore(where, identity)
        shared.save(replace(state, number=0))

        def count() -> None:
            for _ in range(10):
                with shared.locked():
                    found = shared.load()
                    shared.save(replace(found, number=found.number + 1))

        threads = [threading.Thread(target=count) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert shared.load().number == 40


class TestCrashes:
    """The old state or the new one, never half of one."""

    @pytest.mark.parametrize("failing", ["fsync", "replace"])
    def test_a_write_that_fails_leaves_the_old_state(
        self,
        store: FileStore,
        state: State,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        failing: str,
    ) -> None:
        """A full disk is told, and nothing is left lying about."""

        def fail(*_arguments: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        store.save(state)
        with monkeypatch.context() as patch:
            patch.setattr(os if failing == "fsync" else Path, failing, fail)
            with pytest.raises(PolicyError, match=r"cannot be written \(No space left on device\)"):
                store.save(another(state))
        assert store.load() == state
        assert [path.name for path in tmp_path.iterdir()] == ["session"]

    def test_a_process_that_dies_in_mid_write_leaves_the_old_state(
        self, store: FileStore, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What it left beside the file is overwritten by the next save."""

        class Killed(BaseException):
            """What no `except` of ours stops."""

        def die(_handle: int) -> None:
            raise Killed

        store.save(state)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", die)
            with pytest.raises(Killed):
                store.save(another(state))
        assert store.load() == state
        store.save(another(state))
        assert store.load().number == 77
        assert [path.name for path in tmp_path.iterdir()] == ["session"]

    def test_file_and_folder_reach_the_disk_in_this_order(
        self, store: FileStore, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The content before the file is renamed, the folder after it."""
        told: list[str] = []
        fsync, replace = os.fsync, Path.replace

        def noted_fsync(handle: int) -> None:
            told.append("folder" if Path(f"/proc/self/fd/{handle}").is_dir() else "file")
            fsync(handle)

        def noted_replace(path: Path, target: Path) -> Path:
            told.append("replace")
            assert len(path.read_bytes()) == len(state_to_bytes(state)) + 12 + 16
            return replace(path, target)

        monkeypatch.setattr(os, "fsync", noted_fsync)
        monkeypatch.setattr(Path, "replace", noted_replace)
        store.save(state)
        assert told == ["file", "replace", "folder"]
        assert tmp_path.joinpath("session").exists()
