"""How a model is written: one small configuration, with what does not go together refused."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeAlias

from samething.embedder import PLAIN_FORM
from samething.errors import InputError
from samething.files import Json
from samething.retrieval.codes import StoredCodes, within_budget

Format: TypeAlias = Literal["folder", "hub", "guiec", "sentence-transformers"]
ModelPrecision: TypeAlias = Literal["float32", "float16", "int8"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """How a model is written."""

    format: Format = "folder"
    """``folder``: ONNX, safetensors, configuration, card; ``hub``: the same for the Hugging Face hub;
    ``guiec``: the challenge's submission.zip; ``sentence-transformers``."""
    input: Literal["pixels", "images"] = "pixels"
    """``pixels``: prepared squares; ``images``: any size, resized inside the graph."""
    precision: ModelPrecision = "float32"
    """Type of the weights; ``int8`` computes in whole numbers too."""
    dim: int | None = None
    """First numbers of the embedding that are kept; None: all."""
    codes: StoredCodes = "float32"
    """How vectors are kept."""

    def __post_init__(self) -> None:
        plain_graph = self.format in ("folder", "hub")
        for flag, asked, possible, formats in (
            (f"--precision {self.precision}", self.precision != "float32", plain_graph, "folder or hub"),
            ("--preprocessing-inside", self.input == "images", plain_graph, "folder or hub"),
            (
                f"--codes {self.codes}",
                self.codes != "float32",
                self.format != "guiec",
                "folder, hub or sentence-transformers",
            ),
        ):
            if asked and not possible:
                raise InputError(
                    f"{flag} with --format {self.format}",
                    expected=f"{flag} with --format {formats}",
                    next_step="leave one of the two out",
                )

    @property
    def changes_arithmetic(self) -> bool:
        """Whether vectors are computed otherwise than by the float32 graph from prepared pixels."""
        return self.precision != "float32" or self.input == "images"

    def loses(self, own: StoredCodes) -> bool:
        """Whether retrieval may get worse than that of the run, so that parity has to be measured.

        Args:
            own: the codes that the run was trained for and measured with.
        """
        return self.changes_arithmetic or self.dim is not None or self.codes not in ("float32", own)

    def to_json(self) -> dict[str, Json]:
        """Plain JSON values."""
        return {
            **dataclasses.asdict(self),
            "head_only": False,
        }  # an option of version 0.1; models keep their identity

    @property
    def made_from(self) -> dict[str, Any]:
        """What of it belongs to a model's identity: nothing where it is plain, as in version 1."""
        return {} if self.to_json() == dict(PLAIN_FORM) else {"form": self.to_json()}


def numbers_and_codes(
    whole: int, own: StoredCodes, *, dim: int | None, codes: StoredCodes | None, budget: int | None
) -> tuple[int | None, StoredCodes]:
    """First numbers of an embedding to keep (None: all) and their codes, by what was asked for.

    Args:
        whole: numbers of the run's embedding.
        own: the codes that the run was trained for.
        dim: what --dim asks for.
        codes: what --codes asks for.
        budget: bytes of a vector, of --bytes.

    Raises:
        InputError: a budget beside one of the others.
    """
    if budget is None:
        return dim, codes or own
    if dim is not None or codes is not None:
        raise InputError(
            f"--bytes {budget} with --dim or --codes",
            expected="a budget, from which these two follow, or the two",
            next_step="leave one of them out",
        )
    kept, codes = within_budget(whole, budget)
    return (None if kept == whole else kept), codes
