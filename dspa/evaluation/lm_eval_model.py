"""A steered model for lm-eval: `simple_evaluate(model="dspa", model_args={"pretrained": ..., "policy": ...})`.

What lm-eval calls the context of a request is the prompt, its continuation the response. lm-eval's own model pads on
the right, passes no attention mask, and does not say where contexts end, so that a policy would take context and
continuation together for the prompt. Here both are said, row by row: log-likelihoods are those with which `generate`
would have chosen, whatever the batch size.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models import huggingface
from torch import Tensor

from dspa.errors import InvalidInputError
from dspa.methods.policy import Policy
from dspa.methods.saved_policy import load_policy
from dspa.online.steering import Steering, steer

Request = tuple[Any, list[int], list[int]]  # what lm-eval caches by, the context's tokens, the continuation's


HFLM: Any = huggingface.HFLM  # its decorator hides the class from type checkers


class SteeredLM(HFLM):
    """A causal language model under a policy, for lm-eval.

    Attributes:
        steering: the policy on the model; None without one.

    Args:
        pretrained: a model folder, a hub id, or a model.
        policy: a policy, or the folder or hub id of one; None for the model as it is.
        alpha: edit strength instead of the saved policy's.
        backend: the kernel backend.
        device: where a model that is loaded here runs; by default a GPU if there is one.
        options: those of lm-eval's `HFLM`.

    Raises:
        InvalidInputError: if the model is no causal language model, or the policy cannot be loaded.
        MismatchError: if the policy belongs to another model.
    """

    def __init__(
        self,
        pretrained: Any,
        policy: Policy | str | Path | None = None,
        *,
        alpha: float | None = None,
        backend: str = "auto",
        device: str | None = None,
        **options: Any,
    ) -> None:
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        super().__init__(pretrained, device=device, **options)
        if self.backend != "causal":
            raise InvalidInputError(f"the model is {self.backend}; expected a causal language model")
        changed = {} if alpha is None else {"alpha": float(alpha)}
        if isinstance(policy, (str, Path)):
            policy = load_policy(policy, **changed)
        elif changed:
            raise InvalidInputError("alpha is for a policy that is loaded here; set it when the policy is made")
        self.steering: Steering | None = None
        self._observes = policy is not None and policy.observation is not None
        self._uncounted: frozenset[int] = frozenset()
        if policy is not None:
            self._uncounted = frozenset(policy.uncounted_token_ids)
            self.steering = steer(self.model, {"policy": policy}, select="policy", backend=backend)

    def remove(self) -> None:
        """Detaches the policy from the model."""
        if self.steering is not None:
            self.steering.remove()

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """As lm-eval's, for policies that are the same for every prompt.

        Raises:
            InvalidInputError: for a policy that reads the prompt, since such a text has none.
        """
        if self._observes:
            raise InvalidInputError(
                "this task scores whole texts (loglikelihood_rolling), which have no prompt for the policy to read; "
                "evaluate it with a StaticPolicy or VectorPolicy, or without a policy"
            )
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def _model_call(self, inps: Tensor, *args: Any, **options: Any) -> Tensor:
        """Only lm-eval's search for a batch size calls this; what it passes is no prompt."""
        if self.steering is None:
            return super()._model_call(inps, *args, **options)
        self.steering.select(None)
        try:
            return super()._model_call(inps, *args, **options)
        finally:
            self.steering.select("policy")

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:  # type: ignore[override]
        """The log-likelihood of each continuation after its context, and whether greedy decoding says the same."""
        from tqdm import tqdm

        rows: dict[tuple[tuple[int, ...], int], list[int]] = {}  # requests that need the same logits, by these
        for index, (_, context, continuation) in enumerate(requests):
            text, prompt_tokens = _scored(context, continuation, self.max_length)
            rows.setdefault((text, prompt_tokens), []).append(index)
        self._warn_of_empty_prompts(list(rows))
        ordered = sorted(rows, key=lambda row: (-len(row[0]), row))  # the longest first
        size = override_bs or self._rows_at_once(ordered)
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="log-likelihoods") as bar:
            for start in range(0, len(ordered), size):
                batch = ordered[start : start + size]
                for row, logprobs in zip(batch, self._logprobs(batch), strict=True):
                    greedy = logprobs.argmax(dim=-1)
                    for index in rows[row]:
                        key, _, continuation = requests[index]
                        tokens = torch.tensor(continuation, device=logprobs.device)
                        total = logprobs.gather(1, tokens[:, None]).sum()
                        answers[index] = (float(total), bool((greedy == tokens).all()))
                        if key is not None:
                            self.cache_hook.add_partial("loglikelihood", key, answers[index])
                        bar.update()
        return [answers[index] for index in range(len(requests))]

    def _logprobs(self, batch: Sequence[tuple[tuple[int, ...], int]]) -> list[Tensor]:
        """For each row of tokens, of which so many are prompt, the log-probabilities of what follows the prompt,
        `[tokens - prompt + 1, vocabulary]`."""
        width = max(len(text) for text, _ in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, (text, _) in enumerate(batch):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        prompt_tokens = [prompt for _, prompt in batch]
        autocast = torch.autocast(
            device_type=self.device.type,
            dtype=self.mixed_precision_dtype,
            enabled=self.mixed_precision_dtype is not None,
        )
        with torch.no_grad(), autocast:
            if self.steering is None:
                logits = self.model(ids.to(self.device), attention_mask=mask.to(self.device)).logits
            else:
                with self.steering.scoring(prompt_tokens=prompt_tokens):
                    logits = self.model(ids.to(self.device), attention_mask=mask.to(self.device)).logits
        return [
            logits[row, prompt - 1 : len(text)].log_softmax(dim=-1, dtype=self.softmax_dtype)
            for row, (text, prompt) in enumerate(batch)
        ]

    def _rows_at_once(self, ordered: Sequence[tuple[tuple[int, ...], int]]) -> int:
        if self.batch_size != "auto":
            return int(self.batch_size)
        if not ordered:
            return 1
        size = self.max_batch_size
        while size > 1:
            try:
                self._logprobs(list(ordered[:1]) * size)
                break
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                size //= 2
        return size

    def _warn_of_empty_prompts(self, rows: Sequence[tuple[tuple[int, ...], int]]) -> None:
        if not self._observes:
            return
        empty = sum(all(token in self._uncounted for token in text[:prompt]) for text, prompt in rows)
        if empty:
            warnings.warn(
                f"{empty} of {len(rows)} requests have a context without a token that counts; the policy selects "
                "nothing for them, and they are scored as the unsteered model would",
                stacklevel=3,
            )


register_model("dspa")(SteeredLM)  # not as a decorator, for the same reason


def _scored(context: Sequence[int], continuation: Sequence[int], longest: int) -> tuple[tuple[int, ...], int]:
    """The tokens that are passed, and how many of them are prompt: context and continuation without the last token,
    which nothing follows, cut on the left to the model's context."""
    text = (*context, *continuation)[:-1]
    if not context or not continuation or len(continuation) > longest:
        raise InvalidInputError(
            f"a request has a context of {len(context)} tokens and a continuation of {len(continuation)}; expected at "
            f"least one of each, and a continuation of at most {longest}"
        )
    cut = max(len(text) - longest, 0)
    if cut:
        warnings.warn(
            f"a request has {len(text)} tokens, the model's context {longest}: the first {cut} were left out, and the "
            "policy reads the others",
            stacklevel=4,
        )
    return text[cut:], len(context) - cut
