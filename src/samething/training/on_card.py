"""Training in a card's own memory: the feature rows live there, and a step is recorded once and replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from samething.arrays import Float, Int
from samething.features import FeatureSet
from samething.progress import say
from samething.training.data import TrainingData

_ROWS_AT_A_TIME: Final = 65_536
_WARM_UP: Final = 3
"""Steps before one is recorded: the first makes the optimiser's state, and libraries choose their kernels."""


class RowsOnDevice:
    """Training rows and their classes, put on a device once; batches are gathered there.

    Args:
        features: all rows.
        data: which of them train.
        device: where they go, as they are kept: in float16.
    """

    def __init__(self, features: FeatureSet, data: TrainingData, device: torch.device) -> None:
        shape = len(data.rows), features.rows.shape[1]
        dtype = torch.from_numpy(features.rows[:0].copy()).dtype
        self._rows = torch.empty(shape, dtype=dtype, device=device)
        for start in range(0, len(data.rows), _ROWS_AT_A_TIME):
            part = features.rows[data.rows[start : start + _ROWS_AT_A_TIME]]
            self._rows[start : start + len(part)] = torch.from_numpy(part)
        self._classes = torch.from_numpy(data.classes).to(device)

    @classmethod
    def if_they_fit(
        cls, features: FeatureSet, data: TrainingData, device: torch.device
    ) -> RowsOnDevice | None:
        """The rows on a card, where they take at most half of its free memory; None elsewhere."""
        if device.type != "cuda":
            return None
        num_bytes = len(data.rows) * features.rows.shape[1] * features.rows.dtype.itemsize
        free = torch.cuda.mem_get_info(device)[0]
        if num_bytes > free / 2:
            say(
                f"{num_bytes / 1e9:.1f} GB of features are more than half of the {free / 1e9:.1f} GB free on "
                "the card: batches are read from the disk and copied there, which takes longer"
            )
            return None
        return cls(features, data, device)

    def gathered(self, places: Int[Tensor, " b"]) -> tuple[Float[Tensor, "b w"], Int[Tensor, " b"]]:
        """Features in float32 and classes of some training rows, given by their places among these."""
        return self._rows[places].float(), self._classes[places]


class Recorded:
    """A training step on a card, from tensors to the loss, as one CUDA graph.

    The first calls are plain ones; then a call is recorded, and from there on replayed on new inputs. Where
    it cannot be recorded it says why, and stays plain.

    Args:
        step: what is called; its tensors have the same shapes each time, and its numbers are the same.
    """

    def __init__(self, step: Callable[..., Tensor]) -> None:
        self._step, self._records = step, True
        self._num_plain = 0
        self._inputs: tuple[Any, ...] = ()
        self._graph: Any = None

    def __call__(self, *inputs: Any) -> Tensor:
        """The loss of one step, which is taken."""
        if self._records and self._graph is None and self._num_plain >= _WARM_UP:
            self._record(inputs)
        if not self._records:
            return self._step(*inputs)
        if self._graph is None:
            self._num_plain += 1
            return self._beside(inputs)
        for own, given in zip(self._inputs, inputs, strict=True):
            if isinstance(own, Tensor):
                own.copy_(given)
        self._graph.replay()
        return self._loss.clone()

    def _beside(self, inputs: tuple[Any, ...]) -> Tensor:
        """A plain call on a stream of its own: what the default stream has begun cannot be recorded."""
        usual = torch.cuda.current_stream()
        own = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        own.wait_stream(usual)
        with torch.cuda.stream(own):
            loss = self._step(*inputs)
        usual.wait_stream(own)
        return loss

    def _record(self, inputs: tuple[Any, ...]) -> None:
        self._inputs = tuple(each.clone() if isinstance(each, Tensor) else each for each in inputs)
        try:
            graph: Any = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._loss = self._step(*self._inputs)
        except Exception as error:  # whatever a loss, an optimiser or a driver cannot record
            self._records = False
            say(f"the training step cannot be recorded as a CUDA graph, and is slower ({error})")
            return
        self._graph = graph
