"""Tests of the published bundle: whole or not at all, and every byte counts."""

import base64
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from common.bundle import MANIFEST, canonical_json, read_bundle, write_bundle
from common.contract import Contract, contract_toml, parse_contract
from common.errors import BundleError

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def contract() -> Contract:
    """Build a small contract with a linear model of six parameters."""
    document = {
        "federation": {"name": "test"},
        "features": [{"name": "a"}, {"name": "b"}],
        "segments": {"names": ["x", "y"]},
        "model": {"family": "linear"},
        "privacy": {"epsilon": 1.0, "delta": 1e-5},
    }
    return parse_contract(document, source="test")


def files(theta: np.ndarray | None = None) -> dict[str, bytes]:
    """Return the files of a bundle."""
    theta = np.arange(6, dtype=np.float32) if theta is None else theta
    return {
        "contract.toml": contract_toml(contract()).encode(),
        "model.safetensors": save({"parameters": theta}),
        "segments.json": b'{"segments": []}\n',
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give a folder that holds a bundle."""
    write_bundle(tmp_path / "bundle", files(), KEY)
    return tmp_path / "bundle"


class TestRead:
    """read_bundle."""

    def test_what_was_written(self, folder: Path) -> None:
        """Contract, parameters and the model's hash come back."""
        bundle = read_bundle(folder)
        assert bundle.contract.sha256 == contract().sha256
        assert bundle.parameters.tolist() == [0, 1, 2, 3, 4, 5]
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        assert bundle.model_sha256 == digest

    @pytest.fixture(scope="class")
    @staticmethod
    def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Give one bundle for many flipped bytes."""
        folder = tmp_path_factory.mktemp("shared") / "bundle"
        write_bundle(folder, files(), KEY)
        return folder

    @settings(max_examples=300, deadline=None)
    @given(st.data())
    def test_any_changed_byte_is_seen(self, shared: Path, data: st.DataObject) -> None:
        """Whatever byte of whatever file is changed, to whatever, the bundle is refused."""
        path = shared / data.draw(st.sampled_from([*files(), MANIFEST]))
        right = path.read_bytes()
        offset = data.draw(st.integers(0, len(right) - 1))
        byte = data.draw(st.integers(0, 255).filter(lambda value: value != right[offset]))
        try:
            path.write_bytes(right[:offset] + bytes([byte]) + right[offset + 1 :])
            with pytest.raises(BundleError, match="bundle"):
                read_bundle(shared)
        finally:
            path.write_bytes(right)

    def test_unused_bits_of_the_signature(self, folder: Path) -> None:
        """A signature that decodes to the same bytes but reads differently is refused."""
        path = folder / MANIFEST
        manifest = json.loads(path.read_bytes())
        last = manifest["signature"][-3]
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
        other = letters[letters.index(last) ^ 1]
        signature = manifest["signature"][:-3] + other + "=="
        assert base64.b64decode(signature) == base64.b64decode(manifest["signature"])
        path.write_text(path.read_text().replace(manifest["signature"], signature))
        with pytest.raises(BundleError, match="signature"):
            read_bundle(folder)

    @pytest.mark.parametrize("name", [*files(), MANIFEST])
    def test_missing_file(self, folder: Path, name: str) -> None:
        """A missing file is named."""
        (folder / name).unlink()
        with pytest.raises(BundleError, match=f"{name}: is missing"):
            read_bundle(folder)

    @pytest.mark.parametrize("make", [Path.touch, Path.mkdir])
    def test_added_file(self, folder: Path, make: object) -> None:
        """An added file or folder is named."""
        make(folder / "extra.json")  # type: ignore[operator]
        with pytest.raises(BundleError, match=r"extra\.json: is not in the manifest"):
            read_bundle(folder)

    @pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"files": 3}', "{" * 50])
    def test_no_manifest(self, folder: Path, text: str) -> None:
        """A manifest that is something else is refused in words."""
        (folder / MANIFEST).write_text(text)
        with pytest.raises(BundleError, match="no manifest"):
            read_bundle(folder)

    def test_no_bundle(self, tmp_path: Path) -> None:
        """An empty, a missing and a plain file are no bundles."""
        (tmp_path / "file").touch()
        for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
            with pytest.raises(BundleError):
                read_bundle(path)

    @pytest.mark.parametrize(
        "theta",
        [
            np.zeros(5, dtype=np.float32),
            np.zeros((2, 3), dtype=np.float32),
            np.zeros(6, dtype=np.float64),
            np.full(6, np.nan, dtype=np.float32),
        ],
        ids=["short", "axes", "dtype", "nan"],
    )
    def test_other_model(self, tmp_path: Path, theta: np.ndarray) -> None:
        """A signed bundle whose model is not the contract's is refused."""
        write_bundle(tmp_path / "b", files(theta), KEY)
        with pytest.raises(BundleError, match="6 finite"):
            read_bundle(tmp_path / "b")

    def test_broken_model(self, tmp_path: Path) -> None:
        """A signed file that is no model is refused."""
        write_bundle(tmp_path / "b", {**files(), "model.safetensors": b"x"}, KEY)
        with pytest.raises(BundleError, match=r"model\.safetensors: cannot be read"):
            read_bundle(tmp_path / "b")

    @pytest.mark.parametrize("name", ["contract.toml", "model.safetensors"])
    def test_needed_files(self, tmp_path: Path, name: str) -> None:
        """A signed bundle without contract or model is refused."""
        write_bundle(tmp_path / "b", {k: v for k, v in files().items() if k != name}, KEY)
        with pytest.raises(BundleError, match=f"{name}: is missing"):
            read_bundle(tmp_path / "b")

    @pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/file", ".."])
    def test_names_stay_inside(self, folder: Path, name: str) -> None:
        """A manifest, even a signed one, cannot name a file outside of the bundle."""
        body = json.loads((folder / MANIFEST).read_bytes())
        del body["signature"]
        body["files"][name] = "0" * 64
        signature = base64.b64encode(KEY.sign(canonical_json(body))).decode()
        text = json.dumps({**body, "signature": signature}, indent=2, sort_keys=True)
        (folder / MANIFEST).write_text(text)
        with pytest.raises(BundleError, match=MANIFEST):
            read_bundle(folder)


class TestWrite:
    """write_bundle."""

    def test_replaces(self, folder: Path) -> None:
        """A newer bundle takes the older one's place, and nothing else is left behind."""
        write_bundle(folder, {**files(), "new.json": b"{}"}, KEY)
        assert (folder / "new.json").is_file()
        read_bundle(folder)
        assert [path.name for path in folder.parent.iterdir()] == ["bundle"]

    def test_never_over_something_else(self, tmp_path: Path) -> None:
        """A folder with other things in it is left alone."""
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "cat.jpg").touch()
        with pytest.raises(BundleError, match="is no bundle"):
            write_bundle(tmp_path / "photos", files(), KEY)
        assert (tmp_path / "photos" / "cat.jpg").exists()

    def test_failure_leaves_the_older(self, folder: Path) -> None:
        """When a file cannot be written the older bundle stays, whole, and alone."""
        with pytest.raises(BundleError, match="cannot be written"):
            write_bundle(folder, {**files(), "no/such/folder": b""}, KEY)
        read_bundle(folder)
        assert [path.name for path in folder.parent.iterdir()] == ["bundle"]

    def test_killed_before_the_swap(self, folder: Path) -> None:
        """A half-written bundle beside the older one is no harm, and goes with the next."""
        partial = folder.with_name("bundle.partial")
        shutil.copytree(folder, partial)
        (partial / MANIFEST).unlink()
        read_bundle(folder)
        write_bundle(folder, files(), KEY)
        assert not partial.exists()

    def test_failed_swap(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """When the new folder cannot be put in place the older one comes back."""
        import os

        real = os.replace

        def refuse(source: Path, target: Path) -> None:
            if str(source).endswith(".partial"):
                raise OSError("no")
            real(source, target)

        monkeypatch.setattr(os, "replace", refuse)
        with pytest.raises(BundleError, match="cannot be written"):
            write_bundle(folder, files(), KEY)
        read_bundle(folder)


def test_canonical_json_refuses_nan() -> None:
    """What is signed is JSON: NaN has no place in it."""
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"x": float("nan")})
