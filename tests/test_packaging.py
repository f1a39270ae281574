"""The package as it is installed, and the files around it."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path
from typing import Any, Final

import pytest

import onnxnorm
from onnxnorm.passes import PASSES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT: Final = Path(__file__).parents[1]
README: Final = (ROOT / "README.md").read_text("utf-8")
PYPROJECT: Final[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
BASH: Final = shutil.which("bash")
# Imported only where the caller has made something with it.
BROUGHT_BY_THE_CALLER: Final = {"onnx_ir"}


def table_of(heading: str) -> list[list[str]]:
    """The cells of the table under a heading of the README, without its title rows."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


# ** what is installed **


def test_version_is_the_same_everywhere() -> None:
    version = metadata.version("onnxnorm")
    assert version == onnxnorm.__version__ == PYPROJECT["project"]["version"]
    assert f"\n## [{version}] - " in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_the_command_is_a_callable() -> None:
    (command,) = metadata.entry_points(group="console_scripts", name="onnxnorm")
    assert callable(command.load())


def test_the_package_says_that_it_is_typed() -> None:
    assert resources.files("onnxnorm").joinpath("py.typed").is_file()


def test_the_schema_of_the_report_is_in_the_package() -> None:
    schema = json.loads(resources.files("onnxnorm").joinpath("report.schema.json").read_bytes())
    assert schema["$schema"].startswith("https://json-schema.org/")


def test_every_package_and_all_data_is_listed() -> None:
    """A list by hand forgets: each folder with Python files, each file that is not Python."""
    settings = PYPROJECT["tool"]["setuptools"]
    folders = {"onnxnorm": "onnxnorm", "passes": "onnxnorm.passes"}
    listed = {
        path
        for owner, globs in settings["package-data"].items()
        for glob in globs
        for path in (ROOT / owner.replace(".", "/")).glob(glob)
    }
    found, data = set(), []
    for top, package in folders.items():
        for path in (ROOT / top).rglob("*"):
            if path.is_dir() or "__pycache__" in path.parts:
                continue
            if path.is_relative_to(ROOT / "onnxnorm/ops/built"):
                continue  # what the build makes: setup.py puts it into the wheel
            inside = path.parent.relative_to(ROOT / top)
            if path.suffix == ".py":
                found.add(".".join((package, *inside.parts)))
            elif path not in listed:
                data.append(path.relative_to(ROOT).as_posix())
    assert found == set(settings["packages"])
    assert data == []


def provided(distribution: str) -> set[str]:
    """The top-level names that an installed distribution can be imported by."""
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:  # for another platform
        return set()
    return {Path(file.parts[0]).stem for file in files}


def test_every_import_is_declared() -> None:
    requirements = PYPROJECT["project"]["dependencies"]
    declared = {re.split(r"[^\w.-]", each, maxsplit=1)[0] for each in requirements}
    known = set().union(*map(provided, declared), sys.stdlib_module_names)
    known |= {"onnxnorm"} | BROUGHT_BY_THE_CALLER
    missing = set()
    for path in [*(ROOT / "onnxnorm").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            else:
                continue
            unknown = {name.split(".")[0] for name in names} - known
            missing |= {f"{path.relative_to(ROOT).as_posix()}: {name}" for name in unknown}
    assert missing == set()


def test_passes_cannot_be_imported_a_second_time() -> None:
    """From a checkout, `import passes` would make a second copy of every class."""
    spec = importlib.util.spec_from_file_location("passes", ROOT / "passes/__init__.py")
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=r"import onnxnorm\.passes, not passes"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_onnxnorm_passes_is_importable_from_any_folder(tmp_path: Path) -> None:
    editable = Path(onnxnorm.__file__).is_relative_to(ROOT)
    code = "import onnxnorm.passes as p; print(p.__name__, len(p.PASSES))"
    # In the checkout, its onnxnorm/ hides an installed wheel; an editable install must work there.
    for folder in [tmp_path, ROOT / "tests", *([ROOT] if editable else [])]:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == ["onnxnorm.passes", str(len(PASSES))]


# ** what is written about it **


@pytest.mark.skipif(BASH is None, reason="no bash")
def test_the_check_runs_the_commands_of_the_readme() -> None:
    assert BASH is not None
    done = subprocess.run(
        [BASH, str(ROOT / ".ci/run"), "--commands"], capture_output=True, text=True, check=True
    )
    section = README.split("\n## Two commands\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```sh\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    assert done.stdout == "".join(blocks)
    assert [block.count("\n") for block in blocks] == [1, 1], "each is one line to copy"


def test_the_readme_lists_the_passes() -> None:
    assert [row[0].strip("`") for row in table_of("Passes")] == list(PASSES)


@pytest.mark.parametrize(
    "page", ["README.md", "CHANGELOG.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    source = ROOT / page
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", source.read_text("utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (source.parent / target).exists()] == []


# ** what must not be in a file **

TEXT = {".md", ".py", ".pyi", ".toml", ".json", ".tsv", ".txt", ".cfg", ".yml", ".yaml", ""}
TEXT |= {".cc", ".cu", ".h"}


def text_files() -> list[Path]:
    tops = (".ci", "docs", "models", "onnxnorm", "passes", "tests", "tools")
    files = [path for top in tops for path in (ROOT / top).rglob("*")]
    files += ROOT.glob("*.md")
    files += [ROOT / "pyproject.toml", ROOT / ".gitignore", ROOT / ".gitattributes"]
    return sorted(
        path
        for path in files
        if path.is_file() and path.suffix in TEXT and not {"__pycache__", "built"} & {*path.parts}
    )


@pytest.mark.parametrize("path", text_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_path_of_somebodys_machine(path: Path) -> None:
    """A home or scratch folder that is written out works on one machine only."""
    pattern = r"(?<![\w.})\]/-])/(?:home|root|Users|tmp|mnt|workspace|work)/[\w.-]+"
    assert re.findall(pattern, path.read_text("utf-8")) == []


@pytest.mark.parametrize("name", [".ci/run", "pyproject.toml"])
def test_the_package_index_is_the_users_choice(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    assert re.findall(r"--(?:extra-)?index-url|--find-links|--trusted-host", text) == []
    assert "://" not in text
