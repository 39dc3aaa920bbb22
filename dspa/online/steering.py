"""Steering a transformers model while it generates: reading the prompt and editing the residual stream as it passes.

A forward pass computes columns `past` to `past + T` of the batch; the first P columns are the prompt:

    after input_layer     The active latents of prompt columns are counted. When the last of them has been read, the
                          counts become densities and the policy selects the edit lists: once per prompt.
    after output_layer    Prompt columns the policy edits, and every column from P on, go through `token_step`.

In a `generate` call the prompt is what was passed to it; of a cache that was passed with it, the columns it holds do
not come by, so that the edit lists follow the others, and a warning says so. In a plain forward call the prompt is the
whole input, unless a cache with columns is passed (then the call continues the last prompt, whose cache it has to be)
or `scoring` says how much of it is prompt.
"""

from __future__ import annotations

import html
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dspa.errors import InvalidInputError
from dspa.kernels import EditList, StepMode, TokenStats
from dspa.methods.policy import EditPositions, Policy
from dspa.online.editor import PromptReader, TokenEditor
from dspa.online.hooks.forward import taps_of
from dspa.online.hooks.generate import observe_generate
from dspa.online.policy_groups import editing_groups, reading_groups
from dspa.online.prompt_mask import PromptMask
from dspa.online.summary import SteeringSummary
from dspa.online.trace import SteeringTrace, TraceRecorder
from dspa.transformers_model import check_sae_fits, decoder_stack, device_of

THE_POLICY = "policy"  # what a policy is called that was not given a name
_CHOOSE: Any = object()  # no selection was made

Selection = str | None | Sequence[str | None]


def steer(
    model: nn.Module,
    policy: Policy | Mapping[str, Policy],
    *,
    select: Selection = _CHOOSE,
    backend: str = "auto",
    mode: StepMode | None = None,
    trace: bool = False,
) -> Steering:
    """Attaches a policy to a model: from now on `model.generate` and forward calls are steered.

    Use it as a context manager, or call `remove()` on what it returns. The model's weights are not touched. A copy of
    the model (`copy.deepcopy`, pickle) is not steered; `save_pretrained` writes the model as it is without a policy.

    With several policies, rows of one batch may follow different ones: `steer(model, {"kind": a, "brief": b},
    select=["kind", None, "brief"])`. Policies that share their output SAE and its layer are served by one kernel launch
    for all rows, whatever their maps and strengths; the others by one launch for each SAE and layer.

    What cannot be followed is refused with one line when it is tried: continuous batching (`generate_batch`),
    classifier-free guidance, token healing, a prompt read in chunks while all of its positions are to be edited, models
    with several residual streams, adapters with virtual tokens (prompt tuning, prefix tuning), forward calls inside a
    generate call, a `custom_generate` function that calls `generate` or repeats its cache for more rows, conversations
    by turns with a cache each in forward calls, and two threads at once. Candidates of assisted decoding are edited
    each at its own position; those that are rejected leave no trace in counters or traces. Drafts are not steered.

    Args:
        model: a transformers causal language model.
        policy: a `SteeringPolicy`, or anything with the same fields; or several by name.
        select: which policy the prompts of the calls to come have: a name for all of them, or a name or None (not
            steered) for each. Beams and several sequences per prompt follow their prompt. Not needed with one policy.
        backend: a kernel backend's name, or "auto".
        mode: how the kernel gets to its result; see `dspa.kernels.token_step`.
        trace: record every edit for `Steering.trace`. Costs time and memory, changes no result.

    Raises:
        MismatchError: if a policy was made for another model, or policies contradict each other.
        InvalidInputError: if the model's decoder layers cannot be found, it cannot generate, or an adapter puts virtual
            tokens before prompts; if there is no policy or a selected one is not there.
    """
    named = isinstance(policy, Mapping)
    policies: dict[str, Policy] = dict(policy) if isinstance(policy, Mapping) else {THE_POLICY: policy}
    return Steering(model, policies, named=named, select=select, backend=backend, mode=mode, trace=trace)


class Steering:
    """Policies attached to a model; made by `steer`.

    One thread at a time: a second generate call is refused while one is running, and so are forward calls from another
    thread.

    Attributes:
        model: the steered model.
        policies: the policies by name.
    """

    def __init__(
        self,
        model: nn.Module,
        policies: dict[str, Policy],
        *,
        named: bool,
        select: Selection,
        backend: str,
        mode: StepMode | None,
        trace: bool,
    ) -> None:
        if not policies:
            raise InvalidInputError("there is no policy to steer by; pass at least one")
        for policy in policies.values():
            policy.model.check(model)
            if policy.input_sae is not None:
                check_sae_fits(policy.input_sae, "input", policy.input_layer, policy.model)
            check_sae_fits(policy.output_sae, "output", policy.output_layer, policy.model)
        stack = decoder_stack(model)
        self.model = model
        self.policies = policies
        self._recorder = TraceRecorder() if trace else None

        self._readers = [
            PromptReader(group, device_of(stack.layers[group.layer]), backend) for group in reading_groups(policies)
        ]
        self._editors = [
            TokenEditor(
                group,
                policies,
                device_of(stack.layers[group.layer]),
                backend,
                mode,
                all_rows=not named,
                recorder=self._recorder,
            )
            for group in editing_groups(policies)
        ]
        self._layers = {place.group.layer for place in (*self._readers, *self._editors)}
        self._editor_of = {name: editor for editor in self._editors for name in editor.group.names}
        self._selection: Selection = _CHOOSE
        self._prompt_tokens: int | Sequence[int] | None = None

        # of the running generate call
        self._running = threading.Lock()
        self._thread: int | None = None
        self._generating: PromptMask | None = None
        self._generating_names: list[str | None] = []
        self._before: list[Tensor] = []  # of each editor, its totals when the call began
        self._drafting = False
        # of the prompt, a generate call's or a forward call's, a row per row of the pass
        self._prompt: PromptMask | None = None
        self._present = torch.zeros(0, 0)  # where the prompt has tokens, a row per prompt
        self._lengths: Tensor | None = None  # how many of these are prompt; None for all
        self._cache: Callable[[], object | None] | None = None  # the one it is kept in; None while that is not known
        self._names: list[str | None] = []
        self._repeats = 1  # rows of each prompt
        self._rows: dict[str, Tensor] = {}
        self._unread: list[PromptReader] = []
        self._counted_until = 0  # columns before this one have been counted: decoding without a cache comes again
        # of the pass
        self._pass_thread = 0
        self._past = self._end = 0
        self._on_trial = False

        self._prompts = 0
        self._warned_of_nonfinite = False
        if select is not _CHOOSE:
            self.select(select)
        self._taps = taps_of(stack)
        self._observation = observe_generate(model, self)
        self._taps.add(self, self._layers)
        self._attached = True

    # ---------------------------------------------------------------------------------------------- for those who steer

    def remove(self) -> None:
        """Detaches the policies; the model generates as before. Doing it twice does no harm.

        While a generate call is running in another thread, this waits for its end: the call is steered throughout.
        """
        if self._thread in (None, threading.get_ident()):
            self._detach()
        else:
            with self._running:
                self._detach()

    def __enter__(self) -> Steering:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def select(self, names: Selection) -> None:
        """Chooses the policies of the generate and forward calls to come.

        Args:
            names: a policy's name for all rows, None for no steering, or one of these for each prompt of a batch.

        Raises:
            InvalidInputError: if a policy is not there, or a generate call is running.
        """
        listed = [names] if names is None or isinstance(names, str) else list(names)
        unknown = sorted({name for name in listed if name is not None} - set(self.policies))
        if unknown:
            raise InvalidInputError(f"there is no policy {unknown[0]!r}; expected one of {', '.join(self.policies)}")
        if self._thread is not None:
            raise InvalidInputError("policies cannot be selected while a generate call is running; select before it")
        self._selection = names if names is None or isinstance(names, str) else tuple(listed)
        for editor in self._editors:
            editor.all_rows = False

    @contextmanager
    def scoring(self, prompt_tokens: int | Sequence[int]) -> Iterator[None]:
        """Inside, forward calls without a cache are taken for prompts followed by responses, as when responses are
        scored: the logits are those with which `generate` would have chosen.

        Args:
            prompt_tokens: how many tokens of each row are its prompt, padding not counted; one number for all rows, or
                one for each.
        """
        before, self._prompt_tokens = self._prompt_tokens, prompt_tokens
        try:
            yield
        finally:
            self._prompt_tokens = before

    @property
    def policy(self) -> Policy:
        """The policy, where there is only one.

        Raises:
            InvalidInputError: if there are several; see `policies`.
        """
        if len(self.policies) > 1:
            raise InvalidInputError(f"there are {len(self.policies)} policies; look them up by name in policies")
        return next(iter(self.policies.values()))

    @property
    def edits(self) -> EditList | None:
        """The edit lists of the last prompts, one a row; None before there was a prompt.

        Raises:
            InvalidInputError: if the policies have several output SAEs.
        """
        return self._only_editor().buffers(self._prompt.batch).edits if self._prompt and not self._unread else None

    def counters(self, batch: int) -> TokenStats:
        """The counters of the passes with so many rows, updated in place as tokens are edited.

        Raises:
            InvalidInputError: if the policies have several output SAEs.
        """
        return self._only_editor().buffers(batch).stats

    def summary(self) -> SteeringSummary:
        """What was seen and edited since the policies were attached."""
        if len(self._editors) == 1:
            return SteeringSummary.from_stats(self._editors[0].all_stats(), self._prompts)
        return SteeringSummary.from_layers(
            [(editor.group.layer, editor.all_stats()) for editor in self._editors], self._prompts
        )

    def trace(self) -> SteeringTrace:
        """Every edit since the policies were attached, token by token.

        Raises:
            InvalidInputError: if it was not asked for with `steer(..., trace=True)`.
        """
        if self._recorder is None:
            raise InvalidInputError("nothing was recorded; attach the policy with steer(model, policy, trace=True)")
        return self._recorder.trace()

    def __repr__(self) -> str:
        named = ", ".join(f"{name}: {policy!r}" for name, policy in self.policies.items())
        state = "attached to" if self._attached else "detached from"
        return f"Steering({state} {type(self.model).__name__}, {named})"

    def _repr_html_(self) -> str:
        """For notebooks: what it is, and its summary so far."""
        return f"<p><code>{html.escape(repr(self))}</code></p>{self.summary()._repr_html_()}"

    # ------------------------------------------------------------------------------------------ what generate calls say

    def generate_begins(self, token_ids: Tensor | None, present: Tensor) -> None:
        """Called when `model.generate` starts.

        Raises:
            InvalidInputError: if another generate call is running on this model, or no policy was selected.
        """
        if not self._running.acquire(blocking=False):
            raise InvalidInputError(
                "another generate call is running on this steered model; run one at a time, and none inside another"
            )
        try:
            names = self._names_of(len(present))
            self._before = [editor.totals() for editor in self._editors]
            self._generating = self._columns(token_ids, present, names, None)
        except BaseException:
            self._running.release()
            raise
        self._thread = threading.get_ident()
        self._generating_names = names
        self._prompt, self._names = None, []
        self._on_trial = False
        self._present, self._lengths = present, None

    def generate_ends(self, new_tokens: int | None) -> None:
        """Called when `model.generate` has returned or raised."""
        try:
            if self._on_trial and self._prompt is not None:
                # The last token was chosen, but not read. A call that failed accepted nothing of its last pass.
                accepted = self._past if new_tokens is None else self._prompt.width + new_tokens - 1
                self._settle(accepted)
            if self._prompt is not None and new_tokens is not None:
                self._warn_of_no_edit(self._prompt)
            self._warn_of_nonfinite()
        finally:
            self._generating = None
            self._thread = None
            self._running.release()

    def draft_begins(self) -> None:
        """Called when a draft is generated by the steered model itself: drafts are not steered."""
        self._drafting = True

    def draft_ends(self) -> None:
        """Called when it has returned or raised."""
        self._drafting = False

    # ------------------------------------------------------------------------------------------------------- the passes

    def pass_begins(
        self, tokens: Tensor, mask: Tensor | None, past: int | Tensor, has_cache: bool, cache: object | None
    ) -> None:
        """Finds out which columns the pass is about to compute, and of which prompt."""
        if self._drafting:
            return
        thread = threading.get_ident()
        if self._thread is not None and self._thread != thread:
            raise InvalidInputError(
                "a forward call came from another thread while generate runs on this steered model; run one at a time"
            )
        self._pass_thread = thread
        batch, width = tokens.shape[:2]
        if self._generating is not None:
            if self._prompt is None:
                self._past = int(past)
                self._begin_prompt(self._generating.expanded_to(batch), self._generating_names)
                self._warn_of_cached_prompt()
            else:
                if not self._is_next_pass(width, has_cache, cache):
                    raise InvalidInputError(
                        "a forward call came from inside a generate call on this steered model (from a logits "
                        "processor or a custom_generate function); call a copy of the model that is not steered"
                    )
                # The length of a static cache is on its device, where a look at it would wait for all that runs there.
                self._begin_next_pass(self._end if isinstance(past, Tensor) else past)
        else:
            past = int(past)
            if past:
                self._check_continued(cache)
                self._begin_next_pass(past)
            else:
                self._past = 0
                self._begin_forward_prompt(tokens, mask)
        self._end = self._past + width
        if self._prompt is None:
            return
        if cache is not None:
            self._cache = weakref.ref(cache)
        if self._prompt.batch != batch:
            raise InvalidInputError(f"a pass has {batch} rows, its prompt {self._prompt.batch}; expected as many")
        generated = self._end > max(self._past, self._prompt.width)
        self._on_trial = generated and has_cache and width > 1 and self._generating is not None
        if self._recorder is not None:
            self._recorder.read(tokens if tokens.ndim == 2 else None, self._past)

    def pass_ends(self, cache: object | None) -> None:
        """Keeps in mind which cache the prompt is in, or that it is in none."""
        if not self._drafting and self._prompt is not None:
            self._cache = _no_cache if cache is None else weakref.ref(cache)

    def layer_computed(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Reads prompt columns after an input layer, edits columns after an output layer."""
        prompt = self._prompt
        if prompt is None or self._drafting:
            return None
        if self._pass_thread != threading.get_ident():
            raise InvalidInputError("two threads run this steered model at once; run one at a time")
        if hidden.ndim != 3:
            raise InvalidInputError(
                f"decoder layer {layer} of {type(self.model).__name__} returns hidden states of shape "
                f"{tuple(hidden.shape)}; expected one residual stream [B, T, d_model], so this model cannot be steered"
            )
        if self._unread:
            self._read(layer, hidden, prompt)
        recorded = False
        for editor in self._editors:
            if editor.group.layer == layer:
                if hidden.requires_grad and torch.is_grad_enabled():
                    hidden, recorded = hidden.clone(), True  # autograd may need the original; the edit is a constant
                self._edit(editor, hidden, prompt)
        return hidden if recorded else None

    def _begin_forward_prompt(self, tokens: Tensor, mask: Tensor | None) -> None:
        batch, width = tokens.shape[:2]
        if mask is None or mask.shape != (batch, width):  # a mask already made into another form
            mask = torch.ones(batch, width, device=tokens.device)
        names = self._names_of(batch)
        lengths = None
        if self._prompt_tokens is not None:
            lengths = torch.as_tensor(self._prompt_tokens, dtype=torch.int64)
            if lengths.ndim and len(lengths) != batch:
                raise InvalidInputError(f"scoring got {len(lengths)} prompt lengths for {batch} rows; expected as many")
            lengths = lengths.expand(batch)
        self._present, self._lengths = mask, lengths
        self._begin_prompt(self._columns(tokens if tokens.ndim == 2 else None, mask, names, lengths), names)

    def _begin_prompt(self, prompt: PromptMask, prompt_names: list[str | None]) -> None:
        """A prompt whose edit lists are not known yet."""
        repeats = self._repeats = prompt.batch // max(len(prompt_names), 1)
        self._prompt = prompt
        self._cache = None
        self._names = [name for name in prompt_names for _ in range(repeats)]
        self._rows = {
            policy: torch.tensor([row for row, name in enumerate(self._names) if name == policy], dtype=torch.int64)
            for policy in self.policies
        }
        self._counted_until = 0
        self._unread = []
        for reader in self._readers:
            reader.forget()
            if any(len(self._rows[name]) for name in reader.group.names):
                self._unread.append(reader)
        for editor in self._editors:
            editor.begin(self._names)
        if self._recorder is not None:
            self._recorder.begin(self._names, self._present.repeat_interleave(repeats, dim=0), self._lengths)

    def _is_next_pass(self, width: int, has_cache: bool, cache: object | None) -> bool:
        """Whether a pass belongs to the running generate call: it continues its cache or, where there is none, computes
        everything again and more."""
        known = None if self._cache is None else self._cache()
        if has_cache:
            return self._cache is None or cache is None or cache is known
        return known is None and width > self._end

    def _check_continued(self, cache: object | None) -> None:
        """Refuses to continue, outside of generate, what was not read, or not last."""
        if self._selection is None and all(name is None for name in self._names):
            return  # nobody is steered
        if self._prompt is None:
            raise InvalidInputError(
                "a forward call continues a cache, but no prompt was read since the policy was attached; begin with a "
                "call that passes the prompt"
            )
        if self._cache is not None and cache is not None and cache is not self._cache():
            raise InvalidInputError(
                "a forward call continues another cache than that of the last prompt, whose edit lists are the ones "
                "that are known; finish one conversation before the next, or pass its whole text again"
            )

    def _begin_next_pass(self, past: int) -> None:
        if self._generating is None:
            self._counted_until = past  # what was cropped from the cache is gone
        else:
            self._counted_until = max(self._counted_until, past if self._on_trial else self._end)
        if self._on_trial:
            self._settle(past)
        self._past = past

    def _settle(self, accepted: int) -> None:
        """Of the columns computed on trial, those before column `accepted` stay."""
        self._on_trial = False
        assert self._prompt is not None
        for editor in self._editors:
            editor.settle(accepted, self._prompt.batch)
        if self._recorder is not None:
            self._recorder.settle(accepted)

    def _read(self, layer: int, hidden: Tensor, prompt: PromptMask) -> None:
        """Counts prompt columns, and selects edit lists when a prompt is read or one of its tokens is to be edited."""
        to_be_edited = any(self._past <= column < self._end for column in prompt.edited_columns)
        for reader in [reader for reader in self._unread if reader.group.layer == layer]:
            names = [name for name in reader.group.names if len(self._rows[name])]
            rows = torch.zeros(prompt.batch, dtype=torch.bool)
            for name in names:
                rows[self._rows[name]] = True
            reader.read(hidden, prompt, rows, self._past)
            finished = reader.columns_read == prompt.width
            if (finished or to_be_edited) and reader.counts is not None:
                for name in names:
                    edits = reader.select(self.policies[name], self._rows[name], self._repeats)
                    self._editor_of[name].take(edits, self._rows[name], prompt.batch)
            if finished:
                self._unread.remove(reader)
                self._prompts += int(rows.sum())

    def _edit(self, editor: TokenEditor, hidden: Tensor, prompt: PromptMask) -> None:
        """Edits, in place, the columns of the pass that are to be edited."""
        past, end, width = self._past, self._end, prompt.width
        if past < width:
            for column, known_after in zip(prompt.edited_columns, prompt.known_after, strict=True):
                if past <= column < end:
                    if self._unread and self._columns_read(editor) < known_after:
                        raise InvalidInputError(
                            f"a token to be edited came by before the whole prompt of {width} tokens was read; pass "
                            "the prompt in one piece (no prefill_chunk_size), or use edit_positions='from_last_prompt'"
                        )
                    counted = column >= self._counted_until
                    editor.edit(
                        hidden[:, column - past], column, prompt.edited[:, column], counted=counted, on_trial=False
                    )
            past = width
        for column in range(past, end):
            counted = column >= self._counted_until
            editor.edit(hidden[:, column - self._past], column, None, counted=counted, on_trial=self._on_trial)

    def _columns_read(self, editor: TokenEditor) -> int:
        unread = [r for r in self._unread if set(r.group.names) & set(editor.group.names)]
        return min((reader.columns_read for reader in unread), default=self._end)

    # --------------------------------------------------------------------------------------------------------- the rows

    def _names_of(self, batch: int) -> list[str | None]:
        """The policy of each of so many prompts."""
        if self._selection is _CHOOSE:
            if len(self.policies) > 1:
                raise InvalidInputError(
                    f"{len(self.policies)} policies are attached and none is selected; pass select= to steer, or call "
                    "select on the steering"
                )
            return [next(iter(self.policies))] * batch
        if self._selection is None or isinstance(self._selection, str):
            return [self._selection] * batch
        if len(self._selection) != batch:
            raise InvalidInputError(
                f"policies are selected for {len(self._selection)} rows, the batch has {batch}; expected as many"
            )
        return list(self._selection)

    def _columns(
        self, token_ids: Tensor | None, present: Tensor, names: list[str | None], prompt_tokens: Tensor | None
    ) -> PromptMask:
        """The prompt's columns, each row by the rules of its policy."""
        rules: dict[str | None, tuple[tuple[int, ...], EditPositions]] = {
            name: (policy.uncounted_token_ids, policy.edit_positions)
            for name, policy in self.policies.items()
            if name in names
        }
        rules = rules or {None: ((), "from_last_prompt")}  # nobody is steered
        distinct = list(dict.fromkeys(rules.values()))
        choices = [
            PromptMask.from_prompt(
                token_ids, present, torch.tensor(sorted(uncounted), dtype=torch.int64), positions, prompt_tokens
            )
            for uncounted, positions in distinct
        ]
        if len(choices) == 1 and None not in names:
            return choices[0]
        row_choice = [-1 if name is None else distinct.index(rules[name]) for name in names]
        return PromptMask.from_rows(choices, torch.tensor(row_choice))

    def _only_editor(self) -> TokenEditor:
        if len(self._editors) > 1:
            raise InvalidInputError(
                f"the policies have {len(self._editors)} output SAEs, each with lists and counters of its own; attach "
                "them one by one to look at these"
            )
        return self._editors[0]

    def _detach(self) -> None:
        if self._attached:
            self._attached = False
            self._taps.remove(self, self._layers)
            self._observation.remove()
            self._warn_of_nonfinite()

    # ----------------------------------------------------------------------------------------------------- the warnings

    def _warn_of_nonfinite(self) -> None:
        if self._warned_of_nonfinite:
            return
        for editor in self._editors:
            nonfinite = sum(int(stats.nonfinite.sum()) for stats in editor.all_stats())
            if nonfinite:
                self._warned_of_nonfinite = True
                warnings.warn(
                    f"{nonfinite} tokens had NaN or Inf in the residual stream after layer {editor.group.layer} and "
                    "were left unedited; look for an overflow in the model (float16 is a common cause)",
                    stacklevel=4,
                )

    def _warn_of_cached_prompt(self) -> None:
        """Says what the edit lists follow, if the cache of a generate call held some of its prompt."""
        if not self._past or all(name is None for name in self._names):
            return
        tokens, missing = int(self._present.bool().sum()), int(self._present[:, : self._past].bool().sum())
        warnings.warn(
            f"{missing} of {tokens} prompt tokens are in the cache passed to generate and were not read: the edit "
            f"lists follow the other {tokens - missing}; pass the prompt without a cache to have all of it read",
            stacklevel=2,
        )

    def _warn_of_no_edit(self, prompt: PromptMask) -> None:
        """Says why, if the generate call that ends here has edited nothing."""
        names = {name for name in self._names if name is not None}
        if not names:
            return  # as was asked for
        totals = [
            (editor.totals() - before).tolist() for editor, before in zip(self._editors, self._before, strict=True)
        ]
        seen, edited, nonfinite = (sum(numbers) for numbers in zip(*totals, strict=True))
        if edited:
            return
        layers = sorted({self.policies[name].output_layer for name in names})
        layer = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers}"
        lists = [editor.buffers(prompt.batch).edits for editor in self._editors]
        if seen and seen == nonfinite:
            return  # which has its own warning
        if not seen:
            reason = "no token came by at a position that edit_positions names"
        elif all(self.policies[name].alpha == 0 for name in names):
            reason = "alpha is 0"
        elif not any(edits is not None and bool(edits.counts.any()) for edits in lists):
            counted = bool(prompt.counted.any())
            reason = "the policy selected no latent" if counted else "the prompt has no token that counts"
        else:
            reason = (
                f"none of the selected latents was active on the {seen} tokens seen after {layer}; if that happens "
                "with every prompt, see that the SAE belongs to this layer and this model"
            )
        warnings.warn(f"steering changed nothing in this generate call: {reason}", stacklevel=4)


def _no_cache() -> None:
    """The cache of a prompt that is in none."""
