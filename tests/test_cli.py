"""The command: what it prints, where, and with which exit code."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Final

import jsonschema
import numpy as np
import onnx
import pytest
from onnx import parser

from onnxnorm import api, cli, report
from onnxnorm.matcher import Match
from onnxnorm.module import SITE_KEY
from onnxnorm.pattern import op, var
from onnxnorm.report_markdown import render_markdown
from onnxnorm.rewrite import RewritePass, Rewriter

# Three places that fold, one that is refused, and one that only resembles a place.
MODEL: Final = """
<ir_version: 8, opset_import: ["" : 17]>
main (float[N,2,3,3] x) => (float[N,2,3,3] y, float[N,2,3,3] q)
<float[2,2,1,1] w = {2.0, -1.0, 0.5, 1.0}, float[2] gamma = {1.0, 3.0},
 float[2] beta = {2.0, 0.5}, float[2] mean = {1.0, 0.25}, float[2] variance = {0.5, 0.01}>
{
   c0 = Conv (x, w)
   b0 = BatchNormalization (c0, gamma, beta, mean, variance)
   c1 = Conv (b0, w)
   b1 = BatchNormalization (c1, gamma, beta, mean, variance)
   r1 = Relu (b1)
   c2 = Conv (r1, w)
   b2 = BatchNormalization (c2, gamma, beta, mean, variance)
   q = Conv (b2, w)
   b3 = BatchNormalization (q, gamma, beta, mean, variance)
   t = Tanh (b3)
   y = BatchNormalization (t, gamma, beta, mean, variance)
}
"""
FAST: Final = ("--provider", "cpu", "--no-latency")
BLIND: Final = ("--no-parity", "--no-latency")


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def report(self) -> dict[str, Any]:
        """Standard output as one report, which must satisfy the schema."""
        data: dict[str, Any] = json.loads(self.out)
        jsonschema.validate(data, report.load_schema())
        return data


Command = Callable[..., Outcome]


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run the command in this process; nothing may reach its streams by other ways."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str | Path) -> Outcome:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return Outcome(ended.value.code, out, err)

    return run


def test_inspect_leaves_the_collector_as_it_was(command: Command, model: Path) -> None:
    assert command("inspect", model).code == 0
    assert gc.isenabled()
    assert command("inspect", model.parent / "missing.onnx").code == 2
    assert gc.isenabled()


def in_process(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command as its own process."""
    return subprocess.run(
        [sys.executable, "-m", "onnxnorm", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        timeout=120,
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(parser.parse_model(MODEL), path)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.onnx"


def sites(data: dict[str, Any], action: str = "applied") -> set[str]:
    return {row["site"] for row in data["sites"] if row["action"] == action}


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# ** reports **


def test_json_is_one_object_on_standard_output(command: Command, model: Path, out: Path) -> None:
    done = command("optimize", model, out, "--json", *FAST)
    assert (done.code, done.err) == (0, "")
    data = done.report
    assert data["command"] == "optimize"
    assert data["version"] == version("onnxnorm")
    assert data["parity"]["passed"] is True
    assert {o["name"] for o in data["parity"]["outputs"]} == {"y", "q"}
    assert all(o["error"] <= o["budget"] for o in data["parity"]["outputs"])
    assert data["latency"] is None
    assert data["latency_skipped"] == "--no-latency was given"
    assert data["nodes"] == {"before": 11, "after": 8}
    assert sites(data) == {f"fold-batchnorm:b{i}" for i in range(3)}
    assert sites(data, "refused") == {"fold-batchnorm:b3", "fold-affine:y"}
    assert sites(data, "missed") == {"fold-batchnorm:y"}
    assert [n["action"] for n in data["norms"]] == ["folded"] * 3 + ["refused", "refused"]
    assert data["files"] == [
        {"path": str(out), "role": "model", "bytes": out.stat().st_size},
    ]


def test_report_files(command: Command, model: Path, out: Path, tmp_path: Path) -> None:
    as_json, as_text = tmp_path / "r.json", tmp_path / "r.md"
    done = command(
        "optimize", model, out, "--report", as_json, "--report", as_text, "--json", *FAST
    )
    assert json.loads(as_json.read_text()) == done.report
    text = as_text.read_text()
    assert text == render_markdown(done.report)
    assert "3 of 5 batch normalizations folded" in text
    shown = command("optimize", model, out, "--report", as_json, "--report", as_text, *FAST).out
    assert f"report: {as_json}" in shown
    assert f"report: {as_text}" in shown


@pytest.mark.parametrize("what", ["inspect", "compare"])
def test_other_commands_report_too(
    command: Command, model: Path, tmp_path: Path, what: str
) -> None:
    given = [what, model] if what == "inspect" else [what, model, model, *FAST]
    file = tmp_path / "r.json"
    done = command(*given, "--json", "--report", file)
    assert done.code == 0
    assert done.report["command"] == what
    assert json.loads(file.read_text()) == done.report


def test_the_terminal_says_what_the_json_says(command: Command, model: Path, out: Path) -> None:
    done = command("optimize", model, out, *FAST)
    assert (done.code, done.err) == (0, "")
    assert "3 of 5 batch normalizations folded into Conv and 2 refused" in done.out
    assert "agree with the original" in " ".join(done.out.split())
    assert "its result 'q' is a graph output" in " ".join(done.out.split())
    assert str(out) in done.out.replace("\n", "")
    assert max(map(len, done.out.splitlines())) <= 80 or len(str(out)) > 60


def test_quiet_prints_nothing(command: Command, model: Path, out: Path, tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    done = command("optimize", model, out, "--quiet", "--report", file, *FAST)
    assert done == Outcome(0, "", "")
    assert out.exists()
    assert file.exists()
    assert command("inspect", model, "-q") == Outcome(0, "", "")
    wrong = command("inspect", tmp_path / "missing.onnx", "-q")
    assert (wrong.code, wrong.out, len(wrong.err.splitlines())) == (2, "", 2)


def test_a_dry_run_writes_nothing_and_says_so(
    command: Command, model: Path, out: Path, tmp_path: Path
) -> None:
    for target in ([out], []):
        done = command("optimize", model, *target, "--dry-run")
        assert done.code == 0
        assert "3 of 5 batch normalizations would be folded" in done.out
        assert "dry run" in done.out
        assert "Wrote" not in done.out
    data = command("optimize", model, out, "--dry-run", "--json").report
    assert data["dry_run"] is True
    assert data["files"] == []
    assert data["parity"] is None
    assert names(tmp_path) == ["model.onnx"]


def test_time_passes(command: Command, model: Path, out: Path) -> None:
    title = next(
        line
        for line in command("optimize", model, out, "--time-passes", *BLIND).out.splitlines()
        if line.split()[:1] == ["pass"]
    )
    assert title.split()[-1] == "time"
    assert "time" not in command("optimize", model, out, *BLIND).out.split()


@pytest.mark.parametrize("which", ["fold-batchnorm", "all"])
def test_print_after(command: Command, model: Path, out: Path, which: str) -> None:
    done = command("optimize", model, out, "--print-after", which, "--json", *BLIND)
    assert done.report
    assert done.err.startswith("// after fold-batchnorm\n")
    graph = parser.parse_graph(done.err.partition("\n")[2])
    assert [n.op_type for n in graph.node].count("BatchNormalization") == 2


def test_print_after_a_pass_that_changed_nothing(command: Command, model: Path, out: Path) -> None:
    done = command("optimize", model, out, "--only", "b3", "--print-after", "all", *BLIND)
    assert (done.code, done.err) == (0, "")


# ** what is changed, and where it goes **


@pytest.mark.parametrize("prefix", ["", "fold-batchnorm:"])
def test_only_and_skip(command: Command, model: Path, out: Path, prefix: str) -> None:
    every = {f"fold-batchnorm:b{i}" for i in range(3)}
    done = command("optimize", model, out, "--only", f"{prefix}b1", "--json", *BLIND)
    assert sites(done.report) == {"fold-batchnorm:b1"}
    assert sites(done.report, "skipped") == every - {"fold-batchnorm:b1"}
    assert [n["action"] for n in done.report["norms"]][:3] == ["kept", "folded", "kept"]
    done = command("optimize", model, out, "--skip", f"{prefix}b1", "--json", *BLIND)
    assert sites(done.report) == every - {"fold-batchnorm:b1"}
    done = command(
        "optimize", model, out, "--only", "b0", "--only", "b1", "--skip", "b0", "--json", *BLIND
    )
    assert sites(done.report) == {"fold-batchnorm:b1"}


@pytest.mark.parametrize("option", ["--only", "--skip"])
def test_a_site_that_does_not_exist(command: Command, model: Path, out: Path, option: str) -> None:
    done = command("optimize", model, out, option, "b9", *BLIND)
    assert done.code == 2
    assert done.err.splitlines() == [
        f"error: {option} names 'b9', which is no site of these passes",
        "`onnxnorm inspect -v` lists the sites of a model, with the same --passes.",
    ]
    assert not out.exists()


@pytest.mark.skipif(os.name == "nt", reason="pipes are closed otherwise there")
@pytest.mark.parametrize("form", ["--verbose", "--json"])
def test_a_reader_that_has_seen_enough_is_no_failure(model: Path, form: str) -> None:
    command = [sys.executable, "-m", "onnxnorm", "inspect", str(model), form]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False, timeout=120)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_name_that_is_too_long(command: Command, model: Path) -> None:
    long = model.with_name("x" * 300)
    assert command("inspect", long).err.splitlines()[1] == "Check the path."
    done = command("optimize", model, long, *BLIND)
    assert (done.code, done.err.splitlines()[1]) == (2, "Give a shorter name.")


def test_inspect_verbose_lists_the_sites(command: Command, model: Path) -> None:
    printed = command("inspect", model, "-v").out.split()
    assert sites(command("inspect", model, "--json").report) <= set(printed)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("inspect", "-"), "'-' names no file"),
        (("optimize", "-", "OUT"), "'-' names no file"),
        (("optimize", "MODEL", "-"), "'-' names no file"),
        (("compare", "MODEL", "-"), "'-' names no file"),
        (("optimize", "MODEL", "OUT", "--seed", "-1"), "Invalid value for '--seed': -1"),
        (("optimize", "MODEL", "OUT", "--ablation", "all", "--no-latency"), "--ablation all was"),
        (("optimize", "MODEL", "--dry-run", "--ablation", "fold-sizes"), "--ablation fold-sizes"),
        (
            ("optimize", "MODEL", "OUT", "--choices", "MISSING"),
            "cannot be read as choices: No such",
        ),
        (
            ("optimize", "MODEL", "OUT", "--input-shape", "x:1", "--input-shape", "x:2"),
            "Invalid value for '--input-shape': an input is named twice",
        ),
        (
            ("compare", "MODEL", "MODEL", "--sweep", "N=1", "--sweep", "N=2"),
            "Invalid value for '--sweep': an axis is named twice",
        ),
        (("compare", "MODEL", "MODEL", "--provider", "cpu,cpu"), "a provider is named twice"),
        (
            ("optimize", "MODEL", "OUT", "--only", "a:b", "--skip", "a:b"),
            "the only sites, a:b, are all",
        ),
        (
            ("optimize", "MODEL", "OUT", "--runtime-version", "1.20"),
            "--runtime-version 1.20 was given for the target onnx",
        ),
        (
            ("inspect", "MODEL", "--runtime-version", "1.20"),
            "--runtime-version 1.20 was given for the target onnx",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(
    command: Command, model: Path, out: Path, arguments: Sequence[str], what: str
) -> None:
    named = {"MODEL": str(model), "OUT": str(out), "MISSING": str(out.with_name("no.json"))}
    done = command(*(named.get(each, each) for each in arguments))
    assert done.code == 2
    assert len(done.err.splitlines()) == 2
    assert what in done.err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        *((("optimize", "MODEL", "OUT", *BLIND, *each), each[0])
          for each in (("--inputs", "MISSING"), ("--input-shape", "x:1,2,3,3"), ("--seed", "1"),
                       ("--provider", "cuda"), ("--time-budget", "1"), ("--threads", "1"))),
        (("optimize", "MODEL", "OUT", "--no-latency", "--keep-slower"), "--keep-slower"),
        (("optimize", "MODEL", "OUT", "--inputs", "MISSING", "--input-shape", "x:1,2,3,3"),
         "--input-shape"),
        (("optimize", "MODEL", "OUT", "-q", "--time-passes"), "--time-passes"),
        (("inspect", "MODEL", "-q", "-v"), "--verbose"),
        (("inspect", "MODEL", "--provider", "cpu"), "--provider"),
        (("compare", "MODEL", "MODEL", "--max-regression", "0.1"), "--max-regression"),
        (("ops", "--cuda-kernels"), "--cuda-kernels"),
    ],
)  # fmt: skip
def test_an_option_that_does_nothing_is_refused(
    command: Command, model: Path, out: Path, arguments: Sequence[str], option: str
) -> None:
    named = {"MODEL": str(model), "OUT": str(out), "MISSING": str(out.with_name("no.npz"))}
    done = command(*(named.get(each, each) for each in arguments))
    assert done.code == 2
    what, hint = done.err.splitlines()
    assert what.startswith(f"error: {option} was given, and ")
    assert hint.endswith(f", or leave out {option}.")
    assert not out.exists()


def test_a_dry_run_takes_the_options_of_the_run(command: Command, model: Path) -> None:
    done = command("optimize", str(model), "--dry-run", *BLIND, "--seed", "1", "--threads", "1")
    assert done.code == 0


def test_the_help_says_what_the_exit_status_means(command: Command) -> None:
    lines = [line.split() for line in command("--help").out.splitlines()]
    assert {"0", "1", "2", "130"} <= {words[0] for words in lines if words}


def test_an_original_that_onnxruntime_rejects_says_what_to_do(
    command: Command, model: Path, out: Path
) -> None:
    proto = onnx.load(model)
    proto.ir_version = 99
    proto.graph.node[0].op_type = "Conv"
    onnx.save(proto, model)
    done = command("optimize", model, out, "--no-latency")
    assert done.code == 1
    assert "Update onnxruntime" in done.err
    assert "--no-parity" in done.err


def test_a_site_in_a_body_is_named_with_its_way(
    command: Command, tmp_path: Path, out: Path
) -> None:
    path = tmp_path / "if.onnx"
    branch = "Conv (x, w) {0} = BatchNormalization (p, gamma, gamma, gamma, gamma)"
    onnx.save(
        parser.parse_model(
            '<ir_version: 8, opset_import: ["" : 17]>'
            "main (bool c, float[N,1,3,3] x) => (float[N,1,3,3] y)"
            "<float[1,1,1,1] w = {2.0}, float[1] gamma = {1.5}>"
            "{ y = If (c) <then_branch = t () => (float[N,1,3,3] a)"
            f"{{ p = {branch.format('a')} }}, else_branch = e () => (float[N,1,3,3] b)"
            f"{{ p = {branch.format('b')} }}> }}"
        ),
        path,
    )
    done = command("optimize", path, out, "--only", "y/then_branch/a", "--json", *FAST)
    assert sites(done.report) == {"fold-batchnorm:y/then_branch/a"}
    assert sites(done.report, "skipped") == {"fold-batchnorm:y/else_branch/b"}
    assert done.report["parity"]["passed"] is True


@pytest.mark.parametrize("passes", ["none", ""])
def test_no_passes_give_the_same_bytes(
    command: Command, model: Path, out: Path, passes: str
) -> None:
    done = command("optimize", model, out, "--passes", passes, "--json", *FAST)
    assert (done.code, done.err) == (0, "")
    assert out.read_bytes() == model.read_bytes()
    assert done.report["passes"] == []
    assert done.report["parity"]["passed"] is True
    assert "not needed" in done.report["parity"]["truth"]
    assert done.report["latency_skipped"].startswith("nothing was changed")
    shown = command("optimize", model, out, "--passes", passes, *FAST).out
    assert "not finite" not in shown
    assert "byte for byte" in " ".join(shown.split())


def test_options_of_a_pass(command: Command, model: Path, out: Path) -> None:
    done = command(
        "optimize", model, out, "--passes", "fold-batchnorm{max_copy_mb=0}", "--json", *BLIND
    )
    assert sites(done.report) == set()
    reasons = [r["reason"] for r in done.report["sites"] if r["site"] == "fold-batchnorm:b0"]
    assert "has other readers" in reasons[0]


@pytest.mark.parametrize("what", [["optimize", "out.onnx"], ["inspect"]])
@pytest.mark.parametrize(
    ("given", "line", "hint"),
    [
        ("fold-batchnrm", "there is no pass 'fold-batchnrm'", "Did you mean fold-batchnorm?"),
        ("fold-batchnorm{a=1}", "fold-batchnorm has no option 'a=1'", "max_copy_mb=256"),
        ("fold-batchnorm{max_copy_mb=x}", "'x' is not a value", "type int"),
        ("fold-batchnorm{", "'fold-batchnorm{' is not a list of passes", "in braces"),
    ],
)
def test_wrong_passes(
    command: Command, model: Path, out: Path, what: list[str], given: str, line: str, hint: str
) -> None:
    rest = [out] if len(what) == 2 else []
    done = command(what[0], model, *rest, "--passes", given)
    assert done.code == 2
    assert done.out == ""
    first, second = done.err.splitlines()
    assert first.startswith(f"error: {line}")
    assert hint in second
    assert not out.exists()


def test_in_place(command: Command, model: Path, tmp_path: Path) -> None:
    before = model.read_bytes()
    refused = command("optimize", model, model, *BLIND)
    assert refused.code == 2
    assert refused.err.splitlines()[0] == f"error: {model} is the input"
    assert "--in-place" in refused.err.splitlines()[1]
    link = tmp_path / "link.onnx"
    link.symlink_to(model)
    assert command("optimize", model, link, *BLIND).code == 2
    assert model.read_bytes() == before
    link.unlink()
    assert command("optimize", model, "--in-place", *FAST).code == 0
    assert [n.op_type for n in onnx.load(model).graph.node].count("BatchNormalization") == 2
    assert names(tmp_path) == ["model.onnx"]
    folded = model.read_bytes()
    again = command("optimize", model, model, "--in-place", "--json", *FAST)
    assert model.read_bytes() == folded
    assert again.report["files"] == []
    assert again.report["notes"] == ["Nothing was changed, so nothing was written."]


def test_no_output_named(command: Command, model: Path) -> None:
    done = command("optimize", model)
    assert done.code == 2
    assert done.err.splitlines()[0] == "error: there is no OUT.onnx to write"


def test_the_output_is_left_alone_by_a_second_run(
    command: Command, model: Path, out: Path, tmp_path: Path
) -> None:
    command("optimize", model, out, *BLIND)
    again = tmp_path / "again.onnx"
    done = command("optimize", out, again, "--json", *FAST)
    assert again.read_bytes() == out.read_bytes()
    assert sites(done.report) == set()
    assert done.report["nodes"] == {"before": 8, "after": 8}


def test_the_same_input_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    written = []
    for seed in ("0", "1"):
        target = tmp_path / f"{seed}.onnx"
        done = in_process("optimize", model, target, *BLIND, PYTHONHASHSEED=seed)
        assert (done.returncode, done.stderr) == (0, "")
        written.append(target.read_bytes())
    assert written[0] == written[1]
    assert written[0] != model.read_bytes()


def test_new_nodes_name_their_site(command: Command, model: Path, out: Path) -> None:
    done = command("optimize", model, out, "--json", *BLIND)
    before = {n.SerializeToString() for n in onnx.load(model).graph.node}
    named = set()
    for node in onnx.load(out).graph.node:
        own = {e.value for e in node.metadata_props if e.key == SITE_KEY}
        if node.SerializeToString() in before:
            assert not own
        else:
            assert len(own) == 1
            named |= own
    assert named == sites(done.report) == {f"fold-batchnorm:b{i}" for i in range(3)}


@dataclass(frozen=True)
class Misread(RewritePass):
    """Tanh(x) -> Sigmoid(x), which is wrong."""

    name: ClassVar = "misread"
    summary: ClassVar = "wrong"
    equation: ClassVar = "tanh(x) -> sigmoid(x)"
    pattern: ClassVar = op("Tanh", var("x"))

    def rewrite(self, m: Match, rw: Rewriter) -> None:
        rw.replace("Sigmoid", [m.value("x")])


def test_a_wrong_pass_is_taken_back_with_exit_code_0(
    command: Command, model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxnorm.passes.PASSES", {"misread": f"{__name__}:Misread"})
    monkeypatch.setattr("onnxnorm.registry._load", lambda target: Misread)
    done = command("optimize", model, out, "--passes", "misread", "--json", *FAST)
    assert (done.code, done.err) == (0, "")
    assert sites(done.report, "rolled_back") == {"misread:t"}
    assert "misread:t was taken back" in done.report["warnings"][0]
    assert out.read_bytes() == model.read_bytes()
    shown = " ".join(command("optimize", model, out, "--passes", "misread", *FAST).out.split())
    assert "misread:t" in shown
    assert "taken back" in shown


# ** the other commands **


def test_inspect(command: Command, model: Path, tmp_path: Path) -> None:
    done = command("inspect", model)
    assert (done.code, done.err) == (0, "")
    for value in ("b0", "b1", "b2", "b3", "y"):
        assert any(f" {value} " in line for line in done.out.splitlines()), value
    data = command("inspect", model, "--json").report
    assert data["parity"] is None
    assert data["files"] == []
    first = data["norms"][0]
    assert first["kind"] == "batch_norm"
    assert (first["input"], first["output"], first["site"]) == ("c0", "b0", "fold-batchnorm:b0")
    assert first["axes"] == [0, 2, 3]
    assert first["epsilon"] == 1e-5
    assert names(tmp_path) == ["model.onnx"]


def test_compare(command: Command, model: Path, out: Path, tmp_path: Path) -> None:
    command("optimize", model, out, *BLIND)
    equal = command("compare", model, out, "--json", *FAST)
    assert (equal.code, equal.err) == (0, "")
    assert equal.report["parity"]["passed"] is True
    other = tmp_path / "other.onnx"
    wrong = onnx.load(model)
    wrong.graph.node[1].attribute.append(onnx.helper.make_attribute("epsilon", 0.25))
    onnx.save(wrong, other)
    differs = command("compare", model, other, *FAST)
    assert differs.code == 1
    assert differs.err == ""
    assert "DO NOT AGREE" in differs.out
    assert command("compare", model, other, "-q", *FAST) == Outcome(1, "", "")
    unasked = command("compare", model, other, "--json", *BLIND)
    assert unasked.code == 0
    assert unasked.report["parity_skipped"] == "--no-parity was given"


def test_own_inputs(command: Command, model: Path, out: Path, tmp_path: Path) -> None:
    data = tmp_path / "inputs.npz"
    np.savez(data, x=np.ones((3, 2, 3, 3), np.float32))
    done = command("optimize", model, out, "--inputs", data, "--json", *FAST)
    assert done.code == 0
    assert "3x2x3x3" in done.report["parity"]["inputs"][0]
    done = command("optimize", model, out, "--input-shape", "x:5,2,3,3", "--json", *FAST)
    assert all("5x2x3x3" in told for told in done.report["parity"]["inputs"])


def test_passes_that_are_off_say_how_to_add_them(command: Command, model: Path) -> None:
    said = [line for line in command("passes").out.splitlines() if "(off; " in line]
    assert len(said) >= 4
    for line in said:
        name, _, rest = line.partition("  (off; --passes ")
        wanted = rest.removesuffix(" adds it)")
        assert {*wanted.split(",")} == {"default", name}
        assert command("inspect", model, "--passes", wanted, "--quiet").code == 0


def test_passes(command: Command) -> None:
    rows = json.loads(command("passes", "--json").out)
    (row,) = (r for r in rows if r["name"] == "fold-batchnorm")
    assert row["default"] is True
    assert row["approximate"] is False
    assert row["options"]["max_copy_mb"] == {"type": "int", "default": 256}
    text = command("passes").out
    for row in rows:
        assert row["name"] in text
        assert row["equation"] in text


def test_the_time_budget_is_that_of_the_library() -> None:
    assert cli._TIME_BUDGET == api.TIME_BUDGET


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help(command: Command, arguments: Sequence[str]) -> None:
    done = command(*arguments)
    assert (done.code, done.err) == (0, "")
    for name in ("optimize", "inspect", "compare", "passes"):
        assert f"  {name} " in done.out


@pytest.mark.parametrize("name", ["optimize", "inspect", "compare", "passes"])
def test_help_of_a_command(command: Command, name: str) -> None:
    assert command(name, "--help").out.startswith(f"Usage: onnxnorm {name} ")


def test_version(command: Command) -> None:
    assert command("--version").out.split()[-1] == version("onnxnorm")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["optimise", "a", "b"], "No such command 'optimise'."),
        (["optimize"], "Missing argument 'IN.onnx'."),
        (["optimize", "a", "b", "c"], "Got unexpected extra argument (c)"),
        (["optimize", "a", "b", "--fast"], "No such option"),
        (["optimize", "a", "b", "--provider", "tpu"], "Invalid value for '--provider'"),
        (["optimize", "a", "b", "--threads", "0"], "Invalid value for '--threads'"),
        (["optimize", "a", "b", "--time-budget", "0"], "Invalid value for '--time-budget'"),
        (["optimize", "a", "b", "--seed", "x"], "Invalid value for '--seed'"),
        (["optimize", "a", "b", "--input-shape", "x"], "Invalid value for '--input-shape'"),
        (["optimize", "a", "b", "--input-shape", "x:1,y"], "Invalid value for '--input-shape'"),
        (["optimize", "a", "b", "--input-shape", "x:-1"], "Invalid value for '--input-shape'"),
        (["optimize", "a", "b", "--report", "r.txt"], "cannot tell the form of report r.txt"),
        (["optimize", "a", "b", "--print-after", "x"], "--print-after names 'x'"),
        (["compare", "a"], "Missing argument 'B.onnx'."),
    ],
)
def test_wrong_usage(command: Command, arguments: Sequence[str], line: str) -> None:
    done = command(*arguments)
    assert done.code == 2
    assert done.out == ""
    first, _ = done.err.splitlines()
    assert first.startswith(f"error: {line}")


# ** as a process **


def test_nothing_on_standard_error_that_is_no_terminal(
    model: Path, out: Path, tmp_path: Path
) -> None:
    file = tmp_path / "r.json"
    done = in_process(
        "optimize", model, out, "--provider", "cpu", "--time-budget", "1", "--report", file
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    latency = json.loads(file.read_text())["latency"]
    low, high = latency["interval"]
    assert 0 < low <= latency["ratio"] <= high
    assert latency["verdict"] in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_standard_output_that_is_full(model: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "onnxnorm", "inspect", str(model)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 2
    assert done.stderr.startswith("error: standard output")


def test_a_reader_that_has_seen_enough(model: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "onnxnorm", "inspect", str(model), "--json"],
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(os.name == "nt", reason="streams are closed otherwise there")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_standard_streams_that_are_closed(closed: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    line = f'exec "{sys.executable}" -m onnxnorm optimize "{model}" "{out}" --no-latency {closed}'
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    onnx.checker.check_model(out)


@pytest.mark.skipif(os.name == "nt", reason="file names are UTF-16 there")
def test_names_in_utf8_where_the_locale_is_not(model: Path, tmp_path: Path) -> None:
    given, out = tmp_path / "mödel ü.onnx", tmp_path / "öut.onnx"
    given.write_bytes(model.read_bytes())
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    line = [sys.executable, "-m", "onnxnorm", "optimize", str(given), str(out), "--no-latency"]
    done = subprocess.run(line, capture_output=True, env=os.environ | plain, check=False)
    assert done.returncode == 0, done.stderr
    assert out.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names have to be UTF-8")
def test_a_name_that_is_not_utf8_is_refused_in_words(model: Path, tmp_path: Path) -> None:
    given = tmp_path / os.fsdecode(b"m\xf6del.onnx")
    given.write_bytes(model.read_bytes())
    line = [sys.executable, "-m", "onnxnorm", "optimize", str(given), str(tmp_path / "out.onnx")]
    done = subprocess.run(line, capture_output=True, check=False)
    assert done.returncode == 2
    assert b"names in UTF-8 only" in done.stderr
    assert b"Rename the file" in done.stderr


def test_main_leaves_the_callers_signals_alone(command: Command) -> None:
    before = signal.getsignal(signal.SIGTERM)
    command("passes")
    assert signal.getsignal(signal.SIGTERM) is before


# ** reports of what was measured **


@pytest.fixture
def halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latency without measuring: the candidate takes half."""
    timing = {"p50": 2.0, "p90": 2.5}
    found = {
        "verdict": "faster",
        "ratio": 0.5,
        "interval": [0.49, 0.51],
        "band": [0.99, 1.01],
        "original": timing,
        "candidate": timing,
        "pairs": 8,
        "threads": 1,
        "provider": "cpu",
    }
    monkeypatch.setattr("onnxnorm.workbench.Workbench.time", lambda *_, **__: found)


@pytest.mark.usefixtures("halved")
def test_one_run_gives_all_forms_and_a_report_is_rendered_again(
    command: Command, model: Path, out: Path, tmp_path: Path
) -> None:
    forms = [tmp_path / f"r.{suffix}" for suffix in ("html", "md", "json")]
    reports = [part for form in forms for part in ("--report", form)]
    assert command("optimize", model, out, "--provider", "cpu", *reports).code == 0
    page = forms[0].read_text("utf-8")
    assert "What each pass bought" in page, "a report in HTML leaves each pass out"
    again = tmp_path / "again.html"
    done = command("report", forms[2], "--report", again)
    assert done.code == 0
    assert again.read_text("utf-8") == page
    assert "faster on the CPU" in " ".join(done.out.split())
    assert (
        "would replace the model or report" in command("report", forms[2], "--report", forms[2]).err
    )


@pytest.mark.usefixtures("halved")
def test_a_gain_that_is_gone_fails(command: Command, model: Path, tmp_path: Path) -> None:
    base = tmp_path / "base.json"
    given = ("compare", model, model, "--provider", "cpu")
    assert command(*given, "--report", base).code == 0
    assert command(*given, "--against", base).code == 0
    data = json.loads(base.read_text("utf-8"))
    data["latency"] |= {"ratio": 0.4, "interval": [0.39, 0.41]}
    base.write_text(json.dumps(data), "utf-8")
    done = command(*given, "--against", base)
    assert done.code == 1
    assert "Less is gained than before" in done.out
    assert command(*given, "--against", base, "--max-regression", "0.5").code == 0


@pytest.mark.usefixtures("halved")
def test_sizes_from_the_command_line(command: Command, model: Path) -> None:
    given = ("compare", model, model, "--provider", "cpu", "--no-parity", "--json")
    data = command(*given, "--batch", "1,4").report
    assert [p["sizes"] for p in data["analysis"]["sweep"]["points"]] == [{"N": 1}, {"N": 4}]
    named = command(*given, "--sweep", "N=2").report
    assert [p["sizes"] for p in named["analysis"]["sweep"]["points"]] == [{"N": 2}]
    for wrong in (("--batch", "1,x"), ("--batch", "0"), ("--batch", "1,1"), ("--sweep", "N")):
        assert command(*given, *wrong).code == 2
    assert "called like a sequence" in command(*given, "--seq", "8").err
