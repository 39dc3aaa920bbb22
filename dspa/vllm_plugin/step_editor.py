"""Editing the tokens of a step: one launch for the rows of all policies that share one."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dspa.errors import InvalidInputError
from dspa.kernels import EditList, StepMode, TokenStats
from dspa.online.policy_groups import EditingGroup
from dspa.vllm_plugin.step import RequestState, stream_at

COUNTERS = ("seen", "edited", "nonfinite")
ROWS = 512  # that one launch edits, at most: what it reads and writes is allocated once, and kept


@dataclass(frozen=True, eq=False)
class _Buffers:
    """What launches of up to so many rows read and write, at fixed addresses."""

    hidden: Tensor
    enabled: Tensor
    stats: TokenStats


class StepEditor:
    """Edits some rows of a step after one layer, by one launch for up to `ROWS` of them.

    Attributes:
        layer: the decoder layer.
        names: whose tokens are edited.
        counters: `[policies + 1, len(COUNTERS)]` int64 on the device, the last row of tokens that are not counted.
        host_counters: the same on the host, when the device has come that far.
    """

    def __init__(
        self,
        group: EditingGroup,
        numbers: dict[str, int],
        device: torch.device,
        backend: str,
        mode: StepMode | None = None,
    ) -> None:
        """Args:
        group: the policies that share a launch.
        numbers: the row of each policy in `counters`.
        device: where it edits.
        backend: a kernel backend's name, or "auto".
        mode: how the kernel gets to its result.
        """
        first = next(iter(group.interventions.values()))
        self._editor = first.editor(group.interventions, device, backend, mode)
        self.layer = group.layer
        self.names = frozenset(group.names)
        self._numbers = numbers
        self._device = device
        self._by_size: dict[int, _Buffers] = {}
        self._states: list[RequestState] = []
        self._row_list: list[int] = []
        self._counted: list[bool] = []
        self._prepared = False
        self.counters = torch.zeros(len(numbers) + 1, len(COUNTERS), dtype=torch.int64, device=device)
        self.host_counters = torch.zeros(
            self.counters.shape, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda"
        )

    def step_bytes(self, tokens: int, d_model: int) -> int:
        """How many bytes the edits of a step of so many tokens take at most, in float32."""
        kept = 2 * min(ROWS, 1 << (tokens - 1).bit_length())  # of all powers of two up to it
        return 4 * d_model * (kept + 6 * min(ROWS, tokens))

    def begin_step(self, rows: list[int], states: list[RequestState], counted: list[bool]) -> bool:
        """States which rows of the step are edited, for which request, and whether they are counted.

        Returns:
            Whether there are any.
        """
        if rows != self._row_list or states != self._states or counted != self._counted:
            self._row_list, self._states, self._counted = rows, states, counted
            self._prepared = False
        return bool(rows)

    def edit(self, hidden: Tensor, residual: Tensor | None) -> None:
        """Edits them in place, `hidden` and `residual` `[N, d_model]` of all tokens of the step. Where a row changes,
        its `residual` becomes the edited stream and its `hidden` zero; another row keeps its bits."""
        count = len(self._row_list)
        if count <= ROWS:
            if not self._prepared:
                self._prepare(hidden, 0, count)
                self._prepared = True
            self._edit_rows(hidden, residual, count)
        else:
            for first in range(0, count, ROWS):
                end = min(count, first + ROWS)
                self._prepare(hidden, first, end)
                self._edit_rows(hidden, residual, end - first)
        self.host_counters.copy_(self.counters, non_blocking=True)

    def _edit_rows(self, hidden: Tensor, residual: Tensor | None, count: int) -> None:
        """Edits the rows that were prepared."""
        buffers = self._buffers
        stream = stream_at(self._rows, hidden, residual)
        buffers.hidden[:count] = stream
        self._editor.edit(buffers.hidden[:, None], buffers.enabled[:, None], [buffers.stats])
        edited = buffers.hidden[:count]
        if residual is None:
            hidden.index_copy_(0, self._rows, edited)
        else:
            changed = (edited != stream).any(dim=1, keepdim=True)
            residual.index_copy_(0, self._rows, torch.where(changed, edited, residual.index_select(0, self._rows)))
            hidden.index_copy_(0, self._rows, hidden.index_select(0, self._rows).masked_fill_(changed, 0))
        self._count(buffers.stats, count)

    def _prepare(self, hidden: Tensor, first: int, end: int) -> None:
        """Brings the lists of some of the rows to the place where the launch reads them."""
        states, count = self._states[first:end], end - first
        size = 1 << (count - 1).bit_length()
        buffers = self._by_size.get(size)
        if buffers is None:
            with torch.inference_mode(False):  # they are written in later steps
                buffers = self._by_size[size] = _Buffers(
                    torch.zeros(size, hidden.shape[1], dtype=hidden.dtype, device=self._device),
                    torch.zeros(size, dtype=torch.bool, device=self._device),
                    TokenStats.zeros(size, self._editor.latents, self._device),
                )
        self._buffers = buffers
        self._rows = torch.tensor(self._row_list[first:end], device=self._device)
        buffers.enabled[:count] = True
        buffers.enabled[count:] = False
        uncounted = len(self._numbers)
        numbers = [
            self._numbers[state.policy] if counted else uncounted
            for state, counted in zip(states, self._counted[first:end], strict=True)
        ]
        self._row_numbers = torch.tensor(numbers, device=self._device)
        self._editor.begin_prompt([*(state.policy for state in states), *[None] * (size - count)])
        of_policy: dict[str, list[int]] = {}
        for row, state in enumerate(states):
            if not state.selected:
                raise InvalidInputError("a token is to be edited whose prompt was not read; this is an error of dspa")
            if state.selection is not None:
                of_policy.setdefault(state.policy, []).append(row)
        for rows in of_policy.values():
            lists = [selection for row in rows if (selection := states[row].selection) is not None]
            together = EditList(
                torch.cat([each.latents for each in lists]),
                torch.cat([each.signs for each in lists]),
                torch.cat([each.counts for each in lists]),
            )
            self._editor.set_selection(together, torch.tensor(rows))

    def _count(self, stats: TokenStats, rows: int) -> None:
        """Adds the step's tokens to their policies' counters."""
        of_rows = torch.stack([getattr(stats, name)[:rows] for name in COUNTERS], dim=1)
        self.counters.index_add_(0, self._row_numbers, of_rows)
        for each in fields(stats):
            getattr(stats, each.name).zero_()
