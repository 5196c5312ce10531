"""What the container, the site and the workflows say is what the package has."""

import re
import subprocess
import tomllib

import pytest

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
