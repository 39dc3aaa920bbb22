"""What happens when a steered model runs: the hooks' events, turned into reading prompts and editing positions.

A pass of the decoder computes positions `start` to `end` of the batch; the first P positions are the prompt.

    after a layer where prompts are observed    The active latents of prompt positions are counted. When the last of
                                                them has been read, the counts become densities and the policy selects
                                                its edits: once per prompt.
    after a layer that is edited                Prompt positions the policy edits, and every position from P on.

In a `generate` call the prompt is what was passed to it. Prompt tokens that a passed cache holds already are not
computed, so the selection depends on the others, and a warning says so. In a plain forward call the prompt is the whole
input, unless a cache with positions is passed (then the call continues the last prompt, whose cache it has to be), or
the session's `prompt_lengths`, its `response` or the call's labels say how much of it is prompt.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from dspa.errors import InvalidInputError
from dspa.methods.policy import Policy
from dspa.online.forward_pass import ForwardPass
from dspa.online.forward_prompt import (
    IGNORED_LABEL,
    PaddingTokens,
    check_lengths,
    presence_of_mask,
    prompt_lengths_of,
)
from dspa.online.generate_call import GenerateCall
from dspa.online.hooks.running import Ownership, RunningCall
from dspa.online.layer_editor import LayerEditor
from dspa.online.prompt import Prompt
from dspa.online.prompt_mask import PromptMask
from dspa.online.prompt_reader import PromptReader
from dspa.online.row_selection import RowSelection
from dspa.online.trace import TraceRecorder
from dspa.online.warn import (
    warn_of_assumed_prompt,
    warn_of_cached_prompt,
    warn_of_no_edit,
    warn_of_nonfinite,
    warn_of_nonfinite_later,
)


class Session:
    """Follows the generate calls and passes of one model, one thread at a time. The hooks call it.

    Attributes:
        prompt: the prompts last read; None before the first pass.
        closed: whether the policies are being detached: calls that begin from then on are not followed.
        prompt_lengths: in forward calls, how many tokens of each row are prompt, `[B]` or one number; None for all.
        response: in forward calls, `[B, T]` bool, which tokens are the response; None where that is not said.
        policies: by name.
        prompts_read: prompts that were read to their end so far.
        differentiable: whether edits are computed so that autograd follows them, where gradients are recorded.
        generating: held by the generate call that runs.
    """

    def __init__(
        self,
        policies: Mapping[str, Policy],
        readers: Sequence[PromptReader],
        editors: Sequence[LayerEditor],
        selection: RowSelection,
        recorder: TraceRecorder | None,
        *,
        differentiable: bool,
        padding: PaddingTokens,
    ) -> None:
        self.policies = policies
        self.response: Tensor | None = None
        self._padding = padding
        self._labels: Tensor | None = None
        self._warned_of_assumed_prompt = False
        self.prompt: Prompt | None = None
        self.closed = False
        self._call: GenerateCall | None = None
        self.prompt_lengths: Tensor | None = None
        self.prompts_read = 0
        self.differentiable = differentiable
        self._readers = readers
        self._editors = editors
        self._editor_of = {name: editor for editor in editors for name in editor.group.names}
        self._selection = selection
        self._recorder = recorder
        self._pass: ForwardPass = ForwardPass(0, 0, False, 0)
        self._draft: RunningCall | None = None
        self._following = False  # whether the pass is one to read and to edit
        self._warned_of_nonfinite = False
        self.generating = Ownership()

    @property
    def call(self) -> GenerateCall | None:
        """The running generate call; one whose frame is gone has ended, however it did."""
        call = self._call
        return call if call is not None and call.running.is_alive else None

    def opens(self) -> None:
        """The policies are about to be attached; caches filled before are not continued."""
        self.prompt = self._labels = None
        self.closed = False

    # ---------------------------------------------------------------------------------------------- generate calls

    def generate_begins(self, running: RunningCall, token_ids: Tensor | None, attention_mask: Tensor) -> None:
        """`model.generate` begins.

        Raises:
            InvalidInputError: if another generate call is running on this model, or no policy was selected.
        """
        if self.closed:
            return
        if not self.generating.take(running):
            raise InvalidInputError(
                "another generate call is running on this steered model; run one at a time, and none inside another"
            )
        try:
            prompt_policies = self._selection.of_prompts(len(attention_mask))
            self._call = GenerateCall(
                mask=self._selection.mask(token_ids, attention_mask, prompt_policies, None),
                prompt_policies=prompt_policies,
                attention_mask=attention_mask,
                totals_before=[editor.counters.totals() for editor in self._editors],
                running=running,
            )
        except BaseException:
            self._call = None
            self.generating.release(running)
            raise
        self.prompt = None
        self._pass = replace(self._pass, speculative=False)

    def generate_ends(self, running: RunningCall, new_tokens: int | None) -> None:
        """`model.generate` has returned, with so many positions after the prompt, or raised: then None."""
        call, prompt = self._call, self.prompt
        if call is None or call.running is not running:
            self.generating.release(running)
            return
        try:
            if prompt is not None:
                if self._pass.speculative:
                    # The last token was chosen, but not read. A call that failed accepted nothing of its last pass.
                    accepted = self._pass.start if new_tokens is None else prompt.mask.width + new_tokens - 1
                    self._commit(accepted, prompt)
                if new_tokens is not None:
                    warn_of_no_edit(call, prompt, self.policies, self._editors)
            self.warn_of_nonfinite(stacklevel=5)
            if not self._warned_of_nonfinite and prompt is not None and prompt.steered:
                self._warned_of_nonfinite = warn_of_nonfinite_later(call, self._editors)
        finally:
            self._call = None
            self.generating.release(running)

    def labels_passed(self, labels: Tensor | None) -> None:
        """A forward call with labels begins or, with None, has ended."""
        self._labels = labels

    def draft_begins(self, running: RunningCall) -> None:
        """The steered model begins to draft, for itself or for another model: drafts are not steered."""
        self._draft = running

    def draft_ends(self, running: RunningCall) -> None:
        """The draft is made."""
        if self._draft is running:
            self._draft = None

    def warn_of_nonfinite(self, stacklevel: int) -> None:
        """Warns, once, if tokens were left alone because of NaN or Inf."""
        if not self._warned_of_nonfinite:
            self._warned_of_nonfinite = warn_of_nonfinite(self._editors, stacklevel)

    # ------------------------------------------------------------------------------------------------------ passes

    def pass_begins(
        self, tokens: Tensor, mask: Tensor | None, cache_length: int | Tensor, has_cache: bool, cache: object | None
    ) -> None:
        """Finds out which positions the pass computes, and of which prompt."""
        call = self.call
        self._following = not (self.closed and call is None) and not self._is_drafting()
        if not self._following:
            return
        thread = threading.get_ident()
        if call is not None and call.running.thread != thread:
            raise InvalidInputError(
                "a forward call came from another thread while generate runs on this steered model; run one at a time"
            )
        batch, width = tokens.shape[:2]
        if call is not None:
            start = self._start_in_call(call, batch, width, cache_length, has_cache, cache)
        else:
            start = self._start_of_forward_call(tokens, mask, int(cache_length), cache)
        prompt, end = self.prompt, start + width
        self._pass = ForwardPass(start, end, False, thread)
        if prompt is None:
            return
        if cache is not None:
            prompt.cache = weakref.ref(cache)
        if prompt.mask.batch != batch:
            raise InvalidInputError(f"a pass has {batch} rows, its prompt {prompt.mask.batch}; expected as many")
        generated = end > max(start, prompt.mask.width)
        if generated and has_cache and width > 1 and call is not None:
            self._pass = replace(self._pass, speculative=True)
        if self._recorder is not None:
            self._recorder.read(tokens if tokens.ndim == 2 else None, start)

    def pass_ends(self, cache: object | None, hidden: Tensor) -> None:
        """Remembers which cache the prompt is in, or that it is in none, and what came out at the last position."""
        if self._following and self.prompt is not None:
            self.prompt.cache = _no_cache if cache is None else weakref.ref(cache)
            call = self.call
            if call is not None:
                last = hidden.detach()[:, -1]
                call.last_hidden = last if hidden.shape[1] == 1 else last.clone()  # which holds no whole prompt

    def layer_computed(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Reads prompt positions of `hidden [B, T, d_model]` and edits what is to be edited, in place where autograd
        allows it; otherwise returns the edited states."""
        prompt = self.prompt
        if prompt is None or not self._following:
            return None
        if self._pass.thread != threading.get_ident():
            raise InvalidInputError("two threads run this steered model at once; run one at a time")
        if hidden.ndim != 3:
            raise InvalidInputError(
                f"decoder layer {layer} returns hidden states of shape {tuple(hidden.shape)}; expected one residual "
                "stream [B, T, d_model], so this model cannot be steered"
            )
        if prompt.unread:
            edited_now = any(self._pass.start <= p < self._pass.end for p in prompt.mask.edited_positions)
            self.prompts_read += prompt.read(
                layer, hidden, self._pass.start, edited_now=edited_now, editor_of=self._editor_of
            )
        replacement = None
        for editor in self._editors:
            if editor.group.layer == layer:
                if torch.is_grad_enabled() and (hidden.requires_grad or self.differentiable):
                    hidden = replacement = hidden.clone()  # autograd may need the original
                self._edit(editor, hidden, prompt)
        return replacement

    def _is_drafting(self) -> bool:
        return self._draft is not None and self._draft.is_alive

    def _edit(self, editor: LayerEditor, hidden: Tensor, prompt: Prompt) -> None:
        """Edits the positions of the pass that are to be edited: some of the prompt, and all that follow it."""
        start, end, width = self._pass.start, self._pass.end, prompt.mask.width
        positions: list[int] = []
        for position, known_after in zip(prompt.mask.edited_positions, prompt.mask.known_after, strict=True):
            if start <= position < end:
                prompt.check_read(editor, known_after)
                positions.append(position)
        for first, last in _runs(positions):
            enabled = prompt.mask.edited[:, first:last]
            self._edit_run(editor, hidden[:, first - start : last - start], first, enabled, prompt)
        if end > max(start, width):
            prompt.check_read(editor, 1)
            first = max(start, width)
            self._edit_run(editor, hidden[:, first - start :] if first > start else hidden, first, None, prompt)

    def _edit_run(
        self, editor: LayerEditor, hidden: Tensor, first: int, enabled: Tensor | None, prompt: Prompt
    ) -> None:
        """Edits consecutive positions, `hidden [B, T, d_model]` a view of the pass."""
        if self.differentiable and torch.is_grad_enabled():
            hidden.copy_(editor.differentiable_edit(hidden.clone(), enabled))
            return
        counted = [position >= prompt.counted_until for position in range(first, first + hidden.shape[1])]
        speculative = self._pass.speculative and enabled is None
        # Without differentiable edits, an edit is a constant to autograd.
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            editor.edit(hidden, first, enabled, counted=counted, speculative=speculative)

    def _start_in_call(
        self,
        call: GenerateCall,
        batch: int,
        width: int,
        cache_length: int | Tensor,
        has_cache: bool,
        cache: object | None,
    ) -> int:
        """The first position of a pass of the running generate call; its first pass begins the prompt."""
        prompt = self.prompt
        if prompt is None:
            start = int(cache_length)
            mask = call.mask.expanded_to(batch)
            prompt = self._begin_prompt(mask, call.prompt_policies, call.attention_mask, None)
            warn_of_cached_prompt(prompt, start)
            return start
        if not self._continues_call(prompt, width, has_cache, cache):
            raise InvalidInputError(
                "a forward call came from inside a generate call on this steered model (from a logits processor or a "
                "custom_generate function); call a copy of the model that is not steered"
            )
        # The length of a static cache is on its device; reading it would wait for everything that runs there.
        start = self._pass.end if isinstance(cache_length, Tensor) else cache_length
        counted = start if self._pass.speculative else self._pass.end
        prompt.counted_until = max(prompt.counted_until, counted)
        self._commit_speculative(start, prompt)
        return start

    def _start_of_forward_call(
        self, tokens: Tensor, mask: Tensor | None, cache_length: int, cache: object | None
    ) -> int:
        """The first position of a pass outside of generate, which begins a prompt or continues the last one."""
        if cache_length == 0:
            self._begin_forward_prompt(tokens, mask, cache is not None)
            return 0
        self._check_continued(cache)
        if self.prompt is not None:
            self.prompt.counted_until = cache_length  # what was cropped from the cache is gone
            self._commit_speculative(cache_length, self.prompt)
        return cache_length

    def _begin_forward_prompt(self, tokens: Tensor, mask: Tensor | None, has_cache: bool) -> None:
        batch, width = tokens.shape[:2]
        prompt_policies = self._selection.of_prompts(batch)
        steered = any(name is not None for name in prompt_policies)
        if mask is None and tokens.ndim == 2 and steered:
            mask = self._padding.presence(tokens)
        elif mask is None or not steered:
            mask = torch.ones(batch, width, device=tokens.device)
        else:
            mask = presence_of_mask(mask, batch, width)
        lengths = None
        if self.prompt_lengths is not None:
            lengths = check_lengths(self.prompt_lengths, mask)
        else:
            response = self.response
            if response is not None and response.shape != mask.shape:
                raise InvalidInputError(
                    f"completion_mask is {tuple(response.shape)} for a forward call of {batch} x {width} tokens; "
                    "expected the same shape"
                )
            if response is None and self._labels is not None:
                response = self._labels != IGNORED_LABEL
            if response is not None:
                lengths = prompt_lengths_of(response, mask)
                if self.response is not None and lengths is not None and not bool((response & mask.bool()).any()):
                    raise InvalidInputError("completion_mask marks no token; expected the tokens of the responses")
            if lengths is None and steered and width > 1 and not has_cache:
                self._warn_of_assumed_prompt(prompt_policies, batch, width)
        token_ids = tokens if tokens.ndim == 2 else None
        prompt_mask = self._selection.mask(token_ids, mask, prompt_policies, lengths)
        self._begin_prompt(prompt_mask, prompt_policies, mask, lengths)

    def _warn_of_assumed_prompt(self, prompt_policies: list[str | None], batch: int, width: int) -> None:
        if not self._warned_of_assumed_prompt:
            names = {name for name in prompt_policies if name is not None}
            policies = [self.policies[name] for name in names]
            self._warned_of_assumed_prompt = warn_of_assumed_prompt(policies, batch, width, self._labels is not None)

    def _begin_prompt(
        self, mask: PromptMask, prompt_policies: list[str | None], attention_mask: Tensor, lengths: Tensor | None
    ) -> Prompt:
        prompt = Prompt(mask, prompt_policies, attention_mask, lengths, self._readers, self.policies)
        self.prompt = prompt
        for editor in self._editors:
            editor.begin_prompt(prompt.row_policies)
        if self._recorder is not None:
            repeated = attention_mask.repeat_interleave(prompt.repeats, dim=0)
            self._recorder.begin_prompt(prompt.row_policies, repeated, lengths)
        return prompt

    def _continues_call(self, prompt: Prompt, width: int, has_cache: bool, cache: object | None) -> bool:
        """Whether a pass belongs to the running generate call: it continues its cache or, where there is none, computes
        everything again and more."""
        known = None if prompt.cache is None else prompt.cache()
        if has_cache:
            return prompt.cache is None or cache is None or cache is known
        return known is None and width > self._pass.end

    def _check_continued(self, cache: object | None) -> None:
        """Refuses to continue, outside of generate, what was not read, or not last."""
        prompt = self.prompt
        if self._selection.is_none and (prompt is None or not prompt.steered):
            return  # nothing is steered
        if prompt is None:
            raise InvalidInputError(
                "a forward call continues a cache, but no prompt was read since the policy was attached; begin with a "
                "call that passes the prompt"
            )
        if prompt.cache is not None and cache is not None and cache is not prompt.cache():
            raise InvalidInputError(
                "a forward call continues another cache than that of the last prompt, whose edit lists are the ones "
                "that are known; finish one conversation before the next, or pass its whole text again"
            )

    def _commit_speculative(self, accepted: int, prompt: Prompt) -> None:
        if self._pass.speculative:
            self._commit(accepted, prompt)

    def _commit(self, accepted: int, prompt: Prompt) -> None:
        """Of the speculative positions, those before position `accepted` count."""
        self._pass = replace(self._pass, speculative=False)
        for editor in self._editors:
            editor.counters.commit(accepted, prompt.mask.batch)
        if self._recorder is not None:
            self._recorder.commit(accepted)


def _runs(positions: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending positions as half-open ranges of consecutive ones."""
    runs: list[tuple[int, int]] = []
    for position in positions:
        if runs and runs[-1][1] == position:
            runs[-1] = (runs[-1][0], position + 1)
        else:
            runs.append((position, position + 1))
    return runs


def _no_cache() -> None:
    """The cache of a prompt that is in none."""
