"""The official files of one data set below the data root, and errors that say how to mend what is amiss."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from samething.datasets.dataset import Dataset, Part
from samething.errors import ArtefactError, InputError, needed
from samething.files import Json
from samething.images import IMAGE_SUFFIXES

Texts: TypeAlias = "list[str] | pa.Array | pa.ChunkedArray"
"""A column of texts, one per row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfficialFiles:
    """What a reader reads from: paths are relative to the data root and use slashes."""

    dataset: Dataset
    data_root: Path
    """Folder that holds the folders of all data sets."""
    part: Part = "all"
    """What is wanted; a reader whose parts are files of their own leaves the others unread."""
    domains: tuple[str, ...] = ()
    """Domains wanted, for a data set of several; empty for all."""
    label_prefix: str | None = None
    """What labels begin with; by default the data set's key and a slash, so that no two sets share any."""

    def path(self, relative: str) -> Path:
        """Where a file is on this machine."""
        return self.data_root / relative

    def exists(self, relative: str) -> bool:
        """Whether a file or folder is there."""
        return self.path(relative).exists()

    # ---- errors

    def missing(self, *relative: str) -> ArtefactError:
        """The error that files of the official layout are not there."""
        listed = ", ".join(str(self.path(name)) for name in relative)
        verb = "do not exist" if len(relative) > 1 else "does not exist"
        return ArtefactError(
            f"{self.dataset.title}: {listed} {verb}",
            expected=f"the official layout below the data root {self.data_root}: "
            + ", ".join(self.dataset.files),
            next_step=self.how_to_get(),
        )

    def malformed(self, relative: str, found: str, *, expected: str) -> InputError:
        """The error that a file of the official layout is not as promised."""
        return InputError(
            f"{self.dataset.title}: {self.path(relative)}: {found}",
            expected=expected,
            next_step=f"the file may be cut off or of another version: {self.how_to_get()}",
        )

    def require(
        self,
        relative: str,
        good: pa.Array | pa.ChunkedArray,
        said: str,
        column: pa.Array | pa.ChunkedArray,
        *,
        expected: str,
        first: int = 0,
    ) -> None:
        """Raise an error about the first row that is not good, if there is one.

        Args:
            relative: the file.
            good: whether a row is as promised.
            said: what is amiss; gets the number of the row and its text.
            column: texts of the rows.
            expected: what was promised.
            first: number of the first row.
        """
        wrong = pc.index(good, False).as_py()
        if wrong >= 0:
            raise self.malformed(
                relative, said.format(wrong + first, column[wrong].as_py()), expected=expected
            )

    def how_to_get(self) -> str:
        """Where the data set comes from, what to run, and its licence."""
        return f"{self.dataset.get} (from {self.dataset.source}; licence: {self.dataset.licence})"

    # ---- tables

    def csv(self, relative: str, columns: Sequence[str]) -> pa.Table:
        """Columns of a CSV file with a header, all as text.

        Raises:
            ArtefactError: the file is missing.
            InputError: it lacks a column, or a row has another number of cells than the header.
        """
        header = self.header(relative)
        lacking = [name for name in columns if name not in header]
        if lacking:
            raise self.malformed(
                relative,
                f"its header is {','.join(header)!r}, without {', '.join(lacking)}",
                expected=f"the columns {', '.join(columns)}",
            )
        options = pa.csv.ConvertOptions(
            column_types=dict.fromkeys(columns, pa.string()),
            include_columns=list(columns),
            strings_can_be_null=False,
            quoted_strings_can_be_null=False,
        )
        parse = pa.csv.ParseOptions(newlines_in_values=True)
        with self._reading(relative, f"rows of {', '.join(header)}"):
            return pa.csv.read_csv(self.path(relative), convert_options=options, parse_options=parse)

    def header(self, relative: str) -> list[str]:
        """Names of the columns of a CSV file."""
        with self._reading(relative), self.path(relative).open(encoding="utf-8-sig", newline="") as stream:
            return next(csv.reader(stream), [])

    def spaced(self, relative: str, columns: Sequence[str], *, skip_rows: int = 0) -> pa.Table:
        """Columns of a file without a header whose cells are separated by one or more blanks, all as text.

        Raises:
            ArtefactError: the file is missing.
            InputError: a line has another number of cells.
        """
        lines = pc.utf8_trim_whitespace(self.lines(relative).slice(skip_rows))
        cells = pc.utf8_split_whitespace(lines)
        is_whole = pc.equal(pc.list_value_length(cells), len(columns))
        expected = f"{len(columns)} cells separated by blanks: {' '.join(columns)}"
        self.require(relative, is_whole, "line {} is {!r}", lines, expected=expected, first=skip_rows + 1)
        return pa.table(
            {name: pc.list_element(cells, place) for place, name in enumerate(columns)}
            if len(cells)
            else {name: pa.array([], pa.string()) for name in columns}
        )

    def lines(self, relative: str) -> pa.Array:
        """The lines of a text file, without those at its end that are empty."""
        return pa.array(self._text(relative).rstrip().splitlines(), pa.string())

    def _text(self, relative: str) -> str:
        with self._reading(relative):
            return self.path(relative).read_text(encoding="utf-8")

    @contextlib.contextmanager
    def _reading(self, relative: str, expected: str = "a text file in UTF-8") -> Iterator[None]:
        """Turn what goes wrong while a file is read into an error that says how to mend it."""
        try:
            yield
        except FileNotFoundError as error:
            raise self.missing(relative) from error
        except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
            raise self.malformed(relative, f"cannot be read ({error})", expected=expected) from error

    # ---- MATLAB

    @contextlib.contextmanager
    def matlab(self, relative: str, *, expected: str) -> Iterator[dict[str, Any]]:
        """The variables of a MATLAB file, for a block that takes from them what was promised.

        Raises:
            ArtefactError: the file is missing.
            InputError: it is none, or the block finds something else in it.
            MissingExtraError: SciPy is not installed.
        """
        matlab = needed("scipy.io.matlab", extra="train")
        if not self.exists(relative):
            raise self.missing(relative)
        amiss = (KeyError, ValueError, TypeError, IndexError, NotImplementedError, OSError)
        try:
            yield matlab.loadmat(self.path(relative), squeeze_me=True)
        except (matlab.MatReadError, *amiss) as error:
            found = f"cannot be read ({type(error).__name__}: {error})"
            raise self.malformed(relative, found, expected=f"a MATLAB file with {expected}") from error

    # ---- JSON

    def json(self, relative: str, *, without: frozenset[str] = frozenset()) -> Json:
        """The content of a JSON file.

        Args:
            relative: the file.
            without: names of entries that are dropped while reading, wherever they are; polygons take more
                memory than all the rest.

        Raises:
            ArtefactError: the file is missing.
            InputError: it is not JSON.
        """

        def entries(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            return {name: value for name, value in pairs if name not in without}

        return self._json(relative, object_pairs_hook=entries if without else None)

    def json_rows(self, relative: str, *names: str) -> list[tuple[Any, ...]]:
        """Entries of the objects of a JSON list, a tuple for each object; None for one that it lacks.

        The objects are not kept: as dictionaries, a million of them would take five times the memory.

        Raises:
            ArtefactError: the file is missing.
            InputError: it is not a JSON list of objects; says which entry.
        """
        rows = self._json(relative, object_hook=lambda entry: tuple(map(entry.get, names)))
        expected = "a JSON list of objects"
        if not isinstance(rows, list):
            raise self.malformed(relative, "is no list", expected=expected)
        if odd := [number for number, row in enumerate(rows) if not isinstance(row, tuple)]:
            raise self.malformed(relative, f"entry {odd[0]} is {rows[odd[0]]!r}", expected=expected)
        return rows

    def _json(self, relative: str, **hooks: Any) -> Json:
        text = self._text(relative)
        try:
            return json.loads(text, **hooks)
        except json.JSONDecodeError as error:
            raise self.malformed(relative, f"is not JSON ({error})", expected="a JSON file") from error

    # ---- folders

    def sub_folders(self, relative: str) -> list[str]:
        """Names of the folders in a folder, sorted; hidden ones are passed over."""
        return sorted(entry.name for entry in self._scan(relative) if entry.is_dir())

    def images(self, relative: str) -> list[str]:
        """Names of the images in a folder, sorted; hidden ones are passed over."""
        return sorted(
            entry.name
            for entry in self._scan(relative)
            if Path(entry.name).suffix.lower() in IMAGE_SUFFIXES and not entry.is_dir()
        )

    def _scan(self, relative: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.path(relative)) as entries:
                return [entry for entry in entries if not entry.name.startswith(".")]
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self.missing(relative) from error

    # ---- rows

    def rows(
        self,
        where: str,
        *,
        image: Texts,
        folder: str = "",
        label: Texts,
        role: str | Texts = "train",
        domain: str | Texts | None = None,
        dataset: str | Texts | None = None,
        **more: pa.Array | np.ndarray,
    ) -> pa.Table:
        """Columns of a catalog, with the prefix in front of the labels.

        Args:
            where: the annotation file, for errors.
            image: paths relative to the folder; an empty or missing one is an error.
            folder: where they start below the data root, with a slash at its end, or empty.
            label: instances; an empty or missing one is an error.
            role: of all rows or of each.
            domain: likewise; by default that of the data set.
            dataset: likewise; by default the key of the data set.
            **more: further columns.

        Raises:
            InputError: there are no rows, or one has no image or no label; says which.
        """
        num_rows = len(image)
        if not num_rows:
            raise self.malformed(where, "lists no images", expected="at least one row")
        image, label = _texts(image, num_rows), _texts(label, num_rows)
        for name, column in (("image", image), ("label", label)):
            is_there = pc.not_equal(pc.utf8_trim_whitespace(pc.fill_null(column, "")), "")
            expected = "an image and a label in every row"
            self.require(where, is_there, f"row {{}} has no {name}", column, expected=expected)
        prefix = f"{self.dataset.key}/" if self.label_prefix is None else self.label_prefix
        return pa.table(
            {
                "image": joined(folder, image) if folder else image,
                "label": joined(prefix, label) if prefix else label,
                "domain": _texts(self.dataset.domain if domain is None else domain, num_rows),
                "dataset": _texts(self.dataset.key if dataset is None else dataset, num_rows),
                "role": _texts(role, num_rows),
                **more,
            }
        )


def joined(*parts: str | pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Texts put together row by row; a single string stands for all rows.

    >>> joined("train/", pa.array(["1", "2"]), ".jpg").to_pylist()
    ['train/1.jpg', 'train/2.jpg']
    """
    return pc.binary_join_element_wise(*parts, "")


def _texts(given: str | Texts, num_rows: int) -> pa.Array | pa.ChunkedArray:
    """A column of texts; a single string stands for all rows."""
    if isinstance(given, str):
        return pa.repeat(pa.scalar(given), num_rows)
    return pa.array(given, pa.string()) if isinstance(given, list) else given
