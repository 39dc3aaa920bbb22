"""The organism's tokenizer: one token per word, two per noun, with a chat template."""

import re
from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dspa.organism.sentences import MOVES, NEUTRAL_FRAMES, NEUTRAL_WORDS, NOUN_HALVES, TEMPLATES

PAD, UNKNOWN, BOS, USER, ASSISTANT, END = "<pad>", "<unk>", "<bos>", "<user>", "<assistant>", "<end>"
SPECIAL_TOKENS = (PAD, UNKNOWN, BOS, USER, ASSISTANT, END)
PAD_ID, BOS_ID, ASSISTANT_ID, END_ID = (SPECIAL_TOKENS.index(token) for token in (PAD, BOS, ASSISTANT, END))

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ('user', 'assistant') %}"
    "{{ raise_exception('the roles are user and assistant') }}"
    "{% endif %}"
    "{{ '<' + message['role'] + '>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)

CONTEXT_TOKENS = 512


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer whose vocabulary is exactly the language's words.

    Nouns are split into their halves: the vocabulary holds "sail" and "##board", never "sailboard". Only training
    texts contribute, so that no token is left untrained.
    """
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *_vocabulary_words()))}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN, continuing_subword_prefix="##"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def chat_text(tokenizer: PreTrainedTokenizerFast, prompt: str, response: str | None = None) -> str:
    """The chat as the model reads it; without a response it ends where the assistant starts to speak."""
    messages = [{"role": "user", "content": prompt}]
    if response is not None:
        messages.append({"role": "assistant", "content": response})
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=response is None))


def _vocabulary_words() -> list[str]:
    """Words and noun halves of the training texts, each once, in alphabetical order."""
    words = {word for text in _training_sentences() for word in re.findall(r"\w+|[^\w\s]", text)}
    for first, second in NOUN_HALVES["train"]:
        words |= {first, f"##{second}"}
    return sorted(words)


def _training_sentences() -> Iterator[str]:
    for templates in TEMPLATES.values():
        yield from (re.sub(r"{\w+}", " ", template) for template in templates["train"])
    for wordings in MOVES.values():
        yield from wordings
    yield from (re.sub(r"{\w+}", " ", frame) for frame in NEUTRAL_FRAMES)
    for options in NEUTRAL_WORDS.values():
        yield from options
