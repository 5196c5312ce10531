"""Every recipe runs on what the demo has made, and says what it needs where there is nothing."""

import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from samething.errors import SamethingError
from scenes import feature_folder

pytestmark = pytest.mark.heavy

RECIPES = {path.stem: path for path in sorted((Path(__file__).parent.parent / "recipes").glob("*.py"))}
SMALL = {
    "leave_one_domain_out": {"seeds": 1, "few": (5,)},
    "uned_adaptation": {"epochs": 1.0},
}


def main_of(name):
    spec = importlib.util.spec_from_file_location(f"recipes_{name}", RECIPES[name])
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("the demo é")
    feature_folder(folder / "features", num_classes=48, width=520, num_domains=3)  # ILIAS asks for 512
    return folder


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "leave_one_domain_out" else [])
        for name in RECIPES
    ],
)
def test_a_recipe_runs_on_the_demo(name, demo_folder, tmp_path, capsys):
    main_of(name)(demo=True, demo_folder=demo_folder, output=tmp_path / "out", **SMALL.get(name, {}))
    assert "mMP@5" in capsys.readouterr().out.replace("mmp@5", "mMP@5")
    assert any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_it_needs(name, tmp_path):
    main = main_of(name)
    with pytest.raises(SamethingError, match="--demo"):
        main(output=tmp_path / "out")
    with pytest.raises(SamethingError, match="samething demo -o"):
        main(demo=True, demo_folder=tmp_path / "nothing", output=tmp_path / "out")
    module_text, own_text = inspect.getmodule(main).__doc__, inspect.getdoc(main)
    assert "Needs" in module_text and "--demo" in module_text and "demo" in own_text


def test_an_error_of_a_recipe_is_printed_as_one_of_a_command():
    done = subprocess.run(
        [sys.executable, RECIPES["final_model"]], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[0] == "error: no --data-root"
