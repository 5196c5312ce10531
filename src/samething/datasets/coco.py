"""One's own boxes in images: a COCO annotation file."""

from __future__ import annotations

from pathlib import Path

from samething.catalog import Catalog
from samething.datasets.boxes import coco
from samething.datasets.dataset import Dataset
from samething.datasets.listing import Listing
from samething.datasets.official import OfficialFiles


def list_coco(
    source: Path, *, domain: str | None = None, root: Path | None = None, margin: float | None = None
) -> Listing:
    """A row for each box of a COCO annotation file, labelled by its category's name.

    Args:
        source: a ``.json`` file with images, annotations (bbox) and categories.
        domain: domain of all boxes.
        root: folder that the file names start from; by default ``images`` beside the file, or else the file's
            own folder.
        margin: added to each side of a box, in percent of the box; by default none.

    Raises:
        ArtefactError: the file is missing.
        InputError: it is not a COCO annotation file; says which entry is amiss.
    """
    source = Path(source)
    dataset = Dataset(
        key=source.stem,
        title="COCO annotations",
        domain=domain or "default",
        licence="one's own",
        source="one's own files",
        get="write the file again with images (id, file_name), annotations (image_id, category_id, bbox) and "
        "categories (id, name)",
        files=(source.name,),
        layout="https://cocodataset.org/#format-data",
        reader=coco(source.name, names=True),
        margin_percent=0.0,
    )
    reading = OfficialFiles(dataset=dataset, data_root=source.parent, margin_percent=margin, label_prefix="")
    beside = source.parent / "images"
    own = beside if beside.is_dir() else source.parent
    catalog = Catalog.from_table(
        dataset.reader(reading), root=own if root is None else root, where=str(source), dataset=source.stem
    )
    return Listing(catalog=catalog, has_roles=False)
