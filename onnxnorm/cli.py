"""The command line: `onnxnorm optimize | inspect | compare | report | passes | ops`.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done; 1 the outputs do not
agree or could not be compared, and nothing was written, or a gain is gone; 2 wrong usage or bad
input.

What takes time to import is imported by the command that needs it, once it is at work: the copy of
a large model's data then runs meanwhile.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias

import click

from onnxnorm.copying import head_start
from onnxnorm.errors import OnnxNormError, UsageError

if TYPE_CHECKING:
    from onnxnorm.report import Report
    from onnxnorm.report_terminal import Progress
    from onnxnorm.storage import Stored

_Command: TypeAlias = Callable[..., Any]
_NAME: Final = "onnxnorm"
_COMPLETION: Final = "_ONNXNORM_COMPLETE"  # set by the shell that asks for completions
_INTERRUPTED: Final = 130
_TIME_BUDGET: Final = 60.0  # api.TIME_BUDGET, which is not there before api is imported
_MAX_REGRESSION: Final = 0.05  # regression.MAX_REGRESSION, likewise
_MODEL: Final = click.Path(path_type=Path)
_STATUS: Final = """\b
Exit status:
  0    done
  1    the outputs do not agree or could not be compared, and no model was
       written; or a gain is gone (compare --against)
  2    wrong usage or bad input
  130  interrupted
"""


def _file(_: click.Context, __: click.Parameter, value: Path | None) -> Path | None:
    """Refuse what other tools take for standard input and output."""
    if value == Path("-"):
        raise UsageError(
            "'-' names no file, and models are read from files and written to files",
            "Name a file: stdin and stdout are not for models.",
        )
    return value


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    invoke_without_command=True,
    epilog=_STATUS,
)
@click.version_option(package_name="onnxnorm")
@click.pass_context
def cli(context: click.Context) -> None:
    """Find every normalization in an ONNX model, rewrite it to the cheapest equal one, prove it."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def _options(*decorators: Callable[[_Command], _Command]) -> Callable[[_Command], _Command]:
    def apply(command: _Command) -> _Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


def _shapes(_: click.Context, __: click.Parameter, values: Sequence[str]) -> dict[str, Any]:
    """Parse `name:1,3,224,224`; names may hold colons, shapes do not."""
    shapes = {}
    for value in values:
        name, colon, dims = value.rpartition(":")
        try:
            shapes[name] = tuple(int(d) for d in dims.split(",")) if dims else ()
        except ValueError:
            name = ""
        if not colon or not name or any(d < 0 for d in shapes.get(name, ())):
            raise click.BadParameter(f"'{value}' is not name:1,3,224,224")
    if len(shapes) < len(values):
        raise click.BadParameter("an input is named twice")
    return shapes


def _sizes(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...]:
    """Parse `1,8,32`."""
    try:
        sizes = tuple(int(each) for each in value.split(",")) if value is not None else ()
    except ValueError:
        sizes = (0,)
    if any(size < 1 for size in sizes) or len(set(sizes)) < len(sizes):
        raise click.BadParameter(f"'{value}' is not a list of sizes such as 1,8,32")
    return sizes


def _named_sizes(
    context: click.Context, parameter: click.Parameter, values: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """Parse `name=1,8,32`; names may hold equals signs, sizes do not."""
    named = {}
    for value in values:
        name, equals, sizes = value.rpartition("=")
        if not equals or not name:
            raise click.BadParameter(f"'{value}' is not name=1,8,32")
        named[name] = _sizes(context, parameter, sizes)
    if len(named) < len(values):
        raise click.BadParameter("an axis is named twice")
    return named


# Options that do nothing beside others: which, when that is so, why, and what to do. A dry run is
# asked for with the options of the run that it is for, and says itself that nothing is run.
_IDLE: Final[tuple[tuple[frozenset[str], Callable[[Mapping[str, Any]], bool], str, str], ...]] = (
    (
        frozenset({"inputs", "input_shapes", "seed", "time_budget"}),
        lambda g: _runs_nothing(g),
        "no model is run",
        "Leave out --no-parity or --no-latency",
    ),
    (
        frozenset({"provider"}),  # "cpu" and "auto" promise nothing that is not so
        lambda g: _runs_nothing(g) and "cuda" in g["provider"],
        "no model is run",
        "Leave out --no-parity or --no-latency",
    ),
    (
        frozenset({"keep_slower", "threads"}),
        lambda g: bool(g.get("no_latency")) and not (g.get("tune") or g.get("dry_run")),
        "no latency is measured",
        "Leave out --no-latency",
    ),
    (
        frozenset({"provider"}),
        lambda g: g.get("runtime") is False,
        "inspect runs nothing without --runtime",
        "Add --runtime",
    ),
    (
        frozenset({"input_shapes"}),
        lambda g: bool(g.get("inputs")) and not any(map(g.get, ("batch", "sequence", "sizes"))),
        "those of --inputs have their shapes",
        "Leave out --inputs",
    ),
    (
        frozenset({"max_regression"}),
        lambda g: g.get("against") is None,
        "there is no earlier report to hold the latency against",
        "Add --against",
    ),
    (
        frozenset({"time_passes", "verbose"}),
        lambda g: bool(g.get("quiet")),
        "nothing is printed",
        "Leave out --quiet",
    ),
    (
        frozenset({"cuda_kernels"}),
        lambda g: g.get("path") is False,
        "no path is printed",
        "Add --path",
    ),
)


def _runs_nothing(given: Mapping[str, Any]) -> bool:
    nothing = given.get("no_parity") and given.get("no_latency")
    return bool(nothing) and not (given.get("tune") or given.get("dry_run"))


def _check_idle() -> None:
    """Refuse an option that would do nothing beside the others.

    Raises:
        UsageError: There is one.
    """
    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        if context.get_parameter_source(name) is not click.core.ParameterSource.COMMANDLINE:
            continue
        for names, idle, why, hint in _IDLE:
            if name in names and idle(context.params):
                option = max(parameter.opts, key=len) if name != "provider" else "--provider"
                raise UsageError(
                    f"{option} was given, and {why}", f"{hint}, or leave out {option}."
                )


_PROVIDER = click.option(
    "--provider",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where onnxruntime runs the models.",
)
_measuring = _options(
    click.option(
        "--threads",
        type=click.IntRange(1),
        help="Threads of one run, for latency.  [onnxruntime's own choice]",
    ),
    click.option(
        "--inputs",
        type=_MODEL,
        metavar="DATA.npz",
        help="Your own inputs: an array for each, written by numpy.savez.",
    ),
    click.option(
        "--input-shape",
        "input_shapes",
        multiple=True,
        callback=_shapes,
        metavar="NAME:1,3,224,224",
        help="Shape of an input; may be repeated.",
    ),
    click.option(
        "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the random inputs."
    ),
    click.option(
        "--no-parity", is_flag=True, help="Do not compare the outputs: nothing is proven."
    ),
    click.option("--no-latency", is_flag=True, help="Measure no latency, profile or memory."),
    click.option(
        "--time-budget",
        type=click.FloatRange(min=0, min_open=True),
        default=_TIME_BUDGET,
        show_default=True,
        metavar="SECONDS",
        help="For parity; latency takes half as many, profile and memory a tenth.",
    ),
)
_output = _options(
    click.option(
        "--report",
        "reports",
        multiple=True,
        type=_MODEL,
        metavar="FILE.html|.md|.json",
        help="Write the report, in the form of the suffix; may be repeated.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
    click.option("-v", "--verbose", is_flag=True, help="Print every row, and the sites."),
    click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors, and --json."),
)


_TARGET = _options(
    click.option(
        "--target",
        type=click.Choice(["onnx", "ort-cpu", "ort-cuda"]),
        default="onnx",
        show_default=True,
        help="What the model is for.",
    ),
    click.option(
        "--runtime-version",
        metavar="1.23",
        help="With an ort target: the oldest onnxruntime that has to load the model.",
    ),
    click.option(
        "--ops",
        is_flag=True,
        help="With --target ort-cpu: call the operators of onnxnorm where they are faster.",
    ),
    click.option(
        "--cuda-kernels",
        is_flag=True,
        help="With --target ort-cuda --ops: the same, for kernels that no GPU has run yet.",
    ),
)


@cli.command(short_help="Rewrite, check parity, measure latency, write OUT.onnx and a report.")
@click.argument("source", metavar="IN.onnx", type=_MODEL, callback=_file)
@click.argument("output", metavar="[OUT.onnx]", type=_MODEL, required=False, callback=_file)
@click.option(
    "--passes",
    metavar="A,B{opt=1}",
    help="What to run, in order: 'default,fold-norm-affine' is the default list and one more,"
    " 'none' runs nothing; `onnxnorm passes` lists them.  [default: default]",
)
@_TARGET
@click.option("--opset", type=click.IntRange(1), help="Convert the model to this opset.")
@click.option(
    "--only",
    multiple=True,
    metavar="SITE",
    help="Restrict the passes to this site, as `inspect -v` names it; may be repeated.",
)
@click.option(
    "--skip", multiple=True, metavar="SITE", help="Leave this site as it is; may be repeated."
)
@click.option("--tune", is_flag=True, help="Measure the forms of each norm; take the fastest.")
@click.option(
    "--choices",
    type=_MODEL,
    metavar="FILE.json",
    help="Forms from the report of a run with --tune.",
)
@click.option("--keep-slower", is_flag=True, help="Keep a pass that makes the model slower.")
@click.option("--in-place", is_flag=True, help="Replace the input.")
@click.option("--dry-run", is_flag=True, help="Say what would be done; run and write nothing.")
@click.option("--time-passes", is_flag=True, help="Print the time each pass took.")
@click.option(
    "--print-after", metavar="PASS|all", help="Print the graph after a pass that changed it."
)
@click.option(
    "--ablation",
    metavar="auto|all|none|PASS,PASS",
    default="auto",
    show_default=True,
    help="Leave each pass out once and measure what it bought; auto: for a report in HTML.",
)
@_PROVIDER
@_measuring
@_output
def optimize(
    source: Path,
    output: Path | None,
    reports: Sequence[Path],
    *,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    time_passes: bool,
    print_after: str | None,
    ablation: str,
    no_parity: bool,
    no_latency: bool,
    **given: Any,
) -> None:
    """Rewrite the normalizations of IN.onnx and write OUT.onnx, if its outputs agree."""
    _check_idle()
    if output is None and not (given["in_place"] or given["dry_run"]):
        raise UsageError(
            "there is no OUT.onnx to write", "Name it, or give --in-place or --dry-run."
        )

    def after_pass(name: str, stored: Stored) -> None:
        if print_after in ("all", name):
            from onnx import printer

            click.echo(f"// after {name}\n{printer.to_text(stored.proto.graph)}", err=True)

    with ExitStack() as stack:
        if no_parity and output is not None and not given["dry_run"]:
            given["ahead"] = stack.enter_context(head_start(source, output))
        _check_reports(reports, source, output)
        if print_after is not None and print_after != "all":
            _check_runs("--print-after", [print_after], given["passes"], "'all' prints after each")
        measured = not (no_latency or given["dry_run"])
        given["ablation"] = _ablation(ablation, reports, given["passes"], latency=measured)
        with _imported():
            from onnxnorm import api, registry

            registry.catalogue()
        result = api.optimize(
            source,
            output,
            parity=not no_parity,
            latency=not no_latency,
            progress=stack.enter_context(_progress(quiet=quiet)),
            after_pass=after_pass if print_after else None,
            **given,
        )
    _show(result.report, reports, as_json=as_json, verbose=verbose, quiet=quiet, timed=time_passes)


@cli.command(short_help="List every normalization, what would be done, what is in the way.")
@click.argument("source", metavar="MODEL.onnx", type=_MODEL, callback=_file)
@click.option(
    "--passes", metavar="A,B{opt=1}", help="What would run, as for optimize.  [default: default]"
)
@_TARGET
@click.option(
    "--runtime", is_flag=True, help="Show what onnxruntime makes of each norm when it loads it."
)
@click.option(
    "--provider",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="With --runtime: where onnxruntime runs the models.",
)
@_output
def inspect(
    source: Path,
    reports: Sequence[Path],
    *,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """List every normalization of MODEL.onnx, what would be done, and what is in the way."""
    _check_idle()
    with _uncollected():
        from onnxnorm import inspection

        _check_reports(reports, source)
        report = inspection.inspect(source, **given)
    _show(report, reports, as_json=as_json, verbose=verbose, quiet=quiet)


@cli.command(short_help="Compare outputs and latency of any two models.")
@click.argument("first", metavar="A.onnx", type=_MODEL, callback=_file)
@click.argument("second", metavar="B.onnx", type=_MODEL, callback=_file)
@click.option(
    "--cuda-kernels", is_flag=True, help="Run calls of onnxnorm's operators by its CUDA kernels."
)
@click.option(
    "--provider",
    "--providers",
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda|cpu,cuda",
    help="Where onnxruntime runs the models; several go into one report.",
)
@click.option(
    "--batch", callback=_sizes, metavar="1,8,32", help="Latency at these sizes of the batch axis."
)
@click.option(
    "--seq",
    "sequence",
    callback=_sizes,
    metavar="128,512",
    help="Latency at these sizes of the sequence axes.",
)
@click.option(
    "--sweep",
    "sizes",
    multiple=True,
    callback=_named_sizes,
    metavar="NAME=1,8,32",
    help="Latency at these sizes of a symbolic axis; may be repeated.",
)
@click.option(
    "--against",
    type=_MODEL,
    metavar="REPORT.json",
    help="Fail when less is gained than in this earlier report.",
)
@click.option(
    "--max-regression",
    type=click.FloatRange(min=0),
    default=_MAX_REGRESSION,
    show_default=True,
    metavar="SHARE",
    help="With --against: how much the ratio may grow.",
)
@_measuring
@_output
def compare(
    first: Path,
    second: Path,
    reports: Sequence[Path],
    *,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    no_parity: bool,
    no_latency: bool,
    **given: Any,
) -> None:
    """Compare the outputs and the latency of any two models; A is the one to trust.

    Exits with 1 when the outputs do not agree, or the gain is less than --against allows.
    """
    _check_idle()
    from onnxnorm import api
    from onnxnorm.report_text import disappoints

    _check_reports(reports, first, second, given["against"])
    with _progress(quiet=quiet) as progress:
        report = api.compare(
            first,
            second,
            parity=not no_parity,
            latency=not no_latency,
            progress=progress,
            **given,
        )
    _show(report, reports, as_json=as_json, verbose=verbose, quiet=quiet)
    if disappoints(report.to_json()):
        sys.exit(1)


@cli.command(name="report", short_help="Print REPORT.json, or write it as HTML or Markdown.")
@click.argument("source", metavar="REPORT.json", type=_MODEL)
@_output
def render(
    source: Path,
    reports: Sequence[Path],
    *,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Print REPORT.json, or write it in another form with --report."""
    _check_idle()
    from onnxnorm.report import Report

    _check_reports(reports, source)
    _show(Report.read(source), reports, as_json=as_json, verbose=verbose, quiet=quiet)


@cli.command(short_help="List the passes and their options.")
@click.option("--json", "as_json", is_flag=True, help="Print the catalogue as JSON.")
def passes(*, as_json: bool) -> None:
    """List the passes: what each does, and its options."""
    from onnxnorm.registry import catalogue, default_passes, options

    default = default_passes()
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "summary": kind.summary,
            "equation": kind.equation,
            "default": name in default,
            "approximate": kind.approximate,
            "options": {
                key: {"type": type_, "default": value}
                for key, (type_, value) in options(kind).items()
            },
        }
        for name, kind in catalogue().items()
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    behind = False
    for row in rows:
        behind = behind or row["default"]
        name = row["name"]
        added = f"default,{name}" if behind else f"{name},default"
        on = "on by default" if row["default"] else f"off; --passes {added} adds it"
        click.echo(f"{row['name']}  ({on})\n    {row['summary']}\n    {row['equation']}")
        for key, option in row["options"].items():
            shown = "by the target" if option["default"] is None else option["default"]
            click.echo(f"    {key}={shown}  ({option['type'].removesuffix(' | None')})")


@cli.command(short_help="Show the operator library.")
@click.option("--path", is_flag=True, help="Print the library's path and nothing else.")
@click.option("--cuda-kernels", is_flag=True, help="With --path: the one with CUDA kernels.")
def ops(*, path: bool, cuda_kernels: bool) -> None:
    """Show the operator library: kernels, instruction set in use, and what is missing."""
    _check_idle()
    from onnxnorm.ops import library

    if path:
        click.echo(library.required(cuda_kernels=cuda_kernels))
        return
    for line in library.summary(library.describe()):
        click.echo(line)


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Progress | None]:
    """A progress bar, unless nothing is to be said: then rich is not needed at all."""
    if quiet:
        yield None
        return
    from onnxnorm.report_terminal import Progress

    with Progress() as progress:
        yield progress


def _check_runs(option: str, names: Iterable[str], passes: str | None, every: str) -> None:
    """Refuse the name of a pass that is none, or that is not among those that run."""
    from onnxnorm.registry import catalogue, select

    for name in names:
        if name not in catalogue():
            raise UsageError(
                f"{option} names '{name}', which is no pass",
                f"`onnxnorm passes` lists them; {every}.",
            )
        if all(each.name != name for each in select(passes)):
            raise UsageError(
                f"{option} names '{name}', which does not run",
                "Add it to --passes, or name another.",
            )


def _ablation(
    wanted: str, reports: Sequence[Path], passes: str | None, *, latency: bool
) -> bool | tuple[str, ...]:
    """The passes to leave out, one after another: all, none, or those that are named."""
    if wanted == "auto":
        return any(path.suffix.lower() in {".html", ".htm"} for path in reports)
    every = wanted in ("all", "none")
    names = () if every else tuple(name.strip() for name in wanted.split(","))
    _check_runs("--ablation", names, passes, "'all' leaves out each, 'none' none")
    if wanted != "none" and not latency:
        raise UsageError(
            f"--ablation {wanted} was given, and no latency is measured",
            "Leave out --no-latency or --dry-run, or --ablation.",
        )
    return wanted == "all" if every else names


def _check_reports(reports: Sequence[Path], *models: Path | None) -> None:
    """Refuse a report that cannot be written before any work is done for it."""
    if not reports:
        return
    from onnxnorm.report import report_form
    from onnxnorm.staging import check_target

    taken = {os.path.realpath(model) for model in models if model is not None}
    for path in reports:
        report_form(path)
        if os.path.realpath(path) in taken:
            raise UsageError(
                f"the report {path} would replace the model or report it is made from",
                "Give the report another name.",
            )
        check_target(path)


def _show(
    report: Report,
    reports: Sequence[Path],
    *,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    timed: bool = False,
) -> None:
    for path in reports:
        report.write(path)
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2, ensure_ascii=False))
    elif not quiet:
        from onnxnorm.report_terminal import Output, render_inspect, render_terminal

        data = report.to_json()
        console = Output(soft_wrap=False)
        if report.command == "inspect":
            render_inspect(data, console, verbose=verbose)
        else:
            render_terminal(data, console, verbose=verbose, time_passes=timed)
        for path in reports:
            console.print(f"report: {path}", highlight=False, markup=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    if _COMPLETION in os.environ:
        cli.main(prog_name=_NAME)
    _open_standard_streams()
    given = list(sys.argv[1:] if arguments is None else arguments)
    before = signal.signal(signal.SIGTERM, _terminate)
    code = 0
    try:
        # Not cli.main: it prints lines of its own, and makes 1 of a broken pipe, which is our code
        # for outputs that do not agree.
        with cli.make_context(_NAME, given) as context:
            cli.invoke(context)
        if sys.stdout is not None:  # it is None where the caller closed it
            sys.stdout.flush()
    except click.exceptions.Exit as done:
        code = done.exit_code
    except OnnxNormError as error:
        _fail(error.what, error.hint, error.exit_code)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx is not None else _NAME
        _fail(error.format_message(), f"`{command} --help` shows the options.", 2)
    except click.ClickException as error:
        _fail(error.format_message(), "`onnxnorm --help` shows how to use it.", 2)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted", "No unfinished model was left behind.", _INTERRUPTED)
    except MemoryError:
        _fail("there is not enough memory", "Close other programs, or use a larger machine.", 2)
    except BrokenPipeError:
        _leave_stdout()
        sys.exit(0)  # whoever read our output has seen enough
    except OSError as error:
        _leave_stdout()
        what = f"{error.filename}: " if error.filename else "standard output or a temporary file: "
        _fail(
            f"{what}{error.strerror or error}",
            "Free some space, or point TMPDIR and the output to another disk.",
            2,
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    sys.exit(code)


@contextmanager
def _uncollected() -> Iterator[None]:
    """For a command that is soon over, do not look for garbage in cycles.

    A graph is very many objects that live until the end. Going through them again and again took
    6 % of the time of `inspect` on 4,000 nodes, and once more when the process ends 3 %.
    """
    gc.disable()
    atexit.register(gc.freeze)  # before the interpreter's own last collection
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def _imported() -> Iterator[None]:
    """Import without looking for garbage in cycles, and never look there again.

    What modules make lives until the end. Going through it again and again took 10 % of the time of
    `optimize` on a small model.
    """
    atexit.register(gc.freeze)
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _open_standard_streams() -> None:
    """Put nothing where the caller closed standard input, output or errors.

    The next file that is opened would get the number, and what the runtime's libraries print on
    standard errors would go into it.
    """
    number = os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free
    while number < 3:
        os.set_inheritable(number, True)
        number = os.open(os.devnull, os.O_RDWR)
    os.close(number)


def _leave_stdout() -> None:
    # What it still holds cannot be written: the interpreter must not try again at exit.
    sys.stdout = None


def _fail(what: str, hint: str, code: int) -> NoReturn:
    click.echo(f"error: {' '.join(what.split())}\n{' '.join(hint.split())}", err=True)
    sys.exit(code)


def _terminate(_: int, __: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt  # so that temporary files are removed on the way out
