"""Building the operator library, finding it, and its interface to onnxruntime."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

import onnxnorm
from onnxnorm.errors import ProviderError
from onnxnorm.ops import bodies, build, library
from tests.ops.calls import needs_library
from tools import check_abi

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
MINGW = "x86_64-w64-mingw32-g++-posix"


@needs_compiler
def test_a_compiler_is_enough() -> None:
    assert library.describe().path is not None, library.describe().missing


@needs_library
def test_the_library_has_the_operators_that_have_bodies() -> None:
    assert set(library.describe().operators) == set(bodies.OPERATORS)


@needs_library
def test_the_library_exports_little() -> None:
    if shutil.which("nm") is None or not sys.platform.startswith("linux"):
        pytest.skip("no nm")
    path = str(library.describe().path)
    command = ["nm", "-D", "--defined-only", path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    names = {line.split()[2] for line in done.stdout.splitlines() if line.split()[1] == "T"}
    assert names == {"RegisterCustomOps", "onnxnorm_ops_describe", "onnxnorm_ops_select"}


def test_without_a_compiler_the_build_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "compiler", lambda: None)
    (tmp_path / build.LIBRARY).write_text("an older one")
    built = build.build(tmp_path)
    assert built.library is None
    assert "no C++ compiler was found" in built.missing[0]
    assert not (tmp_path / build.LIBRARY).exists(), "a library of other source is taken away"


@needs_compiler
def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_FLAGS", ("-std=none",))
    built = build.build(tmp_path)
    assert built.library is None
    assert "the compiler failed:" in built.missing[0]


@needs_library
@needs_compiler
def test_an_up_to_date_library_is_copied_and_not_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_compile", lambda *_, **__: pytest.fail("it was compiled"))
    assert build.build(tmp_path / "new").library == tmp_path / "new" / build.LIBRARY


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(MINGW) is None, reason="no compiler for Windows")
def test_the_library_can_be_built_for_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", MINGW)
    monkeypatch.setattr(build, "_WINDOWS", True)
    monkeypatch.setattr(build, "BUILT", tmp_path)
    built = build.build(tmp_path)
    assert built.library is not None, built.missing
    assert built.missing == ()
    command = ["x86_64-w64-mingw32-objdump", "-p", str(built.library)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in ("RegisterCustomOps", "onnxnorm_ops_describe", "onnxnorm_ops_select"):
        assert f" {name}\n" in said
    needed = {line.split()[-1].lower() for line in said.splitlines() if "DLL Name" in line}
    assert needed <= {"kernel32.dll", "msvcrt.dll"}
    assert build.build(tmp_path, build.Kind.CUDA).library is None


def without_library(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    found = library.Library(None, missing=missing)
    monkeypatch.setattr(library, "describe", lambda: found)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    without_library(monkeypatch, "no C++ compiler was found")
    lines = library.summary(library.describe())
    assert lines[0].startswith("operator library: none")
    assert "missing: no C++ compiler was found" in lines
    with pytest.raises(ProviderError, match="no operator library: no C"):
        onnxnorm.register_ops(onnxruntime.SessionOptions())


def command(*arguments: str) -> Any:
    return subprocess.run(
        [sys.executable, "-m", "onnxnorm", "ops", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@needs_library
def test_the_command_shows_the_library() -> None:
    done = command()
    assert done.returncode == 0
    assert f"instruction set: {library.describe().instruction_set}" in done.stdout
    assert all(name in done.stdout for name in bodies.OPERATORS)
    done = command("--path")
    assert done.stdout.splitlines()[-1] == str(library.describe().path)


@needs_library
def test_the_instruction_set_can_be_chosen_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    last = library.describe().usable[-1]
    monkeypatch.setenv("ONNXNORM_INSTRUCTION_SET", last)
    assert f"instruction set: {last}" in command().stdout


# ** memory and undefined behaviour **


@needs_compiler
def test_the_sanitizers_find_nothing(tmp_path: Path) -> None:
    """The best instruction set, briefly; `pytest -m slow` takes all of them, and longer."""
    fuzz(tmp_path, library.describe().usable[:1], 60)


@needs_compiler
@pytest.mark.slow
def test_the_sanitizers_find_nothing_in_any_instruction_set(tmp_path: Path) -> None:
    fuzz(tmp_path, library.describe().usable, 2000)


def has_sanitizers(folder: Path) -> bool:
    """Whether an empty program can be built with them."""
    empty = folder / "empty.cc"
    empty.write_text("int main() {}\n")
    command = [*(build.compiler() or ()), *build.SANITIZE, empty, "-o", folder / "empty"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def fuzz(
    folder: Path,
    instruction_sets: Sequence[str],
    rounds: int,
    kind: build.Kind = build.Kind.CPU,
) -> None:
    source = Path(__file__).with_name("fuzz.cc")
    if not has_sanitizers(folder):
        pytest.skip("the compiler has no sanitizers")
    build.build_program(source, folder / "fuzz", only=instruction_sets, kind=kind)
    done = subprocess.run(
        [str(folder / "fuzz"), "1", str(rounds)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.split("\n")[:-1] == [f"{name}: {rounds} rounds" for name in instruction_sets]


# ** the C interface **


def test_the_abi_is_that_of_the_official_header() -> None:
    include = check_abi.find(None)
    if include is None:
        pytest.skip("no onnxruntime_c_api.h; tools/check_abi.py says where it is looked for")
    assert check_abi.check(include) is None


def test_a_wrong_declaration_is_found(tmp_path: Path) -> None:
    include = check_abi.find(None)
    if include is None:
        pytest.skip("no onnxruntime_c_api.h; tools/check_abi.py says where it is looked for")
    shutil.copytree(build.SOURCES, tmp_path / "csrc")
    header = tmp_path / "csrc/ort_abi.h"
    right = header.read_text("utf-8")
    for was, wrong in (
        ("Unused<52, 57>", "Unused<52, 58>"),
        ("std::size_t total, std::size_t batches", "std::size_t total, int batches"),
    ):
        assert was in right
        header.write_text(right.replace(was, wrong), "utf-8")
        assert check_abi.check(include, sources=tmp_path / "csrc") is not None


RUNTIME = r"""
#include <cstdio>
#include <cstdlib>
#include <vector>
#include "ort_abi.h"
namespace ort = onnxnorm::ort;
extern "C" ort::Status* RegisterCustomOps(ort::SessionOptions*, const ort::ApiBase*);
static ort::Status* create(ort::ErrorCode, const char* text) { std::puts(text); return nullptr; }
static ort::Status* domain(const char*, ort::CustomOpDomain**) { return nullptr; }
// A session that ends with the program still calls its operators.
struct Session {
  std::vector<const ort::CustomOp*> ops;
  ~Session() {
    for (const ort::CustomOp* op : ops) {
      std::printf(*op->GetName(op) == 0 ? "no name\n" : "%u\n", op->version);
    }
  }
} session;
static ort::Status* add(ort::CustomOpDomain*, const ort::CustomOp* op) {
  session.ops.push_back(op); return nullptr; }
static ort::Status* add_domain(ort::SessionOptions*, ort::CustomOpDomain*) { return nullptr; }
static ort::Api api{};
static const char* text;
static std::uint32_t newest;
int main(int, char** argv) {
  text = argv[1];
  newest = static_cast<std::uint32_t>(std::atoi(argv[2]));
  api.CreateStatus = create;
  api.CreateCustomOpDomain = domain;
  api.CustomOpDomain_Add = add;
  api.AddCustomOpDomain = add_domain;
  ort::ApiBase base{[](std::uint32_t version) -> const ort::Api* {
    if (version > newest) std::printf("asked for %u\n", version);
    return version <= newest ? &api : nullptr; }, []() -> const char* { return text; }};
  RegisterCustomOps(nullptr, &base);
}
"""


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that registers the library as an onnxruntime of some version would."""
    folder = tmp_path_factory.mktemp("runtime")
    (folder / "runtime.cc").write_text(RUNTIME, "utf-8")
    compiler, path = build.compiler(), library.describe().path
    assert compiler is not None
    assert path is not None
    program = [str(folder / "runtime.cc"), str(path), "-o", str(folder / "runtime")]
    flags = ["-std=c++17", f"-I{build.SOURCES}", f"-Wl,-rpath,{path.parent}"]
    subprocess.run([*compiler, *flags, *program], check=True)
    return folder / "runtime"


def registered(runtime: Path, version: str, interface: int) -> set[str]:
    """What an onnxruntime that calls itself `version` is told, and the operators' versions."""
    command = [str(runtime), version, str(interface)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines())


@needs_library
@needs_compiler
def test_an_older_runtime_is_told_so(runtime: Path) -> None:
    asked, told = sorted(registered(runtime, "1.16.3", 16))
    assert asked == "asked for 17"
    assert "needs onnxruntime 1.17 or newer, and this is 1.16.3" in told


@needs_library
@needs_compiler
@pytest.mark.parametrize(
    ("version", "interface", "carried"),
    [
        ("1.17.3", 17, "17"),
        ("1.18.0", 18, "18"),
        ("1.31.1", 31, "18"),
        ("2.0.0", 40, "18"),
        ("a build of our own", 18, "17"),
    ],
)
def test_operators_carry_a_version_that_the_runtime_knows(
    version: str, interface: int, carried: str, runtime: Path
) -> None:
    """And it is asked for none that it lacks: it would print a line."""
    assert registered(runtime, version, interface) == {carried}


@needs_library
@needs_compiler
def test_a_version_that_says_more_than_there_is_does_no_harm(runtime: Path) -> None:
    assert registered(runtime, "1.18.0-dev", 17) == {"asked for 18", "17"}
