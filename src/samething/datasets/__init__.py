"""Public data sets and the user's own: from the official layout to a catalog."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from samething.catalog import Dropped, require_shares
from samething.datasets.boxes import list_coco
from samething.datasets.dataset import Dataset, Part, Published
from samething.datasets.hugging_face import is_hugging_face, list_hugging_face
from samething.datasets.known_sets import datasets
from samething.datasets.listing import CatalogReport, Labels, Listing, write_catalog
from samething.datasets.own_images import list_folder, list_table
from samething.datasets.public import DATASETS, read_dataset
from samething.errors import ArtefactError, InputError
from samething.images.decoding import pixels_of

__all__ = [
    "DATASETS",
    "CatalogReport",
    "Dataset",
    "Dropped",
    "Listing",
    "Part",
    "Published",
    "catalog",
    "datasets",
    "read_dataset",
]


def catalog(
    source: Path | None = None,
    *,
    dataset: str | None = None,
    data_root: Path | None = None,
    part: Part = "all",
    domain: str | None = None,
    labels: Labels = "folder",
    root: Path | None = None,
    margin: float | None = None,
    exclude: list[str] | None = None,
    check_files: bool = False,
    checksums: bool = False,
    max_megapixels: float | None = None,
    val: float = 0.1,
    test: float = 0.2,
    seed: int = 0,
    output: Path = Path("catalog.parquet"),
) -> CatalogReport:
    """List images and what they show in one table, the catalog, from which everything else starts.

    Every image's checksum and size are taken. An image that cannot be opened is left out and listed with its
    reason in OUTPUT.dropped.csv; the exit status is then 3. One cut off is noticed later, by features.

    In place of SOURCE, --dataset KEY --data-root FOLDER reads a public data set in its official layout
    (samething datasets lists them). No image is opened then: there may be millions.

    Whole things are set aside for validation and test, so that the model is measured on things it has never
    seen. A table with a column role, or a public data set, keeps its own division.

    Running the command again on unchanged images gives the same file, byte for byte.

    Args:
        source: folder with a sub-folder for each thing, or a table (.csv, .parquet) with the columns
            img_path,label[,domain,dataset,role], or a COCO file (.json), or a Hugging Face data set on disk.
        dataset: key of a public data set to read in place of SOURCE; samething datasets lists them.
        data_root: folder that holds the folders of all public data sets.
        part: of a public data set, only its train, val or test rows (test: queries and index).
        domain: kind of things shown, such as "furniture"; for a folder, or a table without that column. With
            --dataset, for one of several domains: those wanted, separated by commas.
        labels: "folder" takes labels from the sub-folders (a/b for nested ones) or the table; "none" makes
            each image its own thing, to be indexed and found but not trained on.
        root: folder that the catalog's paths start from. For a table, where its relative paths start; by
            default the table's own folder. For a folder, it or one above it. For COCO, where its file names
            start; by default images beside the file, or the file's own folder.
        margin: added to each side of a box, in percent of the box's width or height; for COCO by default 0,
            for public data sets with boxes by default as the paper cut them.
        exclude: of a folder, names or paths below it to pass over, with * and ?, such as old or "*/drafts/*".
            Hidden files and folders, links to folders and folders of the system are passed over anyway.
        check_files: with --dataset, look for every image, and leave out those that are missing.
        checksums: with --dataset, open every image as for SOURCE.
        max_megapixels: leave out larger images; by default 89, of JPEG files 358. What is listed is read.
        val: share of each domain's things for validation, in [0, 1).
        test: share of each domain's things for the test, in [0, 1).
        seed: another number gives another division.
        output: the catalog to write.

    Raises:
        InputError: no images, or arguments that do not fit together; says what was found.
        ArtefactError: the source is missing or cannot be read, or none of a table's images is there.
    """
    output = Path(output)
    require_shares(val=val, test=test, seed=seed)
    public = {"--data-root": data_root is not None, "--part": part != "all", "--check-files": check_files}
    own = {"SOURCE": source is not None, "--root": root is not None, f"--labels {labels}": labels != "folder",
           "--exclude": bool(exclude)}  # fmt: skip
    if dataset is None:
        _refuse("for one's own images", public | {"--checksums": checksums, "no SOURCE": source is None})
        assert source is not None
        listing = _list(Path(source), domain, labels, root, margin, exclude or ())
    else:
        _refuse(f"with --dataset {dataset}", own | {"no --data-root": data_root is None})
        assert data_root is not None
        names = () if domain is None else tuple(name.strip() for name in domain.split(",") if name.strip())
        listing = read_dataset(
            dataset, data_root=data_root, part=part, domains=names, margin=margin, check_files=check_files
        )
    opened = dataset is None or checksums
    return write_catalog(listing, dataset or str(source), opened=opened, max_pixels=pixels_of(max_megapixels),
                         labels=labels, output=output, val=val, test=test, seed=seed)  # fmt: skip


def _refuse(what: str, given: Mapping[str, bool]) -> None:
    """Refuse what does not go with one's own images, or with a public data set."""
    if wrong := [name for name, is_given in given.items() if is_given]:
        raise InputError(
            f"{', '.join(wrong)} {what}",
            expected="a folder, table or COCO file as SOURCE; or --dataset KEY --data-root FOLDER, and no "
            "SOURCE, --root or --labels",
            next_step="samething datasets lists the keys; --data-root is the folder that holds all data sets",
        )


def _list(
    source: Path,
    domain: str | None,
    labels: Labels,
    root: Path | None,
    margin: float | None,
    exclude: Sequence[str],
) -> Listing:
    """The images of one's own folder, table, COCO file or Hugging Face data set."""
    if not source.exists():
        raise ArtefactError(
            f"{source} does not exist",
            expected="a folder of images, or a table with img_path,label[,domain,role] (.csv, .parquet)",
            next_step="check the path",
        )
    root = None if root is None else Path(root)
    is_coco = source.suffix.lower() == ".json"
    if margin is not None and not (is_coco and 0 <= margin <= 100):
        raise InputError(
            f"--margin {margin:g} for {source}",
            expected="a percentage in [0, 100], for boxes in a COCO file (.json)",
            next_step="leave --margin away, or give another",
        )
    is_folder = source.is_dir() and not is_hugging_face(source)
    if exclude and not is_folder:
        raise InputError(
            f"--exclude {exclude[0]} for {source}",
            expected="a folder of images as SOURCE",
            next_step="leave --exclude away, and the rows out of the table",
        )
    if is_folder:
        return list_folder(source, domain=domain, labels=labels, root=root, exclude=exclude)
    if source.is_dir():
        return list_hugging_face(source, domain=domain, labels=labels)
    if is_coco:
        listing = list_coco(source, domain=domain, root=root, margin=margin)
    else:
        listing = list_table(source, domain=domain, labels=labels, root=root)
    listing.catalog.require_files()
    return listing
