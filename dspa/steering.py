"""Steering a transformers model while it generates: hooks that read the prompt and edit the residual stream.

A forward pass computes columns `past` to `past + T` of the batch; the first P columns are the prompt:

    after input_layer     The active latents of prompt columns are counted. When the last of them has been read, the
                          counts become densities and the policy selects the edit lists: once per prompt.
    after output_layer    Prompt columns the policy edits, and every column from P on, go through `token_step`.

In a `generate` call the prompt is what was passed to it, whatever its cache does. In a plain forward call the prompt
is the whole input, unless a cache with columns is passed: then the call continues the last prompt.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from dspa.errors import InvalidInputError
from dspa.generate_calls import observe_generate
from dspa.kernels import EditList, StepMode, TokenStats, encode_density, token_step
from dspa.model_structure import check_sae_fits, decoder_stack, device_of, hidden_of, with_hidden
from dspa.policy import Policy
from dspa.prompt_columns import PromptColumns
from dspa.steering_summary import SteeringSummary


def steer(model: nn.Module, policy: Policy, *, backend: str = "auto", mode: StepMode | None = None) -> Steering:
    """Attaches a policy to a model: from now on `model.generate` and forward calls are steered.

    Use it as a context manager, or call `remove()` on what it returns. The model's weights are not touched.

    Args:
        model: a transformers causal language model.
        policy: a `SteeringPolicy`, or anything with the same fields.
        backend: a kernel backend's name, or "auto".
        mode: how the kernel gets to its result; see `dspa.kernels.token_step`.

    Raises:
        MismatchError: if the policy was made for another model.
        InvalidInputError: if the model's decoder layers cannot be found, or it cannot generate.
    """
    return Steering(model, policy, backend=backend, mode=mode)


class Steering:
    """A policy attached to a model; made by `steer`.

    Attributes:
        model: the steered model.
        policy: the policy it is steered by.
    """

    def __init__(self, model: nn.Module, policy: Policy, *, backend: str, mode: StepMode | None) -> None:
        policy.model.check(model)
        stack = decoder_stack(model)
        if policy.input_sae is not None:
            check_sae_fits(policy.input_sae, "input", policy.input_layer, policy.model)
        check_sae_fits(policy.output_sae, "output", policy.output_layer, policy.model)
        input_layer, output_layer = stack.layers[policy.input_layer], stack.layers[policy.output_layer]
        self.model = model
        self.policy = policy
        self._backend = backend
        self._mode: StepMode | None = mode
        self._input_sae = None if policy.input_sae is None else policy.input_sae.to(device_of(input_layer))
        self._output_sae = policy.output_sae.to(device_of(output_layer))
        self._uncounted = torch.tensor(sorted(policy.uncounted_token_ids), dtype=torch.int64)
        self._forward_signature = inspect.signature(type(stack.module).forward)

        self._generating: PromptColumns | None = None  # the prompt of the running generate call
        self._prompt: PromptColumns | None = None  # the same, or a forward call's, a row per row of the pass
        self._past = 0
        self._counts: Tensor | None = None
        self._tokens: Tensor | None = None
        self._edits: EditList | None = None
        self._selected = False  # whether the edit lists belong to the current prompt
        self._counted_until = 0  # columns before this one have been counted: decoding without a cache comes again
        self._prompts = 0
        self._stats: dict[int, TokenStats] = {}
        self._warned_of_nonfinite = False

        self._handles = [
            observe_generate(model, self),
            stack.module.register_forward_pre_hook(self._before_pass, with_kwargs=True),
            input_layer.register_forward_hook(self._after_input_layer),
            output_layer.register_forward_hook(self._after_output_layer),
        ]

    def remove(self) -> None:
        """Detaches the policy; the model generates as before. Doing it twice does no harm."""
        while self._handles:
            self._handles.pop().remove()
        self._warn_of_nonfinite()

    def __enter__(self) -> Steering:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    @property
    def edits(self) -> EditList | None:
        """The edit lists of the last prompts, one a row; None before there was a prompt."""
        return self._edits if self._selected else None

    def counters(self, batch: int) -> TokenStats:
        """The counters of the passes with so many rows, updated in place as tokens are edited."""
        if batch not in self._stats:
            self._stats[batch] = TokenStats.zeros(batch, self._output_sae.d_sae, self._output_sae.device)
        return self._stats[batch]

    def summary(self) -> SteeringSummary:
        """What was seen and edited since the policy was attached."""
        return SteeringSummary.of(self._stats.values(), self._prompts)

    def generate_begins(self, token_ids: Tensor | None, present: Tensor) -> None:
        """Called when `model.generate` starts.

        Raises:
            InvalidInputError: if another generate call is running on this model.
        """
        if self._generating is not None:
            raise InvalidInputError("another generate call is running on this steered model; run one at a time")
        self._generating = self._columns(token_ids, present)
        self._new_prompt(None)

    def generate_ends(self) -> None:
        """Called when `model.generate` has returned or raised."""
        self._generating = None
        self._warn_of_nonfinite()

    def _warn_of_nonfinite(self) -> None:
        nonfinite = sum(int(stats.nonfinite.sum()) for stats in self._stats.values())
        if nonfinite and not self._warned_of_nonfinite:
            self._warned_of_nonfinite = True
            warnings.warn(
                f"{nonfinite} tokens had NaN or Inf in the residual stream after layer {self.policy.output_layer} and "
                "were left unedited; look for an overflow in the model (float16 is a common cause)",
                stacklevel=4,
            )

    def _columns(self, token_ids: Tensor | None, present: Tensor) -> PromptColumns:
        return PromptColumns.of(token_ids, present, self._uncounted, self.policy.edit_positions)

    def _new_prompt(self, prompt: PromptColumns | None) -> None:
        self._prompt = prompt
        self._counts = self._tokens = None
        self._selected = False
        self._counted_until = 0

    def _before_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Finds out which columns the pass is about to compute, and of which prompt."""
        arguments = self._forward_signature.bind_partial(module, *args, **kwargs).arguments
        arguments.update(arguments.get("kwargs", {}))
        token_ids, cache = arguments.get("input_ids"), arguments.get("past_key_values")
        batch, width = (token_ids if token_ids is not None else arguments["inputs_embeds"]).shape[:2]
        self._past = 0 if cache is None else int(cache.get_seq_length())
        if self._generating is not None:
            if self._prompt is None or self._prompt.batch != batch:
                self._prompt = self._generating.expanded_to(batch)
        elif self._past == 0:
            mask = arguments.get("attention_mask")
            if not isinstance(mask, Tensor) or mask.shape != (batch, width):  # a mask already made into another form
                mask = torch.ones(batch, width, device=device_of(module))
            self._new_prompt(self._columns(token_ids, mask))

    def _after_input_layer(self, module: nn.Module, args: object, output: Any) -> None:
        """Counts the active latents of prompt columns; after the last of them, selects the edit lists."""
        if self._selected or self._prompt is None:
            return
        hidden = hidden_of(output)
        start, end = self._past, min(self._past + hidden.shape[1], self._prompt.width)
        if start < end:
            self._count(hidden[:, : end - start], self._prompt.counted[:, start:end].to(hidden.device))
        if end == self._prompt.width and self._counts is not None and self._tokens is not None:
            self._select(self._counts, self._tokens)

    def _count(self, hidden: Tensor, counted: Tensor) -> None:
        tokens = counted.sum(dim=1)
        if self._input_sae is None:
            counts = torch.zeros(len(tokens), 0, dtype=torch.int32, device=hidden.device)
        else:
            offsets = torch.zeros(len(tokens) + 1, dtype=torch.int64, device=hidden.device)
            offsets[1:] = tokens.cumsum(dim=0)
            counts = encode_density(hidden[counted], offsets, self._input_sae, backend=self._backend)
        self._counts = counts if self._counts is None else self._counts + counts
        self._tokens = tokens if self._tokens is None else self._tokens + tokens

    def _select(self, counts: Tensor, tokens: Tensor) -> None:
        edits = self.policy.select(counts / tokens.clamp(min=1)[:, None])
        if self._edits is None or self._edits.latents.shape != edits.latents.shape:
            self._edits = EditList.empty(edits.batch, edits.k, self._output_sae.device)
        self._edits.copy_(edits)  # the policy's own lists stay as they are
        if self._input_sae is not None:  # a prompt without a counted token has no densities to go by
            self._edits.counts.mul_((tokens > 0).to(self._edits.counts.device))
        self._selected = True
        self._prompts += edits.batch

    def _after_output_layer(self, module: nn.Module, args: object, output: Any) -> Any:
        """Edits the columns of the pass that are to be edited, in place."""
        if self._prompt is None:
            return None
        hidden = hidden_of(output)
        past, width, end = self._past, self._prompt.width, self._past + hidden.shape[1]
        in_prompt = [column for column in self._prompt.edited_columns if past <= column < end]
        generated = range(max(width, past), end)
        if not in_prompt and not generated:
            return None
        if not self._selected or self._edits is None:
            raise InvalidInputError(
                f"a token to be edited came by before the whole prompt of {width} tokens was read; pass the prompt in "
                "one piece (no prefill_chunk_size, no right padding), or use edit_positions='from_last_prompt'"
            )
        recorded = hidden.requires_grad and torch.is_grad_enabled()
        if recorded:
            hidden = hidden.clone()  # autograd may need the original; to it, the edit is a constant
        counters = self.counters(len(hidden))
        for column in (*in_prompt, *generated):
            token_step(
                hidden[:, column - past],
                self._output_sae,
                self._edits,
                self.policy.alpha,
                self._prompt.edited[:, column].to(hidden.device) if column < width else None,
                counters if column >= self._counted_until else None,
                mode=self._mode,
                backend=self._backend,
            )
        self._counted_until = max(self._counted_until, end)
        return with_hidden(output, hidden) if recorded else None
