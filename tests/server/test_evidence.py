"""Tests of the coordinator's evidence: runs, bundles and heads, and nothing else."""

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.bundle import write_bundle
from common.chain import NO_LINK, Head, body_bytes, link_after, signed_head
from common.contract import Contract, parse_contract
from common.errors import IdentityError, RunError
from common.evidence import read_evidence
from common.identity import Identity, Members, read_members, write_members
from server.archive import make_archive, open_archive
from server.evidence import federation_evidence


@pytest.fixture
def contract() -> Contract:
    """Give a small contract."""
    return parse_contract(
        {
            "federation": {"name": "test"},
            "features": [{"name": "spend", "high": 5000.0}],
            "segments": {"names": ["low", "high"]},
            "privacy": {"epsilon": 1.0, "delta": 1e-5},
        },
        source="test",
    )


@pytest.fixture
def folder(contract: Contract, tmp_path: Path) -> Path:
    """Give a federation's folder: one witnessed head, one finished run, one that broke off."""
    folder = tmp_path / "secret-place"
    shop, coordinator = Identity.generate("shop"), make_archive(folder / "server")
    write_members(Members({"shop": shop.public}, coordinator.public), folder / "members.toml")
    archive = open_archive(folder / "server")
    link = link_after(NO_LINK, body_bytes({"kind": "open"}))
    head = Head(1, link, shop.sign(signed_head(shop.public, 1, link)), 1, ())
    assert archive.witness.countersign({"shop": (shop.public, head)}) == {}
    for run in ("aa", "bb"):
        record = archive.record(run)
        record.start(run, contract, ["shop"], "0" * 64)
        record.sum(None, stage="census", round=0, attempt=0)
        record.flush()
    record.end("0" * 64)
    record.flush()
    write_bundle(tmp_path / "bundle", {"model.onnx": b"model"}, Ed25519PrivateKey.generate())
    archive.keep_bundle("bb", tmp_path / "bundle")
    return folder


def files_of(folder: Path, out: Path) -> dict[str, bytes]:
    """Write the evidence and read its files back."""
    written = federation_evidence(folder, out)
    assert read_evidence(out).files == written
    return written


def test_holds_what_the_format_says(folder: Path, tmp_path: Path) -> None:
    """Members, heads, and for each run contract, record and bundle."""
    assert set(files_of(folder, tmp_path / "s.zip")) == {
        "members.toml",
        "witness.jsonl",
        "runs/aa/contract.toml",
        "runs/aa/run.jsonl",
        "runs/bb/contract.toml",
        "runs/bb/run.jsonl",
        "runs/bb/bundle/manifest.json",
        "runs/bb/bundle/model.onnx",
    }


def test_heads_are_as_the_format_says(folder: Path, tmp_path: Path) -> None:
    """With the merchant's signature and the countersignature."""
    (line,) = files_of(folder, tmp_path / "s.zip")["witness.jsonl"].splitlines()
    head = json.loads(line)
    names = {"merchant", "seq", "link", "signature", "body", "countersignature"}
    assert set(head) == names
    assert (head["merchant"], head["seq"]) == ("shop", 1)


def test_the_coordinator_signed_it(folder: Path, tmp_path: Path) -> None:
    """With the key that merchants pinned as the witness."""
    files_of(folder, tmp_path / "s.zip")
    evidence = read_evidence(tmp_path / "s.zip")
    assert (evidence.kind, evidence.name) == ("server", "coordinator")
    assert evidence.key == read_members(folder / "members.toml").witness


def test_private_and_stray_files_stay_out(folder: Path, tmp_path: Path) -> None:
    """The key, notes in any folder, links, comments, paths."""
    server = folder / "server"
    for place in (server, server / "runs", server / "runs" / "aa", server / "runs" / "bb/bundle"):
        (place / "notes.txt").write_text("a stray note")
    (server / "runs" / "never-started").mkdir()
    members = (folder / "members.toml").read_text()
    (folder / "members.toml").write_text("# a private remark\n" + members)
    files = files_of(folder, tmp_path / "e")
    text = b"\n".join([*files.values(), *(name.encode() for name in files)])
    text += (tmp_path / "e" / "evidence.json").read_bytes()
    key = (server / "identity.key").read_text().strip()
    for secret in ("stray note", "private remark", str(tmp_path), "secret-place", key, "sqlite"):
        assert secret.encode() not in text, secret
    assert bytes.fromhex(key) not in text
    assert "runs/bb/bundle/notes.txt" not in files


def test_a_bundle_that_is_a_link_is_not_followed(folder: Path, tmp_path: Path) -> None:
    """Whatever it points at stays out."""
    (tmp_path / "private").write_text("private")
    model = folder / "server" / "runs" / "bb" / "bundle" / "model.onnx"
    model.unlink()
    model.symlink_to(tmp_path / "private")
    assert "runs/bb/bundle/model.onnx" not in files_of(folder, tmp_path / "s.zip")


def test_an_unfinished_line_is_left_out(folder: Path, tmp_path: Path) -> None:
    """A power cut may leave one; what it says was never acted upon."""
    path = folder / "server" / "runs" / "aa" / "run.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "su')
    assert files_of(folder, tmp_path / "s.zip")["runs/aa/run.jsonl"] == whole


def test_a_broken_manifest_is_told(folder: Path, tmp_path: Path) -> None:
    """It names the file."""
    (folder / "server" / "runs" / "bb" / "bundle" / "manifest.json").write_text("nothing")
    with pytest.raises(RunError, match=r"manifest\.json: is no manifest"):
        federation_evidence(folder, tmp_path / "s.zip")


def test_another_coordinators_folder(folder: Path, tmp_path: Path) -> None:
    """Who is not the pinned witness makes no evidence."""
    members = read_members(folder / "members.toml")
    other = Members(members.keys, Identity.generate("coordinator").public)
    write_members(other, folder / "members.toml")
    with pytest.raises(RunError, match="is not the key of the witness"):
        federation_evidence(folder, tmp_path / "s.zip")


@pytest.mark.parametrize("missing", ["members.toml", "server/identity.key"])
def test_a_missing_file_is_told(folder: Path, tmp_path: Path, missing: str) -> None:
    """By name; nothing is written."""
    (folder / missing).unlink()
    with pytest.raises(IdentityError, match=missing.rpartition("/")[2]):
        federation_evidence(folder, tmp_path / "s.zip")
    assert not (tmp_path / "s.zip").exists()
