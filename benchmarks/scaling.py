"""What a million to a billion images cost, reckoned from what was measured: the table of docs/scaling.md.

    python benchmarks/scaling.py

Nothing is measured here. Each unit cost is quoted from the page it stands in; ``tests/test_scaling.py`` holds
the quotes to the pages, and docs/scaling.md to this table.
"""

from __future__ import annotations

import dataclasses
import sys

SIZES = (10**6, 10**7, 10**8, 10**9)
HOUR_S = 3600


@dataclasses.dataclass(frozen=True)
class Unit:
    """A measured cost."""

    value: float
    quote: str
    """Part of a line of the page, in which the value stands."""
    page: str = "benchmarks.md"


SMALL = Unit(146, "| float32 (onnxruntime) | 146 |")
"""Images per second on one core: EfficientNet-Lite0 at 224 px."""
LARGE = Unit(20.5, "| **OpenVINO bfloat16** | 20.5 |")
"""The same of ViT-B/16 at 224 px."""
LOADING = Unit(137, "| loading, 20,000 rows a change | 42 CPU s | 137 CPU s |", "log.md")
"""Seconds of a core per million rows."""
ROWS = Unit(927, "| disk | 355 MB | 927 MB |", "log.md")
"""MB per million rows with vectors of 256 bytes, without thumbnails."""
SCANNING = Unit(8, "registers (FAISS' fast scan of product codes, one number each)** | **8** |", "log.md")
"""Milliseconds per 100,000 rows of 512 numbers of 4 bits on one core."""
BUILDING = Unit(201, "| built in | 201 s |")
"""Seconds for a graph of a million vectors of 64 dimensions."""
LISTING = Unit(23, "| tuned in, other jobs beside it | 23 min")
"""Minutes of the machine's two cores for ten million rows in lists."""
UNITS = (SMALL, LARGE, LOADING, ROWS, SCANNING, BUILDING, LISTING)

VECTOR_BYTES = 256
THUMBNAIL_KB = 13.5
"""Mean of 1,307 thumbnails of photographs, 224 px."""
FEATURE_BYTES = 2 * 1280
LINK_BYTES = 4 * 2 * 16
"""A node of the graph: 16 links, twice as many at the bottom, as 32-bit numbers."""


LARGEST_GRAPH = 2_000_000
"""Rows; more are kept in lists."""
LIST_BYTES = 64 / 4 + 8
"""An entry of a list: 2 bits per dimension, and its slot."""


def amount(value: float, units: tuple[tuple[float, str], ...]) -> str:
    """A number with two digits that count, in the largest unit that it fills."""
    size, name = next((unit for unit in units if value >= unit[0]), units[-1])
    value /= size
    return f"{float(f'{value:.2g}'):,g} {name}"


def cores(seconds: float) -> str:
    """Time of one core."""
    return amount(seconds, ((24 * HOUR_S, "days"), (HOUR_S, "h"), (60, "min"), (1, "s")))


def room(num_bytes: float) -> str:
    """Memory or disk."""
    return amount(num_bytes, ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")))


def waiting(seconds: float) -> str:
    """Time of a query."""
    return amount(seconds, ((1, "s"), (1e-3, "ms")))


def table() -> str:
    """The costs by the number of images, as Markdown."""
    lines = [
        ("embedding, small backbone (EfficientNet-Lite0)", lambda n: cores(n / SMALL.value)),
        ("embedding, ViT-B/16", lambda n: cores(n / LARGE.value)),
        ("features kept for training, float16 × 1,280", lambda n: room(n * FEATURE_BYTES)),
        ("vectors, 512 numbers of 4 bits", lambda n: room(n * VECTOR_BYTES)),
        ("rows with their names and places", lambda n: room(n * (ROWS.value - VECTOR_BYTES))),
        ("thumbnails", lambda n: room(n * THUMBNAIL_KB * 1e3)),
        ("writing the rows", lambda n: cores(n / 1e6 * LOADING.value)),
        ("exact search, one query", lambda n: waiting(n / 1e5 * SCANNING.value / 1e3)),
        (
            "graph of a 64-d model, beyond 2 million lists: memory",
            lambda n: room(n * (LIST_BYTES if n > LARGEST_GRAPH else 64 + LINK_BYTES)),
        ),
        (
            "building them, two cores",
            lambda n: cores(
                60 * LISTING.value * (n / 1e7) ** 1.5  # the lists grow with the root of the rows
                if n > LARGEST_GRAPH
                else n / 1e6 * BUILDING.value
            ),
        ),
    ]
    heads = [amount(size, ((10**9, "billion"), (10**6, "million"))) for size in SIZES]
    rows = [["", *heads], ["---"] * (len(SIZES) + 1)]
    rows += [[name, *(cost(size) for size in SIZES)] for name, cost in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
