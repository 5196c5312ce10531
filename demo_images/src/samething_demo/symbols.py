"""Icons and logos: the same name in several icon families is taken to mean the same thing.

Sources: Font Awesome 6, Material Design Icons, Phosphor, Remix Icon, Codicons and Elusive Icons as fonts with
name tables inside qtawesome; Octicons and Simple Icons as SVG inside mkdocs-material; Tabler Icons inside
pytablericons; Devicon as a font inside tkinter-icons-devicon.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from samething_demo.drawings import Drawing, DrawnInstance, Glyph, Svg
from samething_demo.instances import limited
from samething_demo.packages import package_files
from samething_demo.selection import distinct_drawings

MIN_FAMILIES_OF_AN_ICON: Final = 4
"""A name that few families know is mostly a homonym or a matter of taste."""

MIN_DRAWINGS_OF_AN_ICON: Final = 4

MIN_FAMILIES_OF_A_LOGO: Final = 3
MIN_DRAWINGS_OF_A_LOGO: Final = 3
"""One less than for an icon: a brand has one mark, which many families draw alike, and names seldom clash."""

MIN_BRAND_FAMILIES: Final = 2
"""A logo must stand in this many families that hold brands only."""

_NUM_SHARED: Final = 1
"""Two names that share one drawing are taken for synonyms."""


@dataclasses.dataclass(frozen=True)
class Style:
    """One style of an icon family: which of its names belong to it."""

    source: str
    family: str
    pattern: str
    """Regular expression over the whole name (of a file without its suffix); its first group is the name
    without the style."""
    module: str
    files: str
    """Glob pattern, within the package, of the font or of the SVG files."""
    table: str = ""
    """Likewise of the table from names to code points; empty for SVG files."""

    def drawings(self) -> Iterator[tuple[str, Drawing]]:
        """Pairs of name and drawing."""
        files = package_files(self.module, self.files)
        drawings: dict[str, Drawing] = {path.stem: Svg(str(path)) for path in files}
        if self.table:
            text = package_files(self.module, self.table)[-1].read_text(encoding="utf-8")
            codes = sorted(json.loads(text).items())
            drawings = {name: Glyph(str(files[-1]), int(str(code), 16)) for name, code in codes}
        for name, drawing in drawings.items():
            found = re.fullmatch(self.pattern, name)
            if found:
                yield found[1], drawing


def _qtawesome(source: str, family: str, pattern: str, stem: str) -> Style:
    return Style(source, family, pattern, "qtawesome", f"fonts/{stem}*.ttf", f"fonts/{stem}*charmap*.json")


_OCTICONS: Final = "templates/.icons/octicons/*-24.svg"

ICON_STYLES: Final[tuple[Style, ...]] = (
    _qtawesome("fontawesome-solid", "fontawesome", r"(.+)", "fontawesome6-solid"),
    _qtawesome("fontawesome-regular", "fontawesome", r"(.+)", "fontawesome6-regular"),
    _qtawesome("mdi", "mdi", r"(.+)(?<!-outline)", "materialdesignicons6"),
    _qtawesome("mdi-outline", "mdi", r"(.+)-outline", "materialdesignicons6"),
    _qtawesome(
        "phosphor", "phosphor", r"(.+)(?<!-bold)(?<!-fill)(?<!-thin)(?<!-light)(?<!-logo)", "phosphor"
    ),
    _qtawesome("phosphor-fill", "phosphor", r"(.+)(?<!-logo)-fill", "phosphor"),
    _qtawesome("remix", "remix", r"(.+)(?<!-line)(?<!-fill)", "remixicon"),
    _qtawesome("remix-fill", "remix", r"(.+)-fill", "remixicon"),
    _qtawesome("remix-line", "remix", r"(.+)-line", "remixicon"),
    _qtawesome("codicon", "codicon", r"(.+)", "codicon"),
    _qtawesome("elusive", "elusive", r"(.+)", "elusiveicons"),
    Style("octicon", "octicon", r"(.+)(?<!-fill)-24", "material", _OCTICONS),
    Style("octicon-fill", "octicon", r"(.+)-fill-24", "material", _OCTICONS),
    Style("tabler", "tabler", r"(?!brand-)(.+)", "pytablericons", "icons/outline/*.svg"),
    Style("tabler-fill", "tabler", r"(?!brand-)(.+)", "pytablericons", "icons/filled/*.svg"),
)

_DEVICON: Final = ("tkinter_icons_devicon", "fonts/devicon.ttf", "glyphmap.json")

BRAND_STYLES: Final[tuple[Style, ...]] = (
    _qtawesome("fontawesome", "fontawesome", r"(?!cc-|square-)(.+)", "fontawesome6-brands"),
    _qtawesome("fontawesome-square", "fontawesome", r"square-(.+)", "fontawesome6-brands"),
    _qtawesome("fontawesome-alt", "fontawesome", r"(.+)-(?:alt|in|f|brand)", "fontawesome6-brands"),
    _qtawesome("phosphor", "phosphor", r"(.+)-logo", "phosphor"),
    _qtawesome("phosphor-fill", "phosphor", r"(.+)-logo-fill", "phosphor"),
    Style("simple-icons", "simple-icons", r"(.+)", "material", "templates/.icons/simple/*.svg"),
    Style("tabler", "tabler", r"brand-(.+)", "pytablericons", "icons/outline/*.svg"),
    Style("tabler-fill", "tabler", r"brand-(.+)", "pytablericons", "icons/filled/*.svg"),
    Style("devicon", "devicon", r"(.+)-plain", *_DEVICON),
    Style("devicon-original", "devicon", r"(.+)-original", *_DEVICON),
)
"""Styles that hold brands only."""

MIXED_STYLES: Final[tuple[Style, ...]] = (
    # version 5 is the last one with many brands
    _qtawesome(
        "mdi", "mdi", r"(?:(?:language|microsoft|apple)-(?=.{4}))?(.+)(?<!-outline)", "materialdesignicons5"
    ),
    _qtawesome("remix-fill", "remix", r"(.+)-fill", "remixicon"),
    _qtawesome("remix-line", "remix", r"(.+)-line", "remixicon"),
)
"""Styles that hold brands among other things; a brand's name that is an icon's as well is passed over."""

_FAMILIES_WITHOUT_BRANDS: Final = ("fontawesome", "phosphor", "tabler")
"""Families whose ``ICON_STYLES`` hold no brand: they keep them apart by style or by name."""


def slug(name: str) -> str:
    """A name of lower-case letters, digits and underscores.

    >>> slug("git-pull-request")
    'git_pull_request'
    """
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def brand_key(name: str) -> str:
    """One spelling for a brand that the families hyphenate differently.

    >>> brand_key("stack-overflow"), brand_key("nodedotjs"), brand_key("node-js")
    ('stackoverflow', 'nodejs', 'nodejs')
    """
    return re.sub(r"[^a-z0-9]|dot(?=(?:js|net|io)$)", "", name.lower())


def find_symbols(limit: int | None) -> list[DrawnInstance]:
    """The instances of the domains ``icon`` and ``logo``.

    A brand that is a logo is not an icon as well: an instance belongs to one domain.

    Args:
        limit: look at this many names per domain only; fewer than that may pass.

    Raises:
        MissingExtraError, InputError: a package is missing or has another layout.
    """
    icons = _Names(slug)
    icons.add(ICON_STYLES)
    logos = _Names(brand_key)
    logos.add(BRAND_STYLES)
    brands = logos.known_to(MIN_BRAND_FAMILIES)
    common = _Names(brand_key)
    common.add(style for style in ICON_STYLES if style.family in _FAMILIES_WITHOUT_BRANDS)
    logos.add(MIXED_STYLES, only=brands - common.known_to(1))

    logo_names = limited("logo", logos.known_to(MIN_FAMILIES_OF_A_LOGO) & brands, limit)
    chosen_logos = distinct_drawings(
        {name: logos.drawings(name) for name in logo_names},
        min_drawings=MIN_DRAWINGS_OF_A_LOGO,
        num_shared=_NUM_SHARED,
    )
    icon_names = limited("icon", icons.known_to(MIN_FAMILIES_OF_AN_ICON), limit)
    chosen_icons = distinct_drawings(
        {name: icons.drawings(name) for name in icon_names if brand_key(name) not in chosen_logos},
        min_drawings=MIN_DRAWINGS_OF_AN_ICON,
        num_shared=_NUM_SHARED,
    )
    return [
        DrawnInstance(domain, name, drawings, "png")
        for domain, chosen in (("icon", chosen_icons), ("logo", chosen_logos))
        for name, drawings in chosen.items()
    ]


class _Names:
    """Names, each with its drawings by source and with the families that know it."""

    def __init__(self, key: Callable[[str], str]) -> None:
        self._key = key
        self._drawings: dict[str, dict[str, Drawing]] = {}
        self._families: dict[str, set[str]] = {}

    def add(self, styles: Iterable[Style], *, only: set[str] | None = None) -> None:
        """Enter the names of some styles; of several with one key, the first in sorted order counts."""
        for style in styles:
            for name, drawing in style.drawings():
                key = self._key(name)
                if key and (only is None or key in only):
                    self._drawings.setdefault(key, {}).setdefault(style.source, drawing)
                    self._families.setdefault(key, set()).add(style.family)

    def known_to(self, num_families: int) -> set[str]:
        """Names that at least so many families know."""
        return {name for name, families in self._families.items() if len(families) >= num_families}

    def drawings(self, name: str) -> list[tuple[str, Drawing]]:
        """Sources and drawings of a name, sorted by source."""
        return sorted(self._drawings[name].items(), key=lambda pair: pair[0])
