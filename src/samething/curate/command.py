"""``samething curate``: every field of CurateConfig is an option; those not given come from the recipe."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import docstring_parser
from cyclopts import Parameter

from samething.curate.config import CurateConfig
from samething.curate.process import curate as _curate
from samething.curate.result import Curation


def _options() -> type[Any]:
    """A dataclass with the fields of CurateConfig, all None, and their sentences as help."""
    sentences = {
        parameter.arg_name: parameter.description
        for parameter in docstring_parser.parse_from_object(CurateConfig).params
    }
    defaults = {field.name: field.default for field in dataclasses.fields(CurateConfig)}
    fields: list[tuple[str, Any, Any]] = [
        (
            name,
            Annotated[
                kind | None,
                Parameter(
                    help=_with_default(sentences[name], defaults[name]), show_default=False, negative=()
                ),
            ],
            dataclasses.field(default=None),
        )
        for name, kind in get_type_hints(CurateConfig).items()
    ]
    return dataclasses.make_dataclass("CurateOptions", fields, frozen=True, kw_only=True)


def _with_default(sentence: str | None, default: object) -> str:
    """A sentence with the default, where there is one worth a word."""
    return (
        f"{sentence} [default: {default}]"
        if isinstance(default, str | int | float) and default is not False
        else (sentence or "")
    )


CurateOptions = _options()
CurateOptions.__module__ = __name__  # cyclopts takes a class of the module "types" for a plain value
_UNCHANGED = CurateOptions()


def curate(
    *catalogs: Path,
    output: Path = Path("curated.parquet"),
    recipe: str | None = None,
    data_root: Path | None = None,
    root: Path | None = None,
    options: Annotated[CurateOptions, Parameter(name="*")] = _UNCHANGED,  # type: ignore[valid-type]
) -> Curation:
    """Choose what to train on: rules, budgets, finer labels, no copies, no leaks, no doubtful labels.

    Training rows are chosen; validation rows are dropped only where they leak, and evaluation rows (query,
    index) never. The steps, in this order: finer labels, unreadable files, leaks, contradictions, copies,
    doubtful labels, least images per class, classes per data set, images per class, budget.

    Beside OUTPUT are written OUTPUT.dropped.csv (a row for each image left out, and why), OUTPUT.pairs.csv
    (images that are there twice), OUTPUT.report.html, and OUTPUT.hashes.sqlite, from which a killed or
    repeated run goes on. The same input, options and seed give the same catalog, byte for byte. Files that
    cannot be read are left out, and the exit status is then 3.

    Args:
        catalogs: catalogs to choose from; several are put together.
        output: the catalog to write.
        recipe: m4d-35k: the paper's training set, rebuilt by its rules from --data-root and held against the
            published numbers.
        data_root: folder that holds the folders of the recipe's data sets.
        root: folder of the images, if they were moved since the catalog was made.
        options: changes to the defaults or the recipe.
    """
    changes = {
        field.name: value
        for field in dataclasses.fields(options)
        if (value := getattr(options, field.name)) is not None
    }
    return _curate(catalogs, output=output, recipe=recipe, data_root=data_root, root=root, **changes)
