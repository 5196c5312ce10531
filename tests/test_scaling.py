"""docs/scaling.md is arithmetic with the numbers of the benchmarks."""

import importlib.util
import re
import sys

import pytest

from line import ROOT

spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks" / "scaling.py")
scaling = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = scaling  # its data classes look for their module
spec.loader.exec_module(scaling)


@pytest.mark.parametrize("unit", scaling.UNITS, ids=lambda unit: unit.quote[:30])
def test_a_unit_cost_stands_in_the_benchmarks(unit):
    text = (ROOT / "docs" / unit.page).read_text(encoding="utf-8")
    assert unit.quote in re.sub(r"\s+", " ", text), unit.quote
    assert re.search(rf"(?<![\d.]){re.escape(f'{unit.value:g}')}(?![\d.])", unit.quote)


def test_the_page_shows_what_the_script_reckons():
    assert scaling.table() in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("seconds", "written"),
    [(1e8 / 146, "7.9 days"), (1e6 / 146, "1.9 h"), (137.0, "2.3 min"), (59.0, "59 s")],
)
def test_times_are_written_in_the_unit_that_they_fill(seconds, written):
    assert scaling.cores(seconds) == written
