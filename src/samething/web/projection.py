"""The map: all vectors of an index in two dimensions, near where they are similar."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from pathlib import Path
from typing import Any, Final

import numpy as np

from samething.arrays import Embeddings, Float
from samething.errors import InputError, MissingExtraError
from samething.files import atomic_path
from samething.index import AbstractIndex

MAX_POINTS: Final = 20_000
"""Images on a map; of a larger index an even sample."""
MAP_NAME: Final = "map.npz"
"""File in an index folder that keeps the places of the map."""


@dataclasses.dataclass(frozen=True, eq=False)
class ImageMap:
    """Where the images of an index are on its map."""

    ids: list[str]
    places: Float[np.ndarray, "n 2"]
    """In [0, 1]."""
    labels: list[str]
    domains: list[str]


def image_map(index: AbstractIndex) -> ImageMap:
    """The map of an index; kept in its folder until the index changes."""
    rows = sorted(
        (row["id"], row["label"] or "", row["domain"] or "")
        for batch in index.items(columns=["label", "domain"])
        for row in batch.to_pylist()
    )
    if len(rows) > MAX_POINTS:
        rows = [rows[place] for place in np.linspace(0, len(rows) - 1, MAX_POINTS).astype(int)]
    ids = [row[0] for row in rows]
    folder = Path(index.location)
    kept = folder / MAP_NAME if folder.is_dir() else None
    model = index.description.model_fingerprint
    places = None if kept is None else _kept_places(kept, ids, model)
    if places is None:
        places = project(index.vectors(ids))
        if kept is not None:
            with contextlib.suppress(InputError), atomic_path(kept) as partial, partial.open("wb") as stream:
                np.savez(stream, model=model, ids=np.array(ids, np.str_), places=places)
    return ImageMap(ids, places, [row[1] for row in rows], [row[2] for row in rows])


def _kept_places(kept: Path, ids: list[str], model: str) -> Float[np.ndarray, "n 2"] | None:
    try:
        with np.load(kept) as found:
            if str(found["model"]) == model and found["ids"].tolist() == ids:
                places: Float[np.ndarray, "n 2"] = found["places"]
                return places
    except Exception:  # absent or damaged: it is computed again
        return None
    return None


def project(vectors: Embeddings) -> Float[np.ndarray, "n 2"]:
    """Two numbers per vector, in [0, 1]: by UMAP where it is installed and there are enough, else by PCA."""
    if len(vectors) == 0:
        return np.empty((0, 2))
    places = _umap(vectors) if len(vectors) >= 50 else None
    if places is None:
        centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
        _, _, axes = np.linalg.svd(centred, full_matrices=False)
        places = centred @ axes[:2].T
        places = np.pad(places, ((0, 0), (0, 2 - places.shape[1])))
    low, high = places.min(axis=0), places.max(axis=0)
    scaled: Float[np.ndarray, "n 2"] = ((places - low) / np.where(high > low, high - low, 1)).astype(float)
    return scaled


def _umap(vectors: Embeddings) -> Float[np.ndarray, "n 2"] | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one thread being used for the sake of the seed
        try:
            import umap
        except ImportError:
            return None
        found = umap.UMAP(metric="cosine", n_neighbors=15, min_dist=0.15, random_state=0)
        return np.asarray(found.fit_transform(vectors), dtype=float)


def drawn(images: ImageMap, *, dark: bool) -> dict[str, Any]:
    """A Bokeh figure of the map, as its library in the browser takes it.

    A point shows its image when pointed at, and leads to what is like it when clicked.

    Raises:
        MissingExtraError: the package bokeh is not installed.
    """
    try:
        from bokeh.embed import json_item
        from bokeh.models import ColumnDataSource, HoverTool, OpenURL, TapTool, WheelZoomTool
        from bokeh.palettes import Category20
        from bokeh.plotting import figure
    except ImportError as error:
        raise MissingExtraError("bokeh", extra="map") from error
    ink, ground = ("#e8eaf0", "#14161c") if dark else ("#1c2030", "#ffffff")
    plot = figure(
        tools="pan,box_zoom,reset",
        sizing_mode="stretch_both",
        background_fill_color=ground,
        border_fill_color=ground,
        outline_line_color=None,
        min_border=12,
        output_backend="webgl",
    )
    plot.axis.visible = False
    plot.grid.visible = False
    palette = [*Category20[20][::2], *Category20[20][1::2]]
    names = sorted(set(images.domains))
    size = float(np.clip(220 / np.sqrt(max(1, len(images.ids))), 4, 13))
    for place, name in enumerate(names):
        mine = [row for row, domain in enumerate(images.domains) if domain == name]
        source = ColumnDataSource(
            {
                "x": images.places[mine, 0].round(4).tolist(),
                "y": images.places[mine, 1].round(4).tolist(),
                "id": [images.ids[row] for row in mine],
                "label": [images.labels[row] for row in mine],
                "domain": [name] * len(mine),
            }
        )
        colour = palette[place % len(palette)]
        plot.scatter(
            "x", "y", source=source, size=size, color=colour, alpha=0.75, line_color=None,
            nonselection_alpha=0.75, legend_label=name or "no domain",
        )  # fmt: skip
    wheel = WheelZoomTool()
    hover = HoverTool(
        tooltips='<div class="map-hover"><img src="/thumbnails/@id" alt="">'
        "<b>@label</b><span>@domain</span></div>"
    )
    plot.add_tools(wheel, hover, TapTool(callback=OpenURL(url="/#similar=@id", same_tab=True)))
    plot.toolbar.active_scroll = wheel
    plot.toolbar.logo = None
    if plot.legend:
        plot.add_layout(plot.legend[0], "above")
        plot.legend.ncols = 4
        plot.legend.click_policy = "hide"
        plot.legend.background_fill_color, plot.legend.background_fill_alpha = ground, 0.85
        plot.legend.label_text_color, plot.legend.border_line_color = ink, None
    return dict(json_item(plot))
