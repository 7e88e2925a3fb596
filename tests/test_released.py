"""data.py get: files as they were released, in the layout of --data-dir, or none at all."""

import bz2
import hashlib
import os
import re
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

import data
from bench.streams import clinc150
from support import released
from support.corpus import sha256_of

ROOT = Path(__file__).resolve().parent.parent
DATA = os.environ.get("NESTED_DATA")


def sha256(text):
    return hashlib.sha256(text).hexdigest()


@pytest.fixture
def network(tmp_path, monkeypatch):
    """A `datasets` that takes addresses from a folder; the addresses it was asked for."""
    asked = []

    class DownloadManager:
        def download(self, address):
            asked.append(address)
            path = tmp_path / "network" / address.removeprefix("https://")
            if not path.exists():
                raise ConnectionError("no route to host\nand more")
            return str(path)

        def download_and_extract(self, address):
            archive = self.download(address)
            zipfile.ZipFile(archive).extractall(tmp_path / "extracted")
            return str(tmp_path / "extracted")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(DownloadManager=DownloadManager))
    texts = {"a.txt": b"first\r\n", "deep/b.txt": b"second"}
    files = {name: sha256(text) for name, text in texts.items()}
    for name, text in texts.items():
        path = tmp_path / "network/host/files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    with zipfile.ZipFile(tmp_path / "network/host/all.zip", "w") as archive:
        for name, text in texts.items():
            archive.writestr(f"inside/{name}", text)
    sets = {
        "plain": released.Released("", "CC0", "https://host/files", files),
        "zipped": released.Released("", "CC0", "https://host/all.zip#inside", files),
        "changed": released.Released("", "CC0", "https://host/files", files | {"a.txt": "00"}),
        "gone": released.Released("", "CC0", "https://gone", files),
    }
    monkeypatch.setattr(released, "SETS", sets)
    monkeypatch.chdir(tmp_path)
    return asked


@pytest.mark.parametrize("name", ["plain", "zipped"])
def test_files_are_fetched_once_and_compared_with_their_checksums(name, network, capsys):
    data.main(["get", name, "--out", "sets"])
    assert Path("sets", name, "a.txt").read_bytes() == b"first\r\n"
    assert Path("sets", name, "deep/b.txt").read_bytes() == b"second"
    assert capsys.readouterr().out.count("its sha256 is right (CC0)\n") == 2
    assert len(network) == 2
    data.main(["get", name, "--out", "sets"])
    assert len(network) == 2
    Path("sets", name, "a.txt").write_bytes(b"mine")
    with pytest.raises(ValueError, match=f"sets/{name}/a.txt is another file: its sha256 is "):
        data.main(["get", name, "--out", "sets"])
    assert Path("sets", name, "a.txt").read_bytes() == b"mine"


def test_nothing_is_written_of_a_file_that_has_changed_or_cannot_be_fetched(network, monkeypatch):
    with pytest.raises(OSError, match="https://host/files/a.txt has changed: its sha256 is .* 00"):
        data.main(["get", "changed"])
    with pytest.raises(OSError, match=r"https://gone/a.txt could not .* \(no route to host\)$"):
        data.main(["get", "gone"])
    with pytest.raises(ValueError, match="unknown data set 'plane': .* did you mean 'plain'"):
        data.main(["get", "plain", "plane"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install -r requirements-data.txt"):
        data.main(["get", "plain"])
    assert not Path("data").exists() and not Path("sets").exists()


def test_without_a_name_the_sets_are_listed_as_in_the_docs(capsys):
    data.main(["get"])
    assert capsys.readouterr().out in (ROOT / "docs/data.md").read_text()


def test_sets_are_named_and_checked_in_full():
    for name, own in released.SETS.items():
        assert own.what and own.licence and own.folder.startswith("https://") and own.files, name
        assert all(re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in own.files.values()), name


@pytest.mark.skipif(not DATA, reason="NESTED_DATA names no folder of data sets")
def test_checksums_are_of_the_files_that_were_measured_with(tmp_path, monkeypatch):
    for name, own in released.SETS.items():
        for file, wanted in own.files.items():
            path = Path(DATA, name, file)
            if path.exists():
                assert sha256_of(path) == wanted, path
            else:
                assert sha256(bz2.open(f"{path}.bz2").read()) == wanted, path
    # what is fetched lies where the benchmarks look for it
    monkeypatch.setattr(released, "_fetch", lambda folder, file: Path(DATA, "clinc150", file))
    released.get("clinc150", tmp_path)
    to_choose, to_report = clinc150(tmp_path)
    assert len(to_choose) == len(to_report) == 10
