"""The lower bounds of pyproject.toml as constraints for pip: ``python tests/lowest.py EXTRA...``."""

import re
import sys
import tomllib
from pathlib import Path

if __name__ == "__main__":  # pytest imports it as well
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    for line in [*project["dependencies"], *(line for extra in sys.argv[1:] for line in extras[extra])]:
        name, version = re.match(r"([\w.-]+)>=([\w.]+)", line).groups()
        print(f"{name}=={version}")
