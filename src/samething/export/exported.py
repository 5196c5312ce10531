"""What an export gives: a finished model folder, and what a person wants to know of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group
from rich.markup import escape
from rich.text import Text

from samething.embedder import form_of
from samething.files import Json
from samething.retrieval.codes import bytes_per_vector

if TYPE_CHECKING:
    from samething.export.quality import Parity


@dataclasses.dataclass(frozen=True)
class Exported:
    """A finished model folder."""

    folder: Path
    config: dict[str, Json]
    largest_difference: float | None
    """Largest difference of the float32 program to torch's; None when the folder was there already."""

    @property
    def parity(self) -> Parity | None:
        """What the form costs, where it may cost something."""
        from samething.export.quality import Parity  # asking for help needs none

        told = self.config.get("parity")
        return Parity.from_json(told) if told else None

    def __rich__(self) -> str | Group:
        """What a person wants to know of the model, in a few lines."""
        size = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file()) / 1e6
        checked = (
            "was there already"
            if self.largest_difference is None
            else f"vectors equal torch's within {self.largest_difference:.0e}"
        )
        dim, codes = self.config["embedding_dim"], form_of(self.config)["codes"]
        line = (
            f"[bold]{escape(str(self.folder))}[/bold]: {self.config['backbone']['name']} + {dim}-d head, "
            f"{bytes_per_vector(dim, codes):,} bytes per image ({codes}), {size:.0f} MB, {checked}"
        )
        return Group(Text.from_markup(line), self.parity) if self.parity else line
