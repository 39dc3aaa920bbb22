"""Warnings about steering that changes nothing, or not what a user may expect."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from dspa.methods.policy import Policy
from dspa.online.generate_call import GenerateCall
from dspa.online.layer_editor import LayerEditor
from dspa.online.prompt import Prompt


def warn_of_nonfinite(editors: Sequence[LayerEditor], stacklevel: int) -> bool:
    """Warns of tokens left alone because of NaN or Inf; returns whether there were any."""
    found = False
    for editor in editors:
        nonfinite = sum(int(stats.nonfinite.sum()) for stats in editor.counters.all())
        if nonfinite:
            warnings.warn(
                f"{nonfinite} tokens had NaN or Inf in the residual stream after layer {editor.group.layer} and "
                "were left unedited; look for an overflow in the model (float16 is a common cause)",
                stacklevel=stacklevel,
            )
            found = True
    return found


def warn_of_nonfinite_later(call: GenerateCall, editors: Sequence[LayerEditor]) -> bool:
    """Warns of NaN or Inf that came up behind the edits, where no editor sees them: in a hook on an edited layer, or
    later. Each later position reads them, through the cache, and so the last one has them. Returns whether there are
    any."""
    if call.last_hidden is None or bool(call.last_hidden.isfinite().all()):
        return False
    warnings.warn(
        "the last hidden states of the model hold NaN or Inf, which came up behind layer "
        f"{max(editor.group.layer for editor in editors)}, where the policies edit; look for a hook on that layer, or "
        "for an overflow in the model (float16 is a common cause)",
        stacklevel=5,
    )
    return True


def warn_of_assumed_prompt(policies: Sequence[Policy], batch: int, width: int, labels: bool) -> bool:
    """Says for what the input of a forward call was taken, if that makes a difference; returns whether it does."""
    affected = [p for p in policies if p.observation is not None or p.edit_positions != "all"]
    if not affected:
        return False
    places = {
        "from_last_prompt": "edited its last token",
        "generated": "edited nothing",
        "all": "edited all of its tokens that count",
    }
    done = " or ".join(sorted({places[policy.edit_positions] for policy in affected}))
    said = "its labels mark no prompt" if labels else "nothing says where a response begins"
    warnings.warn(
        f"a forward call of {batch} x {width} tokens was taken for prompts, as {said}: the policy read each row to its "
        f"end and {done}; to score or train on responses, call it inside steering.scoring(prompt_tokens=...), or pass "
        "labels that are -100 on the prompt",
        stacklevel=2,
    )
    return True


def warn_of_cached_prompt(prompt: Prompt, cached: int) -> None:
    """Warns if the cache passed to a generate call held some of its prompt."""
    if not cached or not prompt.steered:
        return
    mask = prompt.attention_mask.bool()
    tokens, missing = int(mask.sum()), int(mask[:, :cached].sum())
    warnings.warn(
        f"{missing} of {tokens} prompt tokens are in the cache passed to generate and were not read: the edit "
        f"lists follow the other {tokens - missing}; pass the prompt without a cache to have all of it read",
        stacklevel=2,
    )


def warn_of_no_edit(
    call: GenerateCall, prompt: Prompt, policies: Mapping[str, Policy], editors: Sequence[LayerEditor]
) -> None:
    """Says why, if a generate call that ends has edited nothing."""
    steering = [policies[name] for name in {name for name in prompt.row_policies if name is not None}]
    if not steering:
        return  # as was selected
    totals = [
        (editor.counters.totals() - before).tolist() for editor, before in zip(editors, call.totals_before, strict=True)
    ]
    seen, edited, nonfinite = (sum(numbers) for numbers in zip(*totals, strict=True))
    if edited or (seen and seen == nonfinite):  # of which there is another warning
        return
    layers = sorted({policy.intervention.layer for policy in steering})
    layer = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers}"
    names = set(prompt.row_policies)
    lists = [editor.selection() for editor in editors if names & set(editor.group.names)]
    if not seen:
        reason = "no token was computed at a position that edit_positions names"
    elif all(policy.intervention.strength == 0 for policy in steering):
        reason = f"{'scale' if all(edits is None for edits in lists) else 'alpha'} is 0"
    elif all(edits is not None and not bool(edits.counts.any()) for edits in lists):
        counted = bool(prompt.mask.counted.any())
        reason = "the policy selected no latent" if counted else "the prompt has no token that counts"
    elif all(edits is None for edits in lists):
        reason = f"the adapter or vector is too small to change a hidden state after {layer}"
    else:
        reason = (
            f"none of the selected latents was active on the {seen} tokens seen after {layer}; if that happens "
            "with every prompt, see that the SAE belongs to this layer and this model"
        )
    warnings.warn(f"steering changed nothing in this generate call: {reason}", stacklevel=4)
