"""Public data sets and the user's own: one small file each, from the official layout to a catalog."""

from __future__ import annotations

from pathlib import Path

from samething.catalog import require_shares
from samething.datasets.folder import list_folder
from samething.datasets.listing import Dropped, Labels
from samething.datasets.report import DROPPED_SUFFIX, CatalogReport, oddities, write_dropped
from samething.datasets.survey import survey_pictures
from samething.datasets.table import list_table
from samething.errors import ArtefactError, InputError
from samething.files import require_writable

__all__ = ["CatalogReport", "Dropped", "catalog"]


def catalog(
    source: Path,
    *,
    domain: str | None = None,
    labels: Labels = "folder",
    root: Path | None = None,
    val: float = 0.1,
    test: float = 0.2,
    seed: int = 0,
    output: Path = Path("catalog.parquet"),
) -> CatalogReport:
    """List pictures and what they show in one table, the catalog, from which everything else starts.

    SOURCE is a folder with one sub-folder for each thing, or a table (.csv, .parquet) with the columns
    img_path,label and optionally domain,dataset,role. Every picture's checksum and size are taken. A picture
    that cannot be opened is left out and listed with its reason in OUTPUT.dropped.csv; the exit status is
    then 3. A file that is cut off behind its header is noticed later, when its features are computed, and
    listed there.

    Whole things are set aside for validation and test, so that the model is measured on things it has never
    seen. A table with a column role (train, val, query, index, query+index) keeps its own division.

    Running the command again on unchanged pictures gives the same file, byte for byte.

    Args:
        source: folder with a sub-folder for each thing, or a table (.csv, .parquet) with the columns
            img_path,label[,domain,dataset,role].
        domain: kind of things shown, such as "furniture"; for a folder, or a table without that column.
        labels: "folder" takes labels from the sub-folders (a/b for nested ones) or the table; "none" makes
            each picture its own thing, to be indexed and found but not trained on.
        root: folder that the catalog's paths start from. For a table, where its relative paths start; by
            default the table's own folder. For a folder, it or one above it.
        val: share of each domain's things for validation, in [0, 1).
        test: share of each domain's things for the test, in [0, 1).
        seed: another number gives another division.
        output: the catalog to write. Pictures left out are listed with reasons in OUTPUT.dropped.csv, and
            the exit status is then 3.

    Raises:
        InputError: no pictures, or arguments that do not fit together; says what was found.
        ArtefactError: the source is missing or cannot be read, or none of a table's pictures is there.
    """
    source, output = Path(source), Path(output)
    if not source.exists():
        raise ArtefactError(
            f"{source} does not exist",
            expected="a folder of pictures, or a table with img_path,label[,domain,role] (.csv, .parquet)",
            next_step="check the path",
        )
    require_shares(val=val, test=test, seed=seed)
    read = list_folder if source.is_dir() else list_table
    listing = read(source, domain=domain, labels=labels, root=None if root is None else Path(root))
    if not source.is_dir():
        listing.catalog.require_files()
    require_writable(output)
    surveyed, unreadable = survey_pictures(listing)
    dropped = (*listing.dropped, *unreadable)
    write_dropped(output, dropped)
    if not len(surveyed):
        raise InputError(
            f"none of the {len(listing.catalog)} pictures of {source} can be read "
            f"(for instance {unreadable[0].image}: {unreadable[0].reason})",
            expected="at least one readable picture",
            next_step=f"look at the reasons in {output}{DROPPED_SUFFIX}",
        )
    if not listing.has_roles:
        surveyed = surveyed.split_by_class(val=val, test=test, seed=seed)
    warnings = oddities(surveyed, has_labels=labels != "none")
    if not listing.has_roles and test > 0 and not surveyed.has_role("query+index").any():
        warnings.append("too few labels with two pictures or more to set any aside for the test")
    surveyed.write(output)
    return CatalogReport(
        catalog=surveyed,
        path=output,
        dropped=dropped,
        warnings=tuple(warnings),
        passed_over=listing.passed_over,
    )
