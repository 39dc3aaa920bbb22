"""`token_step` for one batch that generates: what stays from token to token is checked and laid out once."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from dspa.kernels.backends.interface import BoundStep, StepMode
from dspa.kernels.backends.registry import operations_for
from dspa.kernels.operands import can_be_read, is_being_captured
from dspa.kernels.token_step import token_step
from dspa.kernels.types import EditList, TokenStats
from dspa.sae.weights import SaeWeights

MOST_COUNTERS = 64  # that are known to fit; a generate call with drafts has one for each position
_version_of = operator.attrgetter("_version")


class PreparedStep:
    """`token_step` whose SAE, lists, strength, mode and backend stay. It computes the same, with less Python per token.

    The SAE's arguments and the lists are checked when it is made, and again when a tensor of them was written to or
    moved, as far as `token_step` looks at them. Hidden states, flags and counters are compared with what was checked.
    A call that differs in anything, is being compiled, or is recorded by autograd goes to `token_step`, which checks
    everything.

    Args and errors as for `token_step`. The lists and `alpha`, if it is a tensor, are read where they are: update them
    in place. A backend of the name "auto" is chosen once for each dtype of hidden states.
    """

    def __init__(
        self,
        sae: SaeWeights,
        edits: EditList,
        alpha: float | Tensor,
        *,
        mode: StepMode | None = None,
        backend: str = "auto",
    ) -> None:
        self.edits = edits
        self.alpha = alpha
        self._sae = sae
        self._mode: StepMode | None = mode
        self._backend = backend
        self._shape = torch.Size((edits.batch, sae.d_model))
        self._rows = torch.Size((edits.batch,))
        self._device = edits.latents.device
        of_lists = (edits.latents, edits.signs, edits.counts)
        read = (*of_lists, alpha) if isinstance(alpha, Tensor) else of_lists
        self._read = read if can_be_read(edits.latents) else ()  # whose values `token_step` checks
        self._is_bindable = not any(tensor.is_inference() for tensor in read)  # others do not tell of writes
        self._checked: tuple[int, ...] = ()
        self._bound: dict[torch.dtype, BoundStep | None] = {}
        self._known: dict[TokenStats, None] = {}

    @torch.no_grad()
    def prepare(self, dtype: torch.dtype) -> None:
        """Compiles and allocates what steps on hidden states of a dtype need, by steps that edit no row: in a graph
        that is captured or compiled, neither can be done."""
        hidden = torch.zeros(self._shape, dtype=dtype, device=self._device)
        self(hidden, torch.zeros(self._rows, dtype=torch.bool, device=self._device))

    def __call__(self, hidden: Tensor, enabled: Tensor | None = None, stats: TokenStats | None = None) -> None:
        if torch.compiler.is_compiling():
            self._step(hidden, enabled, stats)
            return
        is_stale = False
        if self._fits(hidden, enabled, stats):
            bound = self._bound.get(hidden.dtype)
            if bound is not None:
                if bound(hidden, enabled, stats):
                    return
                is_stale = True
        versions = self._versions()
        self._step(hidden, enabled, stats)
        self._checked = versions
        if stats is not None and stats not in self._known:
            while len(self._known) >= MOST_COUNTERS:
                del self._known[next(iter(self._known))]
            self._known[stats] = None
        if (is_stale or hidden.dtype not in self._bound) and not is_being_captured(self._device):
            self._bound[hidden.dtype] = self._bind(hidden.dtype)

    def _fits(self, hidden: Tensor, enabled: Tensor | None, stats: TokenStats | None) -> bool:
        """Whether a call is like one that `token_step` has checked."""
        return (
            type(hidden) is Tensor
            and hidden.shape == self._shape
            and hidden.device == self._device
            and hidden.layout is torch.strided
            and not torch.is_grad_enabled()
            and (
                enabled is None
                or (
                    type(enabled) is Tensor
                    and enabled.shape == self._rows
                    and enabled.dtype is torch.bool
                    and enabled.device == self._device
                )
            )
            and (stats is None or stats in self._known)
            and self._versions() == self._checked
        )

    def _versions(self) -> tuple[int, ...]:
        return tuple(map(_version_of, self._read)) if self._is_bindable else ()

    def _step(self, hidden: Tensor, enabled: Tensor | None, stats: TokenStats | None) -> None:
        token_step(hidden, self._sae, self.edits, self.alpha, enabled, stats, mode=self._mode, backend=self._backend)

    def _bind(self, dtype: torch.dtype) -> BoundStep | None:
        if not self._is_bindable or self.edits.batch == 0:
            return None
        hidden = torch.zeros(self._shape, dtype=dtype, device=self._device)
        bind = operations_for(self._backend, "token_step", (hidden,), self._sae).bind_step
        return None if bind is None else bind(hidden, self._sae, self.edits, self.alpha, self._mode)
