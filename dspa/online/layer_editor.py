"""Editing after one layer: which rows, at which positions, counted where."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dspa.kernels import EditList, StepMode
from dspa.online.counters import PositionCounters
from dspa.online.policy_groups import EditingGroup
from dspa.online.trace import TraceRecorder


class LayerEditor:
    """Edits the rows of a group of policies after their layer, by the group's `PositionEditor`.

    Attributes:
        group: whose rows are edited.
        counters: what was seen and edited.
        all_rows: whether every row of every batch is edited, so that no rows have to be told apart.
        always_launches: whether a step runs also for batches without a row to edit. It does on a GPU: the step may be
            captured in a graph just then, which will serve other batches.
    """

    def __init__(
        self,
        group: EditingGroup,
        device: torch.device,
        backend: str,
        mode: StepMode | None,
        *,
        all_rows: bool,
        recorder: TraceRecorder | None = None,
    ) -> None:
        self.group = group
        first = next(iter(group.interventions.values()))
        self._editor = first.editor(group.interventions, device, backend, mode)
        self.counters = PositionCounters(self._editor.latents, self._editor.device)
        self.all_rows = all_rows
        self.always_launches = device.type == "cuda"
        self._recorder = recorder
        self._rows_by_batch: dict[int, Tensor] = {}  # [B] bool, at fixed addresses
        self._rows: Tensor | None = None
        self._idle = True  # whether no row of the batch is in this group

    def prepare(self, dtype: torch.dtype) -> None:
        """Compiles what edits of hidden states of a dtype need, as far as the editor can tell before a prompt."""
        prepare: Callable[[torch.dtype], None] | None = getattr(self._editor, "prepare", None)  # not of every editor
        if prepare is not None:
            prepare(dtype)

    def begin_prompt(self, row_policies: Sequence[str | None]) -> None:
        """Another prompt begins: the policy of each row."""
        batch = len(row_policies)
        self.counters.begin_prompt()
        self._idle = not any(name in self.group.interventions for name in row_policies)
        if self._idle and not self.always_launches:
            return
        self.counters.of_batch(batch)  # allocated now, not in a captured graph
        if batch not in self._rows_by_batch:
            with torch.inference_mode(False):  # they are written in later calls, which may not be in inference mode
                self._rows_by_batch[batch] = torch.zeros(batch, dtype=torch.bool, device=self._editor.device)
        self._rows = self._rows_by_batch[batch]
        self._rows.copy_(torch.tensor([name in self.group.interventions for name in row_policies]))
        self._editor.begin_prompt(row_policies)

    def set_selection(self, selection: EditList | None, rows: Tensor) -> None:
        """Stores what a policy selected for its rows, `rows [n]` int64; None for an edit without lists."""
        if selection is not None:
            self._editor.set_selection(selection, rows)

    def selection(self) -> EditList | None:
        """The lists of the last prompt, for an edit that has lists; None if no row of it is in this group."""
        return None if self._idle else self._editor.selection()

    def edit(
        self, hidden: Tensor, position: int, enabled: Tensor | None, *, counted: Sequence[bool], speculative: bool
    ) -> None:
        """Edits consecutive positions of a batch in place.

        Args:
            hidden: `[B, T, d_model]`, a view of the pass.
            position: the first of them.
            enabled: `[B, T]` bool, the rows to edit at each; None for all rows of this group.
            counted: for each position, whether its tokens are counted; those that are computed again are not.
            speculative: whether their tokens may be rejected; then `counters.commit` decides.
        """
        if self._idle and not self.always_launches:
            return
        batch = hidden.shape[0]
        stats = [
            self.counters.of_position(batch, position + index, speculative=speculative)
            if count or speculative
            else None
            for index, count in enumerate(counted)
        ]
        enabled = self._enabled(hidden, enabled)
        if self._recorder is not None:
            for index in range(len(counted)):
                on = None if enabled is None else enabled[:, index]
                self._recorder.record(position + index, self.group.layer, self._editor.describe(hidden[:, index], on))
        self._editor.edit(hidden, enabled, stats)

    def differentiable_edit(self, hidden: Tensor, enabled: Tensor | None) -> Tensor:
        """The edited states as a new tensor, for autograd to follow; arguments as for `edit`. Nothing is counted."""
        return hidden if self._idle else self._editor.differentiable_edit(hidden, self._enabled(hidden, enabled))

    def _enabled(self, hidden: Tensor, enabled: Tensor | None) -> Tensor | None:
        if enabled is not None:
            enabled = enabled.to(hidden.device)
            return enabled if self.all_rows else enabled & self._group_rows[:, None]
        return None if self.all_rows else self._group_rows[:, None].expand(hidden.shape[:2])

    @property
    def _group_rows(self) -> Tensor:
        assert self._rows is not None  # a prompt has begun
        return self._rows
