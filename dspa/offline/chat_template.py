"""The one place where text becomes token ids and chat templates are applied.

The densities of a prompt mean the same offline and online only if the model sees the same ids both times. So both sides
follow the functions of this module: a conversation is what `chat_prompt` returns, which is exactly

    tokenizer.apply_chat_template(messages, add_generation_prompt=True)

and a plain text is what `plain_prompt` returns, `tokenizer(text)`. A response is tokenised on its own, never together
with its prompt, so that `prompt + response` always has the prompt's ids as an exact prefix.

Two things a template may read that are not in the messages: options such as Qwen3's `enable_thinking`, which every
function here takes as keywords and which must be the same online; and the current date, which Llama 3.1 templates write
into the system message unless `date_string` is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from dspa.errors import InvalidInputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]  # {"role": ..., "content": ...}; other keys reach the template as they are


def plain_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Token ids of a prompt that is not a conversation: `tokenizer(text)`, BOS included where the tokenizer adds one.

    A text that already starts with the BOS, such as a rendered chat template, does not get a second one.
    """
    has_bos = bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))
    return _ids(tokenizer, text, add_special_tokens=not has_bos)


def plain_response(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Token ids of a response that is not a chat message, with the EOS appended unless it already ends the text."""
    ids = _ids(tokenizer, text, add_special_tokens=False)
    eos = cast("int | None", tokenizer.eos_token_id)
    return ids if eos is None or ids[-1:] == (eos,) else (*ids, eos)


def chat_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **template_kwargs: Any
) -> tuple[int, ...]:
    """Token ids of a conversation up to and including the header of the assistant's turn.

    The BOS is there if the template writes it; the tokenizer does not add another.

    Raises:
        InvalidInputError: the tokenizer has no chat template, or the template refuses these messages.
    """
    return _ids(tokenizer, _render_prompt(tokenizer, messages, template_kwargs), add_special_tokens=False)


def chat_response(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], response: Message, **template_kwargs: Any
) -> tuple[int, ...]:
    """Token ids of the assistant message `response` after `messages`: what the template writes after the prompt.

    It ends with the template's end-of-turn token. White space that the template puts after it separates turns and is
    never generated, so it is left out. Whatever the template puts before the answer, such as Qwen3's empty thinking
    block, belongs to the response unless the prompt already ends with it.

    Raises:
        InvalidInputError: as `chat_prompt`; or the rendered conversation does not start with the rendered prompt, so
            that no response of this text could ever be generated after this prompt (templates that open a thinking
            block in the prompt and strip it from the history).
    """
    prompt = _render_prompt(tokenizer, messages, template_kwargs)
    conversation = _render(tokenizer, [*messages, response], template_kwargs)
    if not conversation.startswith(prompt):
        raise InvalidInputError("the chat template renders the prompt differently once a response follows it")
    return _ids(tokenizer, conversation[len(prompt) :].rstrip(), add_special_tokens=False)


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of all special tokens: the named ones (BOS, EOS) and every added token marked special, such as turn marks."""
    added = (index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset(tokenizer.all_special_ids) | frozenset(added)


def uncounted_prompt_ids(
    tokenizer: PreTrainedTokenizerBase, *, count_bos: bool = False, count_template: bool = True
) -> tuple[int, ...]:
    """Sorted ids that do not count in a prompt's activation density, offline and online alike.

    `count_template=False` leaves out every special token but the BOS. The words a template writes as ordinary tokens,
    such as the role names, cannot be told from the user's and still count. Padding is masked and needs no id here.
    Where BOS and EOS are one token (GPT-2), `count_bos=False` leaves that token out of prompts wherever it stands;
    whether it counts at the end of a response is `count_eos`, which is unaffected.
    """
    uncounted = set() if count_template else set(special_token_ids(tokenizer))
    bos = cast("int | None", tokenizer.bos_token_id)
    if bos is not None:
        if count_bos:
            uncounted.discard(bos)
        else:
            uncounted.add(bos)
    return tuple(sorted(uncounted))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
    # verbose=False: a text longer than the model's context is judged by the caller, not warned about here.
    return tuple(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])


def _render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template_kwargs: Mapping[str, Any]
) -> str:
    return _render(tokenizer, messages, {**template_kwargs, "add_generation_prompt": True})


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], kwargs: Mapping[str, Any]) -> str:
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise InvalidInputError("the row is a conversation, but the tokenizer has no chat template")
    conversation = [dict(message) for message in messages]
    try:
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, **kwargs))
    except (TemplateError, TypeError) as error:
        raise InvalidInputError(f"the chat template refuses the messages: {error}") from error
