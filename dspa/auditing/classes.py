"""The classes of the paper's audit (discourse, style, content) where no label names one: a rule of positions and
tokens, which nobody has compared with human judgement."""

from __future__ import annotations

from dataclasses import dataclass

from dspa.auditing.records import LatentClass

STRUCTURAL, REPEATED, RARE = 0.5, 0.5, 0.1
FEW_PROMPTS = 10  # below so many, how rare a latent is says nothing

RULE: dict[LatentClass, str] = {
    "discourse": "at least half of the tokens on which it was edited are special tokens, tokens without a letter or "
    "digit, or the first of the response or of a sentence",
    "content": "at least half of the other tokens occur in their own prompt, or, of 10 or more prompts, it was edited "
    "on fewer than a tenth",
    "style": "neither",
}

SENTENCE_END = (".", "!", "?", ":", "\n")


@dataclass(frozen=True)
class TokenKinds:
    """Of each token of a prompt and its response: whether it is structural, and whether it repeats the prompt."""

    structural: tuple[bool, ...]
    repeated: tuple[bool, ...]


def token_kinds(texts: list[str], special: list[bool], prompt_tokens: int) -> TokenKinds:
    """What the rule reads of the tokens `texts`, of which the first `prompt_tokens` are the prompt."""
    words = {text.strip().lower() for text, skip in zip(texts[:prompt_tokens], special, strict=False) if not skip}
    structural, repeated, begins = [], [], True
    for place, (text, is_special) in enumerate(zip(texts, special, strict=True)):
        if place == prompt_tokens:
            begins = True
        wordless = is_special or not any(character.isalnum() for character in text)
        structural.append(wordless or begins)
        repeated.append(place >= prompt_tokens and not wordless and text.strip().lower() in words)
        if is_special or text.rstrip(" ").endswith(SENTENCE_END):
            begins = True
        elif text.strip():
            begins = False
    return TokenKinds(tuple(structural), tuple(repeated))


@dataclass
class EditedTokens:
    """What the rule counts of one latent."""

    edited: int = 0
    structural: int = 0
    repeated: int = 0  # of those that are not structural
    prompts: int = 0

    def add(self, structural: bool, repeated: bool) -> None:
        self.edited += 1
        self.structural += structural
        self.repeated += repeated and not structural

    def decide(self, all_prompts: int) -> LatentClass | None:
        """The class by the rule; None for a latent that was not edited."""
        if not self.edited:
            return None
        if self.structural >= STRUCTURAL * self.edited:
            return "discourse"
        rare = all_prompts >= FEW_PROMPTS and self.prompts < RARE * all_prompts
        if rare or self.repeated >= REPEATED * (self.edited - self.structural):
            return "content"
        return "style"
