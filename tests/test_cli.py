"""The program: help, start-up, exit statuses and what goes to which stream."""

import csv
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from line import ENVIRONMENT, README, ROOT, commands_of, run_python, samething
from samething.cli import COMMANDS, build_app, main
from samething.errors import InputError

HELP_WITHOUT_TORCH = """
import sys
for name in ("torch", "torchvision", "timm", "onnx", "open_clip", "safetensors", "matplotlib"):
    sys.modules[name] = None
from samething.cli import main
for command in sys.argv[1:]:
    try:
        main([*command.split(), "--help"] if command != "-" else ["--help"])
    except SystemExit as done:
        assert not done.code, (command, done.code)
"""


def test_help_needs_no_torch():
    names = [name for name in COMMANDS if name not in ("export", "tokens")]  # they cannot do without torch
    done = run_python("-c", HELP_WITHOUT_TORCH, "-", *names)
    assert done.returncode == 0, done.stderr
    for name in names:
        assert f"Usage: samething {name}" in done.stdout
    assert "https://" not in done.stdout and "Raises" not in done.stdout


LOADED = """
import sys, samething.cli
names, *arguments = sys.argv[1:]
try: samething.cli.main(arguments)
except SystemExit: pass
print("loaded:", sorted(set(names.split()) & set(sys.modules)))
"""


def test_starting_the_program_imports_nothing_heavy():
    """Markdown took a tenth of a second of the list's three."""
    heavy = "torch timm numpy pyarrow PIL onnxruntime faiss matplotlib rich.markdown pygments"
    done = run_python("-c", LOADED, heavy, "--help")
    assert done.stdout.splitlines()[-1] == "loaded: []"
    assert all(name.split()[0] in done.stdout for name in COMMANDS)


def test_a_search_loads_what_a_question_needs(line, tmp_path):
    """FAISS, the web's packages and those of locks took a fifth of a second of each question.

    The table of backbones and the formats of images that are not met took a twentieth.
    """
    image, place = tmp_path / "some-image.png", line / "index"
    Image.open(line / "some-image.jpg").save(image)
    assert list(place.glob("vectors-*.int4"))
    heavy = (
        "faiss importlib.metadata urllib.request filelock pyarrow torch pandas rich.markdown tomllib "
        "docstring_parser PIL.PdfImagePlugin"
    )
    done = run_python("-c", LOADED, heavy, "find", str(image), "--index", str(place))
    assert done.stdout.splitlines()[-1] == "loaded: []" and "most similar" in done.stdout


ENDED = """
import atexit, os, sys, threading
class Kept:
    def __del__(self): os.write(1, b"taken apart")
sys.modules["kept"] = Kept()
import samething.cli
def ask(arguments):
    atexit.register(print, "at the end")
    threading.Thread(target=lambda: (threading.Event().wait(0.1), print("thread"))).start()
    raise {"--usual": SystemExit, "--three": SystemExit(3), "--words": SystemExit("words")}[arguments[0]]
samething.cli.build_app = lambda command: ask
samething.cli.main()
"""


@pytest.mark.parametrize(
    ("argument", "status", "said"),
    [("--usual", 0, ""), ("--three", 3, ""), ("--words", 1, "words"), ("--fault", 1, "KeyError: '--fault'")],
)
def test_a_process_ends_at_once_with_its_status(argument, status, said):
    """Taking modules apart at the end was a quarter of what a search took.

    What is still to be said is said: by threads, by what is registered for the end, and of an error.
    """
    done = run_python("-c", ENDED, argument)
    assert (done.returncode, done.stdout) == (status, "thread\nat the end\n")
    assert said in done.stderr and bool(said) == bool(done.stderr)


def test_output_that_nobody_reads_is_an_error():
    """As Python has it, with a status of its own."""
    read, write = os.pipe()
    os.close(read)
    program = subprocess.run(
        [sys.executable, "-c", ENDED, "--usual"],
        stdout=write, stderr=subprocess.PIPE, env={**ENVIRONMENT, "PYTHONUNBUFFERED": ""},
    )  # fmt: skip
    os.close(write)
    assert program.returncode == 120 and b"BrokenPipeError" in program.stderr


def test_no_arguments_show_the_help_and_version_is_a_number():
    bare, asked = samething(), samething("--version")
    assert bare.returncode == 0 and "Usage: samething" in bare.stdout
    assert asked.returncode == 0 and asked.stdout.strip().replace(".", "").isdigit()


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["index", "rebuild"],
        ["find", "a.jpg", "--no-such-option", "1"],
        ["find", "a.jpg", "-k", "many"],
        ["find", "a.jpg", "--k", "many"],
        ["evaluate", "--merged", "sideways", "--nothing"],
        ["--no-such-option"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as done:
        main(arguments)
    out, err = capsys.readouterr()
    assert done.value.code == 2
    assert err.strip() and not out.strip()


def test_an_error_is_status_1_and_goes_to_stderr(tmp_path, capsys):
    with pytest.raises(SystemExit) as done:
        main(["find", str(tmp_path / "a [b].jpg"), "--index", str(tmp_path / "no [index]")])
    out, err = capsys.readouterr()
    assert done.value.code == 1 and not out
    lines = err.strip().splitlines()
    assert [line.split(":")[0] for line in lines] == ["error", "expected", "next"]
    assert "no [index]" in lines[0]


def test_a_long_error_is_not_broken_into_lines(tmp_path):
    done = samething("index", tmp_path / ("long " * 40), "--model", tmp_path / ("m" * 200))
    assert done.returncode == 1 and not done.stdout
    assert len(done.stderr.strip().splitlines()) == 3


@pytest.mark.parametrize(
    ("command", "module", "extra"),
    [
        (["train", "f"], "torch", "train"),
        (["export", "r"], "torch", "train"),
        (["features", "c.parquet"], "torch", "train"),
        (["serve", "i"], "fastapi", "serve"),
    ],
    ids=lambda value: str(value),
)
def test_a_missing_extra_is_said(tmp_path, command, module, extra):
    (tmp_path / "c.parquet").touch()
    code = f"import sys; sys.modules[{module!r}] = None; from samething.cli import main; main()"
    done = run_python("-c", code, *command, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert not done.stdout and "Traceback" not in done.stderr
    if command[0] != "features":  # a table that is none is noticed first there
        assert f"samething[{extra}]" in done.stderr and module in done.stderr


def test_interrupting_is_status_130(monkeypatch, capsys):
    import samething.search

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(samething.search.Searcher, "open", stop)
    with pytest.raises(SystemExit) as done:
        main(["find", "a.jpg"])
    assert done.value.code == 130 and "go on" in capsys.readouterr().err


# ---- the neutral evaluation interface


@pytest.fixture
def neutral(tmp_path):
    """Embeddings of another model and the table in the fixed columns; no image exists."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(60):
        label, domain = number % 10, "cars" if number % 10 < 6 else "art"
        role = ("query", "index", "query+index")[number // 10 % 3]
        rows.append([f"nowhere/{number}.jpg", f"l{label}", domain, role])
    rows.append(["nowhere/alone.jpg", "nobody else", "art", "query"])
    with (tmp_path / "C.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["img_path", "label", "domain", "role"], *rows])
    np.save(tmp_path / "E.npy", rng.normal(size=(61, 16)).astype(np.float32))
    return tmp_path


@pytest.mark.parametrize("option", ["--merged", "--per-domain"])
def test_the_neutral_interface(neutral, capsys, option):
    with pytest.raises(SystemExit) as done:
        main(["evaluate", "--embeddings", str(neutral / "E.npy"), "--catalog", str(neutral / "C.csv"),
              "--json", str(neutral / "OUT.json"), option])  # fmt: skip
    out = capsys.readouterr().out
    assert done.value.code == 0
    assert ("one index over all domains" if option == "--merged" else "one index per domain") in out
    numbers = json.loads((neutral / "OUT.json").read_text(encoding="utf-8"))
    assert set(numbers) == {"merged", "per_domain"}
    for part in numbers.values():
        assert set(part) == {"art", "cars", "mean"}
        for row in part.values():
            assert set(row) == {"num_queries", "num_queries_without_positive", "mmp@5", "r@1", "map"}
        for metric in ("mmp@5", "r@1", "map"):
            assert part["mean"][metric] == pytest.approx((part["art"][metric] + part["cars"][metric]) / 2)
    assert numbers["merged"]["art"]["num_queries_without_positive"] == 1
    assert numbers["merged"]["cars"]["num_queries"] == 24


def test_the_neutral_interface_refuses_what_does_not_fit(neutral, line):
    from samething.evaluation import evaluate

    np.save(neutral / "short.npy", np.ones((3, 4), np.float32))
    for options, words in (
        ({"embeddings": neutral / "short.npy", "catalog": neutral / "C.csv"}, "3 rows"),
        ({"embeddings": neutral / "E.npy"}, "--catalog"),
        ({"catalog": neutral / "C.csv"}, "--embeddings"),
        ({}, "nothing to evaluate"),
    ):
        with pytest.raises(InputError, match=words):
            evaluate(**options)
    with pytest.raises(InputError, match="together"):
        evaluate(line / "run", embeddings=neutral / "E.npy", catalog=neutral / "C.csv")


# ---- the documents' commands parse


@pytest.mark.parametrize("page", sorted([README, *(ROOT / "docs").glob("*.md")]), ids=lambda page: page.name)
def test_the_commands_of_a_page_parse(page):
    for command in commands_of(page):
        build_app(command=command[0]).parse_args(command, exit_on_error=False)


def test_no_option_is_a_part_of_an_object():
    """``tokens`` showed every field of a backbone, which a command line cannot give."""
    shown = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")  # held to the code
    assert not re.findall(r"│ [* ]  --[\w-]+\.\S+", shown)
