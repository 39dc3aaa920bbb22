"""Which requests may share a block of vLLM's prefix cache: the key that is added to the hash of its tokens.

Keys and values of a position depend on the tokens up to it and on the edits at positions up to it. Let P be the number
of prompt tokens. Of a policy that edits "from_last_prompt" or "generated", positions before the first edited one,
P - 1 or P, are as without a policy, whoever computes them: such a block needs no policy in its key. Requests that read
prompts do need what was read of a block they reuse, and share it with those that read alike.

A block that reaches the first edited position belongs to the policy and to P: another request of the same policy may
have the same tokens in a longer prompt, where they are not edited. Its own request finds it again after a preemption.

A policy that edits "all" positions without reading the prompt edits each token by itself, so its prompt blocks belong
to the policy alone.
"""

from __future__ import annotations

from dspa.vllm_plugin.settings import ServedPolicy


def block_key(policy: ServedPolicy, prompt_tokens: int, end: int) -> str | None:
    """The key of a block of the positions before `end`; None if requests without a policy share it.

    Args:
        policy: of the request.
        prompt_tokens: P.
        end: the position after the block's last one.
    """
    first_edited = prompt_tokens if policy.edit_positions == "generated" else prompt_tokens - 1
    if end > first_edited:
        return f"{policy.fingerprint} {prompt_tokens}"
    return policy.fingerprint if policy.edit_positions == "all" else policy.reading
