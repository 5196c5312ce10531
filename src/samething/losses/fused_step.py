"""Loss, gradients and the update of the class weights, in chunks of classes that stay in cache."""

from __future__ import annotations

import contextlib
import functools
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.optim import Optimizer

from samething.losses.chunk_arithmetic import Arithmetic, CompiledArithmetic, TorchArithmetic
from samething.losses.chunk_kernels import chunk_kernels, compiles_for
from samething.losses.chunk_update import ChunkUpdate, updates_in_chunks
from samething.losses.class_sweep import ClassSweep, GradientSink, Workspace
from samething.losses.head import MarginHead, check_lengths
from samething.losses.margins import BatchRows, Margin
from samething.losses.matrix_products import fast_float32_products
from samething.losses.processes import num_processes


class FusedMarginStep:
    """One training step of a :class:`MarginHead`, without autograd where that is faster.

    ::

        step = FusedMarginStep(margin_head, optimiser)
        optimiser.zero_grad()
        embeddings = head(features)
        loss, gradient = step.loss_and_embedding_gradient(embeddings, labels)
        embeddings.backward(gradient)
        optimiser.step()

    With an optimiser the class weights are updated within the call and ``weight.grad`` stays None, so that
    ``optimiser.step()`` moves everything else. Without one, or where an update in chunks would not be the
    optimiser's own (sampling, prefixes, an unusual optimiser, several processes), ``weight.grad`` is written,
    or added to, and the caller goes on as always: for clipping, for SAM, for sums over processes.

    Loss and gradients are those of ``margin_head(embeddings, labels)`` up to rounding, for every margin, any
    number of sub-centres, class sampling, prefixes and dimension sampling; the margin's state moves in the
    same way. Prefixes and sampled dimensions are parts of the class weights, each copied to a buffer of its
    own and swept in turn. On a GPU the step *is* autograd, under the same call; :meth:`covers` tells.

    Between its two passes it keeps 4 + k - 1 bytes per class and row of the batch (k sub-centres; 2 + k - 1
    in bfloat16; compiled, one byte instead of k - 1): 27 MB for 34,800 classes, k = 3 and batch 128. Above
    ``workspace_bytes`` it keeps a chunk's worth only: 1 M classes take a workspace of some 20 MB.

    Args:
        head: the class weights and their margin.
        optimiser: SGD, Adam or AdamW that holds ``head.weight``, or None.
        precision: of the matrix products and the softmax between them. The targets' cosines, the sums, the
            weights and the optimiser stay in the weights' own precision.
        workspace_bytes: what may be kept of a batch's probabilities between the two passes. Beyond that they
            are computed twice, at a third more arithmetic, and only a chunk's worth is ever held.
        compiled: do the elementwise arithmetic in C that this machine's compiler translates at the first step
            (half a second), on one thread; for float32 weights, others go on by torch.

    Raises:
        InputError: see ``MarginHead``; compiled is asked for and there is no C compiler.
    """

    def __init__(
        self,
        head: MarginHead,
        optimiser: Optimizer | None = None,
        *,
        precision: Literal["float32", "bfloat16"] = "float32",
        workspace_bytes: int = 256 << 20,
        compiled: bool = False,
    ) -> None:
        self.head = head
        self.compiled = compiled
        self.optimiser = optimiser
        self.precision = precision
        self.workspace_bytes = workspace_bytes
        self._workspaces: dict[int, Workspace] = {}
        self._copies: dict[int, Tensor] = {}

    @staticmethod
    def covers(head: MarginHead) -> bool:
        """Whether this head trains in chunks: on the CPU, in float32 or float64."""
        return head.weight.device.type == "cpu" and head.weight.dtype in (torch.float32, torch.float64)

    @torch.no_grad()
    def loss_and_embedding_gradient(
        self, embeddings: Float[Tensor, "b d"], labels: Int[Tensor, " b"], *, share: float = 1.0
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "b d"]]:
        """Mean cross-entropy of the batch and its gradient by the embeddings; see the class.

        Args:
            embeddings: not necessarily of unit length; a gradient history is ignored.
            labels: class numbers.
            share: factor of loss and gradients, such as this process's share of a batch over several.
        """
        head = self.head
        if not self.covers(head):
            return self._by_autograd(embeddings, labels, share)
        head.check_batch(embeddings, labels)
        embeddings = embeddings.detach().to(head.weight.dtype)
        for prefix in head.prefixes:
            check_lengths("embedding", embeddings[:, :prefix].norm(dim=1))
        classes, dims_of_prefixes = head.next_subsets(labels)
        whole_loss, gradient = embeddings.new_zeros(()), torch.zeros_like(embeddings)
        for number, (prefix, dims) in enumerate(zip(head.prefixes, dims_of_prefixes, strict=True)):
            columns = slice(prefix) if dims is None else dims
            loss, part = self._step_of_a_part(
                number, embeddings[:, columns], labels, classes, columns, share / len(head.prefixes)
            )
            whole_loss += loss
            gradient[:, columns] += part
        return whole_loss, gradient

    def _step_of_a_part(
        self,
        number: int,
        embeddings: Float[Tensor, "b p"],
        labels: Int[Tensor, " b"],
        classes: Int[Tensor, " sampled"] | None,
        columns: slice | Int[Tensor, " p"],
        share: float,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "b p"]]:
        """The step of one prefix, or of some of its dimensions, under its own margin."""
        margin, workspace = self.head.margins[number], self._workspace(number, columns)
        assert isinstance(margin, Margin)
        norms = embeddings.norm(dim=1)
        check_lengths("embedding", norms)
        unit = embeddings / norms[:, None]
        fast = workspace.dtype == torch.float32
        products = fast_float32_products() if fast else contextlib.nullcontext()
        with torch.autocast("cpu", enabled=False), products:
            sweep = ClassSweep(workspace, margin, unit, labels, classes)
            statistic = sweep.other_logsumexp() if margin.needs_other_logsumexp and margin.training else None
            batch = BatchRows(
                target_cosines=sweep.target_cosines, norms=norms, labels=labels, other_logsumexp=statistic
            )
            sink = functools.partial(self._sink, columns)
            losses, unit_gradient = sweep.run(margin.prepare(batch), share, sink)
        radial = (unit_gradient * unit).sum(dim=1, keepdim=True)
        return losses.mean().to(unit.dtype) * share, (unit_gradient - unit * radial) / norms[:, None]

    def _is_whole(self, columns: slice | Tensor) -> bool:
        return isinstance(columns, slice) and columns.stop == self.head.weight.shape[1]

    def _workspace(self, number: int, columns: slice | Tensor) -> Workspace:
        """The buffers, made again where the weights have moved to other memory or another type."""
        weight = self.head.weight.detach()
        if not self._is_whole(columns):
            weight = self._copy(number, weight, columns)
        known = self._workspaces.get(number)
        if (
            known is None
            or known.weight.data_ptr() != weight.data_ptr()
            or known.weight.dtype != weight.dtype
        ):
            dtype = torch.bfloat16 if self.precision == "bfloat16" else weight.dtype
            arithmetic: Arithmetic = TorchArithmetic()
            if self.compiled and compiles_for(weight, self.head.num_centers):
                arithmetic = CompiledArithmetic(chunk_kernels(), dtype)
            known = Workspace(weight, self.head.num_centers, dtype, self.workspace_bytes, arithmetic)
        self._workspaces[number] = known
        return known

    def _copy(self, number: int, weight: Tensor, columns: slice | Tensor) -> Tensor:
        """Some columns of the class weights, in memory that is kept."""
        part = weight[:1, columns]
        copy = self._copies.get(number)
        if copy is None or copy.dtype != weight.dtype or copy.shape[1] != part.shape[1]:
            copy = self._copies[number] = weight.new_empty(len(weight), part.shape[1])
        if isinstance(columns, slice):
            return copy.copy_(weight[:, columns])
        return torch.index_select(weight, 1, columns, out=copy)

    @torch.enable_grad()
    def _by_autograd(self, embeddings: Tensor, labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
        embeddings = embeddings.detach().requires_grad_()
        loss = self.head(embeddings, labels) * share
        loss.backward()
        assert embeddings.grad is not None
        return loss.detach(), embeddings.grad

    def _sink(self, columns: slice | Tensor, classes: Tensor | None) -> GradientSink:
        """Where the gradient of the class weights goes, a chunk at a time."""
        weight, k = self.head.weight, self.head.num_centers
        alone = classes is None and num_processes() == 1 and len(self.head.prefixes) == 1
        alone = alone and self._is_whole(columns)
        if alone and self.optimiser is not None and updates_in_chunks(self.optimiser, weight):
            return ChunkUpdate(self.optimiser, weight)
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        gradients = weight.grad

        def add(start: int, gradient: Tensor) -> None:
            if classes is None:
                rows = gradients[start : start + len(gradient)]
                if isinstance(columns, slice):
                    rows[:, columns] += gradient
                else:
                    rows.index_add_(1, columns, gradient)
                return
            some = classes[start // k : (start + len(gradient)) // k]
            places = (some[:, None] * k + torch.arange(k)).flatten()
            if isinstance(columns, slice):
                gradients[:, columns].index_add_(0, places, gradient)
            else:  # no class is there twice
                gradients[places] = gradients[places].index_add_(1, columns, gradient)

        return add
