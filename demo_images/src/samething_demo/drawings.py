"""Drawings of one thing by several hands: glyphs of fonts and SVG files, and their way onto an image."""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal, TypeAlias
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from samething.arrays import Float
from samething.errors import MissingExtraError
from samething_demo.instances import SIDE, Instance

DRAWN_SIDE: Final = 168
"""Drawings are rendered at this size, in pixels: just above the largest size they are placed at."""

SKETCH_SIDE: Final = 24
"""Two drawings are compared on a raster of this many cells per side."""

_TURN_DEGREES: Final = 8.0
_FILL: Final = (0.6, 0.85)
_MIN_CONTRAST: Final = 110.0

# Names of the groups that hold colour in OpenMoji's files; the rest is its own black-line drawing.
_COLOUR_LAYERS: Final = ("color", "skin", "hair")


@dataclasses.dataclass(frozen=True)
class Glyph:
    """One character of a font file, in black."""

    font: str
    """Path of a TrueType file."""
    code_point: int
    weight: int | None = None
    """Position on the weight axis of a variable font."""

    def render(self, side: int) -> Image.Image:
        """The glyph on a transparent ground, cut to its box; its em square is ``side`` pixels wide."""
        font = _font(self.font, side, self.weight)
        text = chr(self.code_point)
        left, top, right, bottom = font.getbbox(text)
        mask = Image.new("L", (max(1, int(right - left)), max(1, int(bottom - top))))
        ImageDraw.Draw(mask).text((-left, -top), text, font=font, fill=255)
        drawing = Image.new("RGBA", mask.size, (0, 0, 0, 255))
        drawing.putalpha(mask)
        return drawing


@dataclasses.dataclass(frozen=True)
class Svg:
    """One SVG file."""

    path: str
    line_only: bool = False
    """Leave out the layers of colour (OpenMoji's files keep them apart)."""

    def render(self, side: int) -> Image.Image:
        """The drawing on a transparent ground, ``side`` pixels wide."""
        try:
            import resvg_py
        except ImportError as error:
            raise MissingExtraError("resvg_py", extra="demo") from error
        text = Path(self.path).read_text(encoding="utf-8")
        if self.line_only:
            text = _without_colour(text)
        # no drawing of the demo holds text, and system fonts would make the result depend on the machine
        png = resvg_py.svg_to_bytes(svg_string=text, width=side, skip_system_fonts=True)
        return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


Drawing: TypeAlias = Glyph | Svg


@functools.lru_cache(maxsize=64)
def _font(path: str, pixels: int, weight: int | None) -> ImageFont.FreeTypeFont:
    font = ImageFont.truetype(path, pixels, layout_engine=ImageFont.Layout.BASIC)
    if weight is not None:
        font.set_variation_by_axes([weight])
    return font


def _without_colour(svg: str) -> str:
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.get("id", "").split("-")[0] in _COLOUR_LAYERS:
                parent.remove(child)
    return ElementTree.tostring(root, encoding="unicode")


def trimmed(drawing: Image.Image) -> Image.Image | None:
    """A drawing (RGBA) or silhouette (L) cut to its opaque part; None when that is 4 pixels wide or less."""
    cover = np.asarray(drawing if drawing.mode == "L" else drawing.getchannel("A")) >= 16
    rows, columns = (np.flatnonzero(cover.any(axis=axis)).tolist() for axis in (1, 0))
    if not rows or max(columns[-1] - columns[0], rows[-1] - rows[0]) < 4:
        return None
    return drawing.crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))


def sketch(drawing: Drawing) -> Float[np.ndarray, " cells"] | None:
    """Darkness of a drawing on a coarse raster, unit norm, whatever its size and place; None when blank.

    The inner product of two sketches is 1 for the same drawing. A drawing all in white is blank here.
    """
    rendered = trimmed(drawing.render(2 * SKETCH_SIDE))
    if rendered is None:
        return None
    scale = SKETCH_SIDE / max(rendered.size)
    size = (max(1, round(rendered.width * scale)), max(1, round(rendered.height * scale)))
    small = rendered.resize(size, Image.Resampling.BOX)
    ground = Image.new("RGBA", (SKETCH_SIDE, SKETCH_SIDE), (255, 255, 255, 255))
    ground.alpha_composite(small, ((SKETCH_SIDE - size[0]) // 2, (SKETCH_SIDE - size[1]) // 2))
    darkness = 255 - np.asarray(ground.convert("L"), np.float32).ravel()
    norm = float(np.linalg.norm(darkness))
    return darkness / np.float32(norm) if norm > 0 else None


@dataclasses.dataclass(frozen=True)
class DrawnInstance(Instance):
    """One thing drawn by several hands."""

    domain: str
    name: str
    drawings: tuple[tuple[str, Drawing], ...]
    """Pairs of source and drawing, sorted by source."""
    suffix: Literal["png", "jpg"]
    """``png``: the silhouette in one random colour on another, which packs best so; ``jpg``: as drawn, on a
    pale ground."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The vendors and styles."""
        return tuple(source for source, _ in self.drawings)

    def painter(self) -> Callable[[str, np.random.Generator], Image.Image]:
        """A drawing turned, scaled and shifted a little, on a ground of its own."""
        drawings = dict(self.drawings)

        def paint(source: str, random: np.random.Generator) -> Image.Image:
            rendered = drawings[source].render(DRAWN_SIDE)
            if self.suffix == "png":
                return _in_two_tones(_turned_and_scaled(rendered.getchannel("A"), random), random)
            return _on_pale_ground(_turned_and_scaled(rendered, random), random)

        return paint


def _turned_and_scaled(drawing: Image.Image, random: np.random.Generator) -> Image.Image:
    angle, fill = random.uniform(-_TURN_DEGREES, _TURN_DEGREES), random.uniform(*_FILL)
    turned = drawing.rotate(float(angle), expand=True, resample=Image.Resampling.BICUBIC)
    turned = trimmed(turned) or turned
    scale = SIDE * fill / max(turned.size)
    size = (max(1, round(turned.width * scale)), max(1, round(turned.height * scale)))
    return turned.resize(size, Image.Resampling.LANCZOS)


def _corner(drawing: Image.Image, random: np.random.Generator) -> tuple[int, int]:
    """Somewhere to put the drawing, away from the image's edges."""
    x, y = random.uniform(0.1, 0.9, 2)
    return int(x * (SIDE - drawing.width)), int(y * (SIDE - drawing.height))


def _on_pale_ground(drawing: Image.Image, random: np.random.Generator) -> Image.Image:
    pale = tuple((255 - random.integers(0, 90, 3)).tolist())
    image = Image.new("RGB", (SIDE, SIDE), pale)
    image.paste(drawing.convert("RGB"), _corner(drawing, random), drawing.getchannel("A"))
    return image


def _two_tones(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A legible pair of colours: their luminances (Rec. 601) differ by more than 110 of 255."""
    while True:
        ink, ground = random.integers(0, 256, 3), random.integers(0, 256, 3)
        if abs(float((ink - ground) @ np.array([0.299, 0.587, 0.114]))) > _MIN_CONTRAST:
            return ink, ground


def _in_two_tones(silhouette: Image.Image, random: np.random.Generator) -> Image.Image:
    """A palette image in 64 steps from one colour to another: edges show no more, and it packs better."""
    ink, ground = _two_tones(random)
    amount = Image.new("L", (SIDE, SIDE))
    amount.paste(silhouette, _corner(silhouette, random))
    steps = np.arange(64)[:, None] / 63
    palette = np.rint(ground * (1 - steps) + ink * steps).astype(np.uint8)
    image = Image.frombytes("P", amount.size, (np.asarray(amount) // 4).tobytes())
    image.putpalette(palette.tobytes())
    return image
