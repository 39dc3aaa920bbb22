"""`dspa.steer`: attaches policies to a transformers model, and what its users call on the result."""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dspa.errors import InvalidInputError
from dspa.kernels import EditList, StepMode, TokenStats
from dspa.methods.policy import Policy
from dspa.online.forward_prompt import PaddingTokens
from dspa.online.hooks.forward import hooks_of
from dspa.online.hooks.generate import GenerateObservation
from dspa.online.layer_editor import LayerEditor
from dspa.online.policy_groups import check_not_steered, editing_groups, reading_groups
from dspa.online.prompt_reader import PromptReader
from dspa.online.row_selection import RowSelection, Selection
from dspa.online.session import Session
from dspa.online.summary import SteeringSummary
from dspa.online.trace import SteeringTrace, TraceRecorder
from dspa.transformers_model import ModelFingerprint, decoder_stack, device_of, dtype_of

THE_POLICY = "policy"  # the name of a policy that has none
NOT_SELECTED: Any = object()
POLL = 0.002  # seconds between looks at whether another thread's call has ended


def steer(
    model: nn.Module,
    policy: Policy | Mapping[str, Policy],
    *,
    select: Selection = NOT_SELECTED,
    backend: str = "auto",
    mode: StepMode | None = None,
    trace: bool = False,
    differentiable: bool = False,
    compose: bool = False,
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
        policy: a `SteeringPolicy`, `StaticPolicy` or `VectorPolicy`, or an object of one's own with the fields of
            `dspa.Policy`; or several by name.
        select: which policy the prompts of the calls to come have: a name for all of them, or a name or None (not
            steered) for each. Beams and several sequences per prompt follow their prompt. Not needed with one policy.
        backend: a kernel backend's name, or "auto".
        mode: how the kernel gets to its result; see `dspa.kernels.token_step`.
        trace: record every edit for `Steering.trace`. Costs time and memory, changes no result.
        differentiable: where autograd records, compute edits in plain torch, with gradients through the edit and into
            the vectors of policies (strengths are constants); such edits are neither counted nor traced. Otherwise an
            edit is a constant to autograd: the gradient of the edited states passes to the states before the edit as
            it is.
        compose: steer a model that is steered already: edits follow one another, earlier ones first. Without it, a
            policy that is attached already is refused, and another one comes with a warning.

    Raises:
        MismatchError: if a policy was made for another model, or policies contradict each other.
        InvalidInputError: if the model's decoder layers cannot be found, it cannot generate, or an adapter puts virtual
            tokens before prompts; if there is no policy or a selected one is not there.
    """
    named = isinstance(policy, Mapping)
    policies: dict[str, Policy] = dict(policy) if isinstance(policy, Mapping) else {THE_POLICY: policy}
    return Steering(
        model,
        policies,
        named=named,
        select=select,
        backend=backend,
        mode=mode,
        trace=trace,
        differentiable=differentiable,
        compose=compose,
    )


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
        differentiable: bool,
        compose: bool,
    ) -> None:
        check_policies(policies, ModelFingerprint.from_model(model) if policies else None)
        stack = decoder_stack(model)
        self._hooks = hooks_of(stack)
        if not compose:
            check_not_steered(policies, [observer.policies for observer in self._hooks.observers])
        self.model = model
        self.policies = policies
        self._recorder = TraceRecorder() if trace else None
        self._readers = [
            PromptReader(group, device_of(stack.layers[group.layer]), backend) for group in reading_groups(policies)
        ]
        self._editors = [
            LayerEditor(
                group,
                device_of(stack.layers[group.layer]),
                backend,
                mode,
                all_rows=not named,
                recorder=self._recorder,
            )
            for group in editing_groups(policies)
        ]
        for part in (*self._readers, *self._editors):
            layer = stack.layers[part.group.layer]
            if is_compiled_for(device_of(layer)):
                dtype = dtype_of(layer)
                part.prepare(policies, dtype) if isinstance(part, PromptReader) else part.prepare(dtype)
        self._selection = RowSelection(policies)
        self._session = Session(
            policies,
            self._readers,
            self._editors,
            self._selection,
            self._recorder,
            differentiable=differentiable,
            padding=PaddingTokens.from_model(model),
        )
        if select is not NOT_SELECTED:
            self.select(select)
        self._layers = {place.group.layer for place in (*self._readers, *self._editors)}
        self._observation = GenerateObservation(model, self._session)
        self._attached = False
        self._attach()

    def remove(self) -> None:
        """Detaches the policies; the model generates as before. Doing it twice does no harm.

        While a generate call is running in another thread, this waits for its end: the call is steered throughout.
        An interrupt (Ctrl-C) in the middle is raised once everything is detached.
        """
        try:
            self._session.closed = True
            self._wait_for_another_threads_call()
            self._detach()
        except BaseException:
            self._detach()
            raise
        self._session.warn_of_nonfinite(stacklevel=4)

    def __enter__(self) -> Steering:
        """Attaches the policies again, if they were removed."""
        try:
            if not self._attached:
                self._attach()
            return self
        except BaseException:  # an interrupt: the block is not entered, so nothing would detach them
            self._detach()
            raise

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def select(self, names: Selection) -> None:
        """Chooses the policies of the generate and forward calls to come.

        Args:
            names: a policy's name for all rows, None for no steering, or one of these for each prompt of a batch.

        Raises:
            InvalidInputError: if a policy is not there, or a generate call is running.
        """
        if self._session.call is not None:
            raise InvalidInputError("policies cannot be selected while a generate call is running; select before it")
        for editor in self._editors:
            editor.all_rows = False  # before anything else: telling rows apart is right for every selection
        self._selection.select(names)

    @contextmanager
    def scoring(
        self,
        prompt_tokens: int | Sequence[int] | Tensor | None = None,
        *,
        completion_mask: Tensor | Sequence[Sequence[int]] | None = None,
    ) -> Iterator[None]:
        """Inside, forward calls without a cache are taken for prompts followed by responses, as when responses are
        scored: the logits are those with which `generate` would have chosen.

        Args:
            prompt_tokens: how many tokens of each row are its prompt, padding not counted; one number for all rows, or
                one for each.
            completion_mask: instead, `[B, T]`, nonzero on the response, as TRL's collators make it.

        Raises:
            InvalidInputError: unless exactly one of them is passed, or if it is no numbers. A forward call inside
                raises it if a row has no prompt, or fewer tokens than its prompt, or no row has a response.
        """
        if (prompt_tokens is None) == (completion_mask is None):
            raise InvalidInputError("scoring needs either prompt_tokens or completion_mask")
        lengths = None if prompt_tokens is None else _numbers("prompt_tokens", prompt_tokens)
        response = None if completion_mask is None else _numbers("completion_mask", completion_mask) != 0
        session = self._session
        before = session.prompt_lengths, session.response
        try:
            session.prompt_lengths, session.response = lengths, response
            yield
        finally:
            session.prompt_lengths, session.response = before

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
        """The edit lists of the last prompts, one a row; None before there was a prompt, or for policies without lists.

        Raises:
            InvalidInputError: if the policies have several output SAEs.
        """
        prompt = self._session.prompt
        return self._only_editor().selection() if prompt is not None and not prompt.unread else None

    def counters(self, batch: int) -> TokenStats:
        """The counters of the passes with so many rows, updated in place as tokens are edited.

        Raises:
            InvalidInputError: if the policies have several output SAEs.
        """
        return self._only_editor().counters.of_batch(batch)

    def summary(self) -> SteeringSummary:
        """What was seen and edited since the policies were attached."""
        return SteeringSummary.from_layers(
            [(editor.group.layer, editor.counters.all()) for editor in self._editors], self._session.prompts_read
        )

    def trace(self) -> SteeringTrace:
        """Every edit since the policies were attached, token by token.

        Raises:
            InvalidInputError: if it was not requested with `steer(..., trace=True)`.
        """
        if self._recorder is None:
            raise InvalidInputError("nothing was recorded; attach the policy with steer(model, policy, trace=True)")
        name = getattr(getattr(self.model, "config", None), "name_or_path", None)
        return replace(self._recorder.trace(), model_name=name or None)

    def __repr__(self) -> str:
        named = ", ".join(f"{name}: {policy!r}" for name, policy in self.policies.items())
        state = "attached to" if self._attached else "detached from"
        return f"Steering({state} {type(self.model).__name__}, {named})"

    def _repr_html_(self) -> str:
        """For notebooks: what it is, and its summary so far."""
        return f"<p><code>{html.escape(repr(self))}</code></p>{self.summary()._repr_html_()}"

    def _only_editor(self) -> LayerEditor:
        if len(self._editors) > 1:
            raise InvalidInputError(
                f"the policies have {len(self._editors)} output SAEs, each with lists and counters of its own; attach "
                "them one by one to look at these"
            )
        return self._editors[0]

    def _attach(self) -> None:
        """Any line can be the last: what was done so far is undone."""
        try:
            self._session.opens()
            # In this order: a generate call of another thread that begins between the two is not followed at all.
            self._hooks.add(self._session, self._layers)
            self._observation.install()
            self._attached = True
        except BaseException:
            self._session.closed = True
            self._detach()
            raise

    def _detach(self) -> None:
        """Undoes all or some of `_attach`. After an interrupt, again."""
        self._hooks.remove(self._session)
        self._observation.remove()
        self._attached = False

    def _wait_for_another_threads_call(self) -> None:
        while True:
            holder = self._session.generating.holder
            if holder is None or holder.thread == threading.get_ident():
                return
            time.sleep(POLL)


def is_compiled_for(device: torch.device) -> bool:
    """Whether kernels for a device may have to be compiled, which is done when a policy is attached, and not while a
    model generates."""
    return device.type == "cuda"


def check_policies(policies: Mapping[str, Policy], model: ModelFingerprint | None) -> None:
    """Refuses policies that do not fit a model.

    Raises:
        InvalidInputError: if there is none, or one observes its prompt after the layer it edits.
        MismatchError: if one was made for another model, or has a layer or a width that this one has not.
    """
    if not policies or model is None:
        raise InvalidInputError("there is no policy to steer by; pass at least one")
    for name, policy in policies.items():
        if policy.model is not None:
            policy.model.check(model)
        observation, intervention = policy.observation, policy.intervention
        if observation is not None:
            observation.check(model)
        intervention.check(model)
        if observation is not None and observation.layer > intervention.layer:
            raise InvalidInputError(
                f"policy {name!r} observes prompts after layer {observation.layer} and edits after layer "
                f"{intervention.layer}; the prompt must be read before it is edited"
            )


def _numbers(name: str, value: object) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInputError(f"scoring got {name} {value!r:.80}; expected whole numbers") from error
