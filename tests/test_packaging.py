"""What the container, the site and the workflows say is what the package has."""

import email
import functools
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

import samething
from line import README, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")


def test_the_readme_is_short():
    assert len(README.read_text("utf-8").splitlines()) <= 100


def test_every_lower_bound_is_one_that_can_be_tried():
    """`make test-lowest` installs exactly these, so each requirement of the core has one."""
    for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["serve"]]:
        assert re.match(r"[\w.-]+>=\d[\w.]*(;.*)?$", line), line


def test_the_container_installs_extras_that_exist_and_nobody_is_root_in_it():
    text = (ROOT / "Dockerfile").read_text("utf-8")
    (extras,) = re.findall(r"^ARG EXTRAS=(\S+)$", text, re.M)
    asked = re.findall(r'EXTRAS: "([^"]+)"', (ROOT / "docker" / "compose.yaml").read_text("utf-8"))
    for extra in [name for names in [extras, *asked] for name in names.split(",")]:
        assert extra in PROJECT["optional-dependencies"], extra
    last_stage = text.split("\nFROM ")[-1]
    assert re.search(r"^USER (?!root)", last_stage, re.M)
    for source in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.M):
        assert all((ROOT / name).exists() for name in source.split()), source


@pytest.mark.parametrize("has_index", [True, False])
def test_the_container_serves_an_index_or_makes_one(tmp_path, has_index):
    """Its script is run with a `samething` that writes down what it is asked."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "samething"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    program.chmod(0o755)
    folder = tmp_path / "index"
    folder.mkdir()
    if has_index:
        (folder / "manifest.json").write_text("{}")
    done = subprocess.run(
        ["sh", ROOT / "docker" / "serve", "--max-waiting", "8"],
        env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "SAMETHING_INDEX": str(folder)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if has_index:
        assert (tmp_path / "asked").read_text() == (
            f"serve {folder} --host 0.0.0.0 --port 8000 --max-waiting 8\n"
        )
    else:
        assert done.returncode == 1 and "mount one of them" in done.stderr


def test_the_workflows_run_targets_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.M))
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8")
    for target in re.findall(r"run: make ([a-z-]+)", text):
        assert target in targets, target


def test_every_page_is_in_the_sites_menu():
    menu = set(re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.M))
    assert menu == {page.name for page in (ROOT / "docs").glob("*.md")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The package's wheel, built from a copy of the source."""
    place = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place)
    shutil.copytree(ROOT / "src", place / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    build = "import setuptools.build_meta as backend; backend.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=place, check=True, capture_output=True, timeout=120)
    (built,) = (place / "dist").glob("*.whl")
    return built


def test_the_wheel_holds_all_that_the_package_reads(wheel):
    """A page, a table or a template that is not in it is missed only by those who install it."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        said = email.message_from_bytes(archive.read(metadata))
    source = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src" / "samething").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == source
    assert said["Version"] == samething.__version__ and said["License-Expression"] == "Apache-2.0"
    assert said["Requires-Python"] == ">=3.11" and said.get_all("Project-URL") and said["Keywords"]
    assert "# samething" in said.get_payload() and "Typing :: Typed" in said.get_all("Classifier")
    assert {*said.get_all("Provides-Extra")} == {*PROJECT["optional-dependencies"]}


@pytest.mark.slow
def test_the_wheel_serves_and_searches_in_an_empty_environment(wheel, line, tmp_path):
    """With its core alone: no torch, no checkout on the path."""
    run = functools.partial(
        subprocess.run, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=900
    )
    run([sys.executable, "-m", "venv", "empty"])
    python = tmp_path / "empty" / ("Scripts" if os.name == "nt" else "bin") / "python"
    run([python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", f"{wheel}[serve]"])
    program = [python.parent / "samething"]
    run([*program, "index", line / "my-images", "--model", line / "model"])
    query = line / "some-image.jpg"
    assert "my-images" in run([*program, "find", query]).stdout
    looks = "import samething.web as web, samething.pages; print(web.create_app)"
    assert "create_app" in run([python, "-c", looks]).stdout
