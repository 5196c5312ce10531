"""The list of backbones: ``samething backbones``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.markup import escape

from samething.backbones.backbone_table import BACKBONES, BackboneRow
from samething.backbones.on_disk import hub_cache, weights_on_disk
from samething.errors import InputError
from samething.files import Json, write_json


@dataclasses.dataclass(frozen=True)
class BackboneList:
    """Rows of the table, and where the weights lie that are already on this disk."""

    rows: tuple[BackboneRow, ...]
    on_disk: dict[str, Path]
    """Name to path, of the rows whose weights are here."""
    details: bool = False
    """Whether licence, preprocessing and what a row is good at are shown as well."""

    def to_json(self) -> list[dict[str, Json]]:
        """A plain record a row."""
        return [
            {
                **dataclasses.asdict(row),
                "preprocessing": row.preprocessing.to_json(),
                "weights": row.weights,
                "on_disk": str(self.on_disk[row.name]) if row.name in self.on_disk else None,
            }
            for row in self.rows
        ]

    def __rich__(self) -> str:
        """The table, one block a family."""
        longest = max(len(row.name) for row in self.rows) + 2
        lines = [f"[bold]{'name':<{longest}} {'width':>6} {'size':>5} {'M params':>9} here  weights[/]"]
        family = ""
        for row in self.rows:
            if row.family != family:
                family = row.family
                lines.append(f"[bold cyan]{escape(family)}[/]")
            millions = row.parameters_millions
            here = "[green]yes[/] " if row.name in self.on_disk else "no  "
            lines.append(
                f"  {row.name:<{longest - 2}} {row.width:>6,} {row.preprocessing.size:>5} "
                f"{millions:>9,.{0 if millions >= 10 else 1}f} {here}  {escape(row.weights)}"
            )
            if self.details:
                lines.append(
                    f"[dim]    {row.preprocessing.resize}, {row.preprocessing.interpolation}; "
                    f"{escape(row.licence)}; {escape(row.good_at)}[/]"
                )
        lines += [
            "",
            f"{len(self.rows)} backbones, {len(self.on_disk)} with weights on this disk (hub cache: "
            f"{hub_cache() or 'no hub client is installed'}).",
            "Also timm:NAME, open_clip:NAME/WEIGHTS and hf:NAME; several joined by + are one feature.",
        ]
        return "\n".join(lines)


def backbones(
    pattern: str = "",
    *,
    on_disk: bool = False,
    details: bool = False,
    json: Path | None = None,
) -> BackboneList:
    """List the backbones: width, input size, parameters, source of the weights, and whether they are here.

    Nothing is loaded or fetched, and no network is needed.

    Args:
        pattern: show the rows whose name or family contains this, such as siglip or 384.
        on_disk: only those whose weights are already on this disk.
        details: also resize policy, licence and what each is good at.
        json: write the rows with all their fields here.

    Returns:
        The list.

    Raises:
        InputError: no row fits.
    """
    words = pattern.lower()
    chosen = [row for row in BACKBONES.values() if words in row.name.lower() or words in row.family.lower()]
    here = {row.name: path for row in chosen if (path := weights_on_disk(row)) is not None}
    rows = tuple(row for row in chosen if row.name in here or not on_disk)
    if not rows:
        raise InputError(
            f"no backbone with {pattern!r} in its name or family" + (" on this disk" if on_disk else ""),
            expected="part of a name or a family, such as siglip or dinov2",
            next_step="see them all with: samething backbones",
        )
    result = BackboneList(rows, here, details)
    if json is not None:
        write_json(json, result.to_json())
    return result
