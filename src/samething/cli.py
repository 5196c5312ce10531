"""The command line: each command is the Python function of the same name.

A command's module is imported when the command is run, so starting the program costs no torch. Results are
printed as they describe themselves; an error is printed with what to do next, and only here does the
program exit: 0 all well, 1 an error, 2 wrong usage, 3 done but some images were left out.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import cyclopts
import rich.markup

import samething
from samething.errors import MissingExtraError, SamethingError
from samething.progress import Terminal


class Command(NamedTuple):
    """Where a command's function is, and what it does in a line."""

    function: str
    help: str


COMMANDS: Final[Mapping[str, Command]] = {
    "fit": Command(
        "samething.fit:fit",
        "From labelled images to an index and a report: is a head better than the backbone?",
    ),
    "demo": Command("samething.demo:demo", "Run everything on real images, from data set to search report."),
    "datasets": Command("samething.datasets:datasets", "Say which public data sets can be read, and where."),
    "catalog": Command(
        "samething.datasets:catalog", "List a folder of images, or read a table or a public data set."
    ),
    "curate": Command(
        "samething.curate:curate",
        "Choose what to train on: rules, budgets, no copies, no leaks, no doubtful labels.",
    ),
    "backbones": Command(
        "samething.backbones.backbone_list:backbones",
        "List the backbones, and which are already on this disk.",
    ),
    "features": Command(
        "samething.features:features", "Extract the features of every image with a frozen backbone, once."
    ),
    "train": Command("samething.training:train", "Train a head on cached features."),
    "evaluate": Command(
        "samething.evaluation:evaluate", "Measure retrieval on instances never seen in training."
    ),
    "bench": Command(
        "samething.bench:bench", "Measure a backbone on a public board, from its images to a file of results."
    ),
    "leaderboard": Command(
        "samething.leaderboard:leaderboard", "Show published results of the benchmarks beside one's own."
    ),
    "study datasets": Command(
        "samething.study:datasets", "Choose the data sets to train on, on unseen instances."
    ),
    "study losses": Command(
        "samething.study:losses", "Compare the losses, each with the best of its own search."
    ),
    "study backbones": Command(
        "samething.study:backbones", "Compare backbones against their size and speed."
    ),
    "export": Command("samething.export:export", "Write a model folder that runs without torch."),
    "index": Command("samething.search:index", "Make a folder of images searchable."),
    "index sync": Command("samething.search:sync", "Bring an index up to date with its folders."),
    "index prepare": Command("samething.search:prepare", "Make an index ready for a second look."),
    "index tune": Command("samething.search:tune", "Search a large index approximately, at a chosen recall."),
    "index compact": Command("samething.search:compact", "Write an index anew without what was deleted."),
    "index verify": Command("samething.search:verify", "Compare all that an index holds with its checksums."),
    "index backup": Command("samething.search:backup", "Copy an index while it is in use."),
    "index restore": Command("samething.search:restore", "Bring an index back from a copy."),
    "index rebuild": Command("samething.search:rebuild", "Make an index anew with another model."),
    "tokens": Command(
        "samething.export.token_graph:tokens", "Write a backbone's patches as a graph for a second look."
    ),
    "find": Command("samething.search:find", "Find the same thing as in an image."),
    "duplicates": Command("samething.search:duplicates", "Group the near-duplicates of an index."),
    "verify": Command("samething.search:verify", "Compare any artefact with its checksums."),
    "serve": Command("samething.web:serve", "Serve an index as a page and a REST interface."),
}
"""Name of each command, in the order of the work. A name of two words is a command of a group."""

GROUPS: Final[Mapping[str, str]] = {
    "study": "Ask which data, which loss, which backbone: chosen on validation, tested once.",
}
"""Groups of commands, with a line for the list."""

_EPILOGUE: Final = (
    "Start with: samething demo. "
    "On your own images: index FOLDER and find; with labels fit FOLDER, or its steps: "
    "catalog, features, train, evaluate, export, index."
)


def build_app(*, command: str | None = None) -> cyclopts.App:
    """The program, its commands not yet imported.

    Args:
        command: the command about to run, whose help is then its function's whole docstring rather than the
            line in the list of commands.
    """
    app = cyclopts.App(
        name="samething",
        help="Find the same thing in any image collection, with one small embedding.",
        help_epilogue=_EPILOGUE,
        version=samething.__version__,
        help_format="markdown" if command else "plaintext",  # the list is plain, and quick
        default_parameter=cyclopts.Parameter(negative_iterable=(), short_alias=_short_name),
        result_action="return_value",
        suppress_keyboard_interrupt=False,  # main says how to go on
    )
    groups = {
        name: cyclopts.App(name=name, help=summary, sort_key=place)
        for place, (name, summary) in enumerate(GROUPS.items(), start=len(COMMANDS))
    }
    own_groups = {name.partition(" ")[0] for name in COMMANDS if " " in name} - set(groups)
    for place, (name, row) in enumerate(COMMANDS.items()):
        group, _, own_name = name.rpartition(" ")
        summary = {} if name == command else {"help": row.help}
        if name in own_groups:  # a command that is the group of others, such as index and index sync
            groups[name] = cyclopts.App(name=name, sort_key=place, help=summary.get("help"))
            if name == command:
                groups[name].default(_function(row))
        else:
            (groups[group] if group else app).command(row.function, name=own_name, sort_key=place, **summary)
    for group_app in groups.values():
        app.command(group_app)
    return app


def _function(row: Command) -> Callable[..., Any]:
    module, _, name = row.function.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def named_command(arguments: Sequence[str]) -> str | None:
    """The command that the arguments name, of one word or two; None if they name none.

    >>> named_command(["train", "features"])
    'train'
    """
    names = (" ".join(arguments[:words]) for words in (2, 1))
    return next((name for name in names if name in COMMANDS), None)


def _short_name(field: Any, taken: frozenset[str]) -> str | tuple[str, ...]:
    """-o is --output in every command that writes; nothing else has a short name."""
    del taken
    return "-o" if field.name == "output" else ()


def main(arguments: list[str] | None = None) -> None:
    """Run the program and exit.

    Args:
        arguments: its own; by default those of the process, which ends with it.
    """
    if arguments is not None:
        _run_and_exit(lambda: build_app(command=named_command(arguments))(arguments))
    # read when NumPy is loaded: idle threads of its matrix library sleep after some microseconds, not 30 ms
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "16")
    gc.set_threshold(20_000, 20)  # loading what a command needs makes much and leaves little
    status = 1
    atexit.register(lambda: _end(status))  # the first one here is called as the last
    try:
        main(sys.argv[1:])
    except SystemExit as done:
        status = done.code if isinstance(done.code, int) else int(done.code is not None)
        raise


def _end(status: int) -> None:
    """End the process as it is: taking everything apart takes a quarter of the time of a search."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # nobody reads any more: the interpreter has a status for that
        return
    os._exit(status)


def run_script(function: Callable[..., Any]) -> None:
    """Run a function as a program of its own, with results and errors as those of a command, and exit."""
    app = cyclopts.App(
        help_format="markdown", result_action="return_value", suppress_keyboard_interrupt=False
    )
    app.default(function)
    _run_and_exit(app)


def _run_and_exit(program: Callable[[], Any]) -> None:
    console = Terminal(stderr=True)
    warnings.filterwarnings("ignore", module="PIL")  # odd metadata; what cannot be read is listed anyway
    try:
        result = program()
    except SamethingError as error:
        _print_error(console, error)
        sys.exit(1)
    except ImportError as error:
        module = _missing_module(error)
        if module not in _EXTRAS:
            raise
        _print_error(console, MissingExtraError(module, extra=_EXTRAS[module]))
        sys.exit(1)
    except KeyboardInterrupt:
        console.print("stopped; run the same command again to go on")
        sys.exit(130)
    # of several processes, started by torchrun, one prints the result that all have
    if result is not None and os.environ.get("RANK", "0") == "0":
        # paths are printed whole, whatever the width
        Terminal().print(result, highlight=False, soft_wrap=isinstance(result, str), crop=False)
    sys.exit(getattr(result, "exit_status", 0))


_EXTRAS: Final = {
    module: extra
    for extra, modules in {
        "train": "torch torchvision timm open_clip onnx onnxscript openvino safetensors matplotlib optuna "
        "scipy sklearn simplejpeg",
        "hf": "huggingface_hub datasets transformers",
        "finetune": "peft",
        "cluster": "ray",
        "remote": "fsspec s3fs gcsfs",
        "milvus": "pymilvus",
        "watch": "watchfiles",
        "map": "bokeh umap",
        "demo": "samething_demo",
        "serve": "fastapi fastapi_offline prometheus_client uvicorn",
    }.items()
    for module in modules.split()
}
"""Modules that an optional part of the installation brings, and its name."""


def _missing_module(error: ImportError) -> str:
    """Package that is not there, also where the parser wraps the error of a command's own imports."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ModuleNotFoundError):
        cause = cause.__cause__
    return (cause.name or "").split(".")[0] if cause else ""


def _print_error(console: Terminal, error: SamethingError) -> None:
    for title, text in (("error", error.given), ("expected", error.expected), ("next", error.next_step)):
        colour = "bold red" if title == "error" else "bold"
        console.print(
            f"[{colour}]{title}:[/{colour}] {rich.markup.escape(text)}", highlight=False, soft_wrap=True
        )
