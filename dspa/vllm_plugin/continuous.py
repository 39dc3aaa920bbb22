"""Steering a continuous batch: each step computes some tokens of some requests, each under its own policy.

    before a step     `begin_step`: which tokens it computes of which requests. Those without a policy are not named.
    after a layer     the prompt tokens of the step, of all requests that read alike, are encoded by one call. The
    that is read      counts add up over the steps that a prompt takes; after the last, its policy selects its edits.
    after a layer     the rows of all policies that share a launch are edited by one, each with its own list and
    that is edited    strength.
    after the step    `end_step`: every layer concerned was computed, once. A step that was not steered raises, so that
                      nothing of it is answered.

State belongs to requests, from their first step until `forget`; what was read of a block of the KV cache belongs to the
block. A preempted request keeps its lists: its tokens are computed again, and edited by the same lists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspa.errors import DspaError
from dspa.kernels import StepMode
from dspa.methods.policy import Policy
from dspa.online.policy_groups import editing_groups, reading_groups
from dspa.vllm_plugin.step import RequestState, Segment
from dspa.vllm_plugin.step_editor import COUNTERS, StepEditor
from dspa.vllm_plugin.step_reader import StepReader


@dataclass(frozen=True)
class PolicyCounts:
    """The tokens of one policy so far: positions that were to be edited, those whose hidden state changed, and those
    left alone because of NaN or Inf."""

    seen: int
    edited: int
    nonfinite: int


class ContinuousSteering:
    """The policies of an engine, and the requests that follow them.

    Attributes:
        policies: by name.
        requests: what is known of each steered request, by id.
    """

    def __init__(
        self,
        policies: Mapping[str, Policy],
        device: torch.device,
        backend: str = "auto",
        mode: StepMode | None = None,
    ) -> None:
        """Args:
        policies: by name; they fit the model.
        device: where the model computes.
        backend: a kernel backend's name, or "auto".
        mode: how the kernel gets to its result.
        """
        self.policies = dict(policies)
        self.requests: dict[str, RequestState] = {}
        self._readers = [
            StepReader(group, self.policies, device, backend)
            for group in reading_groups(self.policies)
            if group.sae is not None
        ]
        numbers = {name: number for number, name in enumerate(self.policies)}
        self._editors = [StepEditor(group, numbers, device, backend, mode) for group in editing_groups(self.policies)]
        self._reading: list[StepReader] = []
        self._editing: list[StepEditor] = []
        self._due: set[int] = set()  # layers that this step reads or edits after, and has not computed
        self._computed: set[int] = set()  # those that it has

    def keep_by_block(self, blocks: int, block_tokens: int) -> int:
        """From now on requests may begin with blocks of the KV cache that others computed.

        Args:
            blocks: how many blocks the KV cache has.
            block_tokens: tokens of a block.

        Returns:
            How many bytes that takes.
        """
        return sum(reader.keep_by_block(blocks, block_tokens) for reader in self._readers)

    def bytes_per_block(self, block_tokens: int) -> int:
        """How many bytes `keep_by_block` takes for each block."""
        return sum(reader.bytes_per_block(block_tokens) for reader in self._readers)

    def step_bytes(self, tokens: int, requests: int, block_tokens: int, d_model: int) -> int:
        """How many bytes steering takes at most during a step of so many tokens and requests, and keeps."""
        return max((reader.step_bytes(tokens, requests, block_tokens) for reader in self._readers), default=0) + sum(
            editor.step_bytes(tokens, d_model) for editor in self._editors
        )

    @property
    def reads(self) -> bool:
        """Whether a policy reads prompts."""
        return bool(self._readers)

    def begin_step(self, segments: Sequence[Segment]) -> bool:
        """States what the step computes of requests that have a policy.

        Returns:
            Whether anything is to be read or edited.
        """
        known: list[tuple[Segment, RequestState]] = []
        for segment in segments:
            state = self.requests.get(segment.request)
            if state is None:
                state = self.requests[segment.request] = RequestState.of(segment, self.policies[segment.policy])
            known.append((segment, state))
        self._reading = [reader for reader in self._readers if reader.begin_step(known)]
        self._editing = []
        for editor in self._editors:
            rows: list[int] = []
            states: list[RequestState] = []
            counted: list[bool] = []
            for segment, state in known:
                if segment.policy not in editor.names:
                    continue
                if segment.tokens == 1 and segment.start >= state.prompt_tokens:  # as almost always
                    rows.append(segment.first_row)
                    states.append(state)
                    counted.append(segment.start >= state.seen_until)
                else:
                    positions = state.edited_positions(self.policies[segment.policy], segment)
                    rows += (positions + (segment.first_row - segment.start)).tolist()
                    states += [state] * len(positions)
                    counted += (positions >= state.seen_until).tolist()
            if editor.begin_step(rows, states, counted):
                self._editing.append(editor)
        for segment, state in known:
            state.seen_until = max(state.seen_until, segment.end)
        self._due = {part.layer for part in (*self._reading, *self._editing)}
        self._computed = set()
        return bool(self._due)

    def end_step(self) -> None:
        """Checks that the step was steered.

        Raises:
            DspaError: if it has not computed a layer that was to be read or edited, as far as this object was told.
        """
        if self._due:
            raise DspaError(
                f"a step computed tokens under a policy, and layers {sorted(self._due)} told nothing: "
                "it was not steered, and nothing of it is answered; start vLLM with enforce_eager=True"
            )

    @torch.no_grad()
    def layer_computed(self, layer: int, hidden: Tensor, residual: Tensor | None) -> None:
        """Reads and edits what is to be read and edited after a layer, in place. The residual stream is
        `hidden + residual`, `[N, d_model]` both, or `hidden` alone.

        Raises:
            DspaError: if the step has computed the layer before.
        """
        if layer in self._computed:
            raise DspaError(f"a step computed layer {layer} twice, so that its tokens would be edited twice")
        if layer not in self._due:
            return
        self._due.remove(layer)
        self._computed.add(layer)
        for reader in self._reading:
            if reader.layer == layer:
                reader.read(hidden, residual)
        for editor in self._editing:
            if editor.layer == layer:
                editor.edit(hidden, residual)

    def forget(self, request: str) -> None:
        """A request has ended, however it did."""
        self.requests.pop(request, None)

    def counts(self) -> dict[str, PolicyCounts]:
        """The tokens of each policy so far, as far as the device has come. Any thread may ask: nothing waits for the
        device."""
        total = torch.stack([editor.host_counters for editor in self._editors]).sum(dim=0).tolist()
        return {
            name: PolicyCounts(**dict(zip(COUNTERS, row, strict=True)))
            for name, row in zip(self.policies, total[:-1], strict=True)
        }
