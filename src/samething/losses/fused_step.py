"""Loss, gradients and the update of the class weights, in chunks of classes that stay in cache."""

from __future__ import annotations

import contextlib
import functools
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from samething.arrays import Float, Int
from samething.losses.chunk_update import chunk_update
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
    number of sub-centres, class sampling and prefixes; the margin's state moves in the same way. Prefixes are
    parts of the class weights, each copied to a buffer of its own and swept in turn. On a GPU the step *is*
    autograd, under the same call; :meth:`covers` tells.

    Between its two passes it keeps 4 + k - 1 bytes per class and row of the batch (k sub-centres; 2 + k - 1
    in bfloat16): 27 MB for 34,800 classes, k = 3 and batch 128. Above ``workspace_bytes`` it keeps a chunk's
    worth only: 1 M classes take a workspace of some 20 MB.

    Args:
        head: the class weights and their margin.
        optimiser: SGD, Adam or AdamW that holds ``head.weight``, or None.
        precision: of the matrix products and the softmax between them. The targets' cosines, the sums, the
            weights and the optimiser stay in the weights' own precision.
        workspace_bytes: what may be kept of a batch's probabilities between the two passes. Beyond that they
            are computed twice, at a third more arithmetic, and only a chunk's worth is ever held.

    Raises:
        InputError: see ``MarginHead``.
    """

    def __init__(
        self,
        head: MarginHead,
        optimiser: Optimizer | None = None,
        *,
        precision: Literal["float32", "bfloat16"] = "float32",
        workspace_bytes: int = 256 << 20,
    ) -> None:
        self.head = head
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
        classes = head.next_classes(labels)
        whole_loss, gradient = embeddings.new_zeros(()), torch.zeros_like(embeddings)
        for number, prefix in enumerate(head.prefixes):
            loss, part = self._step_of_a_prefix(
                number, embeddings[:, :prefix], labels, classes, share / len(head.prefixes)
            )
            whole_loss += loss
            gradient[:, :prefix] += part
        return whole_loss, gradient

    def _step_of_a_prefix(
        self,
        number: int,
        embeddings: Float[Tensor, "b p"],
        labels: Int[Tensor, " b"],
        classes: Int[Tensor, " sampled"] | None,
        share: float,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "b p"]]:
        """The step of one prefix, under its own margin."""
        prefix = embeddings.shape[1]
        margin, workspace = self.head.margins[number], self._workspace(number, prefix)
        assert isinstance(margin, Margin)
        norms = embeddings.norm(dim=1)
        unit = embeddings / norms[:, None]
        fast = workspace.dtype == torch.float32
        products = fast_float32_products() if fast else contextlib.nullcontext()
        with torch.autocast("cpu", enabled=False), products:
            sweep = ClassSweep(workspace, margin, unit, labels, classes)
            statistic = sweep.other_logsumexp() if margin.needs_other_logsumexp and margin.training else None
            batch = BatchRows(
                target_cosines=sweep.target_cosines, norms=norms, labels=labels, other_logsumexp=statistic
            )
            sink = functools.partial(self._sink, prefix)
            losses, unit_gradient = sweep.run(margin.prepare(batch), share, sink)
        radial = (unit_gradient * unit).sum(dim=1, keepdim=True)
        return losses.mean().to(unit.dtype) * share, (unit_gradient - unit * radial) / norms[:, None]

    def _workspace(self, number: int, prefix: int) -> Workspace:
        """The buffers, made again where the weights have moved to other memory or another type."""
        weight = self.head.weight.detach()
        if prefix < weight.shape[1]:
            # the leading columns, in memory that is kept
            copy = self._copies.get(number)
            if copy is None or copy.dtype != weight.dtype:
                copy = self._copies[number] = weight.new_empty(len(weight), prefix)
            weight = copy.copy_(weight[:, :prefix])
        known = self._workspaces.get(number)
        if (
            known is None
            or known.weight.data_ptr() != weight.data_ptr()
            or known.weight.dtype != weight.dtype
        ):
            dtype = torch.bfloat16 if self.precision == "bfloat16" else weight.dtype
            known = Workspace(weight, self.head.num_centers, dtype, self.workspace_bytes)
        self._workspaces[number] = known
        return known

    @torch.enable_grad()
    def _by_autograd(self, embeddings: Tensor, labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
        embeddings = embeddings.detach().requires_grad_()
        loss = self.head(embeddings, labels) * share
        loss.backward()
        assert embeddings.grad is not None
        return loss.detach(), embeddings.grad

    def _sink(self, prefix: int, classes: Tensor | None) -> GradientSink:
        """Where the gradient of the class weights goes, a chunk at a time."""
        weight, k = self.head.weight, self.head.num_centers
        alone = classes is None and num_processes() == 1 and self.head.prefixes == (weight.shape[1],)
        update = chunk_update(self.optimiser, weight) if alone and self.optimiser is not None else None
        if update is not None:
            return update
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        gradients = weight.grad

        def add(start: int, gradient: Tensor) -> None:
            if classes is None:
                gradients[start : start + len(gradient), :prefix] += gradient
                return
            some = classes[start // k : (start + len(gradient)) // k]
            places = (some[:, None] * k + torch.arange(k)).flatten()
            gradients[:, :prefix].index_add_(0, places, gradient)

        return add
