"""Reading prompts and editing tokens after one layer, for the rows of a batch and all policies that share an SAE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dspa.errors import InvalidInputError
from dspa.kernels import EditList, SaeWeights, StepMode, TokenStats, encode_density, token_step
from dspa.methods.policy import Policy
from dspa.online.policy_groups import PolicyGroup
from dspa.online.prompt_mask import PromptMask
from dspa.online.trace import TraceRecorder


def outside_inference_mode() -> torch.inference_mode:
    """For what is allocated in one call and written in the next, which may not be in inference mode."""
    return torch.inference_mode(False)


class PromptReader:
    """Counts, on how many tokens of each row's prompt each latent is active (method.md, section 3).

    Attributes:
        group: whose prompts are read.
        counts: `[B, d_sae]` int32, by row.
        tokens: `[B]` int64, counted tokens of each row; None before the first pass.
        columns_read: prompt columns that have come by.
    """

    def __init__(self, group: PolicyGroup, device: torch.device, backend: str) -> None:
        self.group = group
        self._sae = None if group.sae is None else group.sae.to(device)
        self._backend = backend
        self.forget()

    def forget(self) -> None:
        """Another prompt is about to come."""
        self.counts: Tensor | None = None
        self.tokens: Tensor | None = None
        self.columns_read = 0

    def read(self, hidden: Tensor, prompt: PromptMask, rows: Tensor, past: int) -> None:
        """Counts the prompt columns of a pass that have not come by before.

        Args:
            hidden: `[B, T, d_model]`, columns `past` to `past + T`.
            prompt: which columns count.
            rows: `[B]` bool, the rows of this group.
            past: the first column of the pass.
        """
        start, end = max(past, self.columns_read), min(past + hidden.shape[1], prompt.width)
        if start >= end:
            return
        counted = (prompt.counted[:, start:end] & rows.to(prompt.counted.device)[:, None]).to(hidden.device)
        tokens = counted.sum(dim=1)
        if self._sae is None:
            counts = torch.zeros(len(tokens), 0, dtype=torch.int32, device=hidden.device)
        else:
            self._sae = self._sae.to(hidden.device)
            offsets = torch.zeros(len(tokens) + 1, dtype=torch.int64, device=hidden.device)
            offsets[1:] = tokens.cumsum(dim=0)
            kept = hidden[:, start - past : end - past][counted]
            counts = encode_density(kept, offsets, self._sae, backend=self._backend)
        self.counts = counts if self.counts is None else self.counts + counts
        self.tokens = tokens if self.tokens is None else self.tokens + tokens
        self.columns_read = end

    def select(self, policy: Policy, rows: Tensor, repeats: int = 1) -> EditList:
        """A policy's edit lists for some rows, `rows [n]` int64; empty for a row without a counted token.

        A rule that does not look at the prompt may have a list for each prompt of the batch, of which there are
        `repeats` rows each."""
        assert self.counts is not None
        assert self.tokens is not None
        if self._sae is None:
            edits = policy.select(self.counts[::repeats].float())
            return edits.rows(rows.to(edits.latents.device) // repeats)
        if len(rows) < len(self.tokens):
            counts, tokens = self.counts[rows.to(self.counts.device)], self.tokens[rows.to(self.tokens.device)]
        else:
            counts, tokens = self.counts, self.tokens
        edits = policy.select(counts / tokens.clamp(min=1)[:, None])
        return EditList(edits.latents, edits.signs, edits.counts * (tokens > 0).to(edits.counts.device))


@dataclass(eq=False)
class EditBuffers:
    """What the token steps of batches of one size read and write. Allocated once and updated in place, so that graphs
    which were captured or compiled with them serve the next prompt as well.

    Attributes:
        edits: the lists, `[B, k]`, k that of the group's longest; None before the first prompt.
        rows: `[B]` bool, the rows this editor edits.
        alpha: one strength for all, or `[B]`.
        stats: counters of everything so far.
    """

    edits: EditList | None
    rows: Tensor
    alpha: float | Tensor
    stats: TokenStats


class TokenEditor:
    """Edits the residual stream after one layer: one `token_step` for all rows of a batch.

    Tokens that a generate call computed on trial, such as the candidates of assisted decoding, are edited like all
    others, but their counts wait until it is known whether they were accepted.

    Attributes:
        group: whose rows are edited.
        sae: the output SAE, where the layer is.
        all_rows: whether every row of every batch is edited, so that no rows have to be told apart.
        always_launches: whether `token_step` runs also for batches without a row to edit. It does on a GPU: the step
            may be captured in a graph just then, which will serve other batches.
    """

    def __init__(
        self,
        group: PolicyGroup,
        policies: Mapping[str, Policy],
        device: torch.device,
        backend: str,
        mode: StepMode | None,
        *,
        all_rows: bool,
        recorder: TraceRecorder | None,
    ) -> None:
        assert group.sae is not None
        self.group = group
        self.sae: SaeWeights = group.sae.to(device)
        self._alphas = {name: float(policies[name].alpha) for name in group.names}
        self._longest = max(_longest_list(policies[name]) for name in group.names)
        self._backend = backend
        self._mode: StepMode | None = mode
        self.all_rows = all_rows
        self.always_launches = device.type == "cuda"
        self._recorder = recorder
        self._buffers: dict[int, EditBuffers] = {}
        self._waiting: dict[int, TokenStats] = {}
        self._spare: list[TokenStats] = []
        self._idle = False  # whether no row of the batch is this editor's

    def buffers(self, batch: int) -> EditBuffers:
        """The buffers of batches of so many rows."""
        if batch not in self._buffers:
            device, alphas = self.sae.device, set(self._alphas.values())
            dtype = torch.float64 if self.sae.dtype == torch.float64 else torch.float32
            with outside_inference_mode():
                self._buffers[batch] = EditBuffers(
                    edits=None,
                    rows=torch.zeros(batch, dtype=torch.bool, device=device),
                    alpha=alphas.pop() if len(alphas) == 1 else torch.zeros(batch, dtype=dtype, device=device),
                    stats=TokenStats.zeros(batch, self.sae.d_sae, device),
                )
        return self._buffers[batch]

    def all_stats(self) -> list[TokenStats]:
        """The counters of every size of batch."""
        return [buffers.stats for buffers in self._buffers.values()]

    def totals(self) -> Tensor:
        """Tokens seen, edited and not finite so far, `[3]` int64."""
        sums = [torch.stack([s.seen.sum(), s.edited.sum(), s.nonfinite.sum()]) for s in self.all_stats()]
        return torch.stack(sums).sum(dim=0) if sums else torch.zeros(3, dtype=torch.int64, device=self.sae.device)

    def begin(self, row_names: list[str | None]) -> None:
        """Another prompt: which policy each row has; nobody's edit lists are known yet."""
        buffers = self.buffers(len(row_names))
        self._waiting.clear()
        self._idle = not any(name in self._alphas for name in row_names)
        if buffers.edits is not None:
            buffers.edits.counts.zero_()
        elif self._idle and self.always_launches:
            buffers.edits = self._empty_lists(len(row_names), 0)
            self._prepare(len(row_names), buffers.edits)
        if not self.all_rows:
            buffers.rows.copy_(torch.tensor([name in self._alphas for name in row_names]))
        if isinstance(buffers.alpha, Tensor):
            strengths = [self._alphas.get(name or "", 0.0) for name in row_names]
            buffers.alpha.copy_(torch.tensor(strengths, dtype=torch.float64))

    def take(self, edits: EditList, rows: Tensor, batch: int) -> None:
        """Puts one policy's edit lists into its rows, `rows [n]` int64."""
        buffers, k = self.buffers(batch), edits.k
        lists = buffers.edits
        if lists is None or lists.k < k:
            lists = self._empty_lists(batch, k)
            if buffers.edits is not None:
                for new, old in zip(_tensors(lists), _tensors(buffers.edits), strict=True):
                    new[:, : old.shape[1]].copy_(old) if old.ndim == 2 else new.copy_(old)
            buffers.edits = lists
            self._prepare(batch, lists)
        if edits.batch == batch and lists.k == k:
            lists.copy_(edits)
            return
        rows = rows.to(self.sae.device)
        lists.latents[rows] = 0
        lists.signs[rows] = 0
        lists.latents[rows, :k] = edits.latents.to(self.sae.device)
        lists.signs[rows, :k] = edits.signs.to(self.sae.device)
        lists.counts[rows] = edits.counts.to(self.sae.device)

    def edit(self, hidden: Tensor, column: int, enabled: Tensor | None, *, counted: bool, on_trial: bool) -> None:
        """Edits one column of a batch in place.

        Args:
            hidden: `[B, d_model]`, the column's hidden states.
            column: which one, from 0.
            enabled: `[B]` bool, the rows to edit there; None for all rows of this editor.
            counted: False for a column that was counted before and is computed again.
            on_trial: whether it may be rejected; then `settle` decides.
        """
        if self._idle and not self.always_launches:
            return
        batch = len(hidden)
        buffers = self._buffers[batch]
        if buffers.edits is None:
            raise InvalidInputError(f"a token was to be edited after layer {self.group.layer} before a prompt was read")
        if enabled is not None:
            enabled = enabled.to(hidden.device) if self.all_rows else enabled.to(hidden.device) & buffers.rows
        elif not self.all_rows:
            enabled = buffers.rows
        stats = buffers.stats if counted else None
        if on_trial:
            stats = self._waiting[column] = self._spare_stats(batch)
        step = None if self._recorder is None else self._recorder.before(self.group, self.sae, hidden, buffers, enabled)
        token_step(
            hidden, self.sae, buffers.edits, buffers.alpha, enabled, stats, mode=self._mode, backend=self._backend
        )
        if self._recorder is not None:
            self._recorder.record(column, step)

    def _prepare(self, batch: int, lists: EditList) -> None:
        """A step that edits no row: what the backend keeps between steps is made now, not in a compiled or captured
        graph, whose memory is not for keeping."""
        with outside_inference_mode():
            hidden = torch.zeros(batch, self.sae.d_model, dtype=self.sae.dtype, device=self.sae.device)
            no_row = torch.zeros(batch, dtype=torch.bool, device=self.sae.device)
            token_step(hidden, self.sae, lists, 0.0, no_row, mode=self._mode, backend=self._backend)

    def settle(self, accepted: int, batch: int) -> None:
        """Counts the columns on trial before column `accepted`, and forgets the others."""
        for column, stats in self._waiting.items():
            if column < accepted:
                _add(self.buffers(batch).stats, stats)
            self._spare.append(stats)
        self._waiting.clear()

    def _empty_lists(self, batch: int, k: int) -> EditList:
        with outside_inference_mode():
            return EditList.empty(batch, max(k, self._longest), self.sae.device)

    def _spare_stats(self, batch: int) -> TokenStats:
        while self._spare:
            stats = self._spare.pop()
            if len(stats.seen) == batch and stats.seen.device == self.sae.device:
                for tensor in _tensors(stats):
                    tensor.zero_()
                return stats
        with outside_inference_mode():
            return TokenStats.zeros(batch, self.sae.d_sae, self.sae.device)


def _longest_list(policy: Policy) -> int:
    """How long its lists can be, where it says so; 0 where it does not."""
    edits = getattr(policy, "edits", None)
    if isinstance(edits, EditList):
        return edits.k
    sides = 2 if getattr(policy, "edit", None) == "both" else 1
    return sides * getattr(policy, "k_diff", 0)


def _tensors(record: EditList | TokenStats) -> list[Tensor]:
    return [getattr(record, field.name) for field in fields(record)]


def _add(total: TokenStats, more: TokenStats) -> None:
    total.maximum.copy_(torch.where(more.seen > 0, more.maximum, total.maximum))
    for field in fields(total):
        if field.name != "maximum":
            getattr(total, field.name).add_(getattr(more, field.name))
