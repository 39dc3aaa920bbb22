"""The two rewards of the study: computed from the text of an answer, not judged.

An answer's features are shares between 0 and 1. What is conditional is their sign: the features that one kind of prompt
prefers are dispreferred by another, so that no fixed change of the model gains on all kinds. The concise reward is the
same for every prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from study.prompts import KINDS, Prompt
from study.settings import Task

LONGEST = 64  # tokens; an answer of so many has no reward for its length
LONGEST_SENTENCE = 30  # words, likewise
LEAST_WORDS = 4  # of an answer that counts as one

_WORD = re.compile(r"[a-z']+")
_ITEM = re.compile(r"^\s*(?:\d+[.)]|[-*•])\s+\S", re.MULTILINE)
_SENTENCE_END = re.compile(r"(?<=[.!?:])\s+|\n+")
_CODE = re.compile(
    r"```|^\s*(?:def \w+\(|import \w+|from \w+ import|for \w+ in .+:|while .+:|if .+:$|return\b|print\(|\w+ = )",
    re.MULTILINE,
)
_QUOTED = re.compile(r"[\"“][^\"”]{2,}[\"”]")


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(" ".join(phrase.split()) for phrase in text.split(","))


FIRST_PERSON = _phrases("i, i'm, i've, i'd, i'll, me, my, mine, myself")
SECOND_PERSON = _phrases("you, you're, you've, you'd, you'll, your, yours, yourself")
THIRD_PERSON = _phrases("he, she, him, her, his, hers, himself, herself, they, them, their")
PAST = _phrases(
    """was, were, had, did, said, saw, came, went, found, knew, lived, stood, felt, thought, took, made, began, grew,
    told, heard, left, could, would, once"""
)
HEDGES = _phrases(
    """i think, i believe, i feel, in my opinion, in my view, personally, perhaps, maybe, might, may, could, it depends,
    can be, some people, seems, often, sometimes, tend to, likely, not sure"""
)
SYMPATHY = _phrases(
    """sorry, i understand, that sounds, it sounds, it's okay, it's ok, it is okay, must be, must have been,
    it's natural, it's normal, i can imagine, i hear you, i'm here, i am here, it's understandable, tough,
    hard time, difficult, completely valid, feelings, condolences, heartbreaking, challenging"""
)
FILLERS = _phrases(
    """of course, certainly, sure, absolutely, great question, as an ai, as a language model, here is, here's, here are,
    i'd be happy, i'm happy to, happy to help, in conclusion, overall, it's important to, it is important to, remember,
    please note, additionally, furthermore, moreover, in addition, feel free, let me know, i hope this, as you,
    when it comes to, a wide range, essential, crucial, various"""
)

Feature = Callable[[str], float]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower().replace("’", "'"))


def _share_of_words(vocabulary: tuple[str, ...], full: float) -> Feature:
    """The share of words that are of a vocabulary; 1 from the share `full` on."""

    def feature(text: str) -> float:
        words = _words(text)
        return min(1.0, sum(word in vocabulary for word in words) / len(words) / full) if words else 0.0

    return feature


def occurrences(phrases: tuple[str, ...], text: str) -> int:
    """How often phrases occur in a text, as whole words."""
    joined = f" {' '.join(_words(text))} "
    return sum(joined.count(f" {phrase} ") for phrase in phrases)


def first_sentence(text: str) -> str:
    """Up to the first end of a sentence, colon or line."""
    return _SENTENCE_END.split(text.strip(), maxsplit=1)[0]


def words_per_sentence(text: str) -> float:
    """The mean, over the sentences and lines that have words."""
    lengths = [len(words) for sentence in _SENTENCE_END.split(text) if (words := _words(sentence))]
    return sum(lengths) / len(lengths) if lengths else 0.0


FEATURES: Mapping[str, Feature] = {
    "list": lambda text: min(1.0, len(_ITEM.findall(text)) / 2),
    "first person": _share_of_words(FIRST_PERSON, 0.1),
    "second person": _share_of_words(SECOND_PERSON, 0.1),
    "hedges": lambda text: min(1.0, occurrences(HEDGES, text) / 2),
    "sympathy first": lambda text: float(occurrences(SYMPATHY, first_sentence(text)) > 0),
    "narrative": lambda text: 0.5 * _share_of_words(PAST, 0.1)(text) + 0.5 * _share_of_words(THIRD_PERSON, 0.1)(text),
    "dialogue": lambda text: float(_QUOTED.search(text) is not None),
    "code": lambda text: min(1.0, len(_CODE.findall(text)) / 2),
    "short first sentence": lambda text: float(LEAST_WORDS <= len(_words(first_sentence(text))) <= 14),
    "exclamation": lambda text: min(1.0, text.count("!") / 2),
}
"""What an answer is like, each between 0 and 1."""

PREFERENCES: Mapping[str, Mapping[str, float]] = {
    "how-to": {"list": 1, "second person": 0.5, "first person": -1, "hedges": -0.5, "narrative": -0.5},
    "opinion": {"first person": 1, "hedges": 1, "list": -0.5, "second person": -0.5, "code": -0.5},
    "fact": {"short first sentence": 1, "first person": -0.5, "hedges": -1, "second person": -0.5, "exclamation": -0.5},
    "feeling": {"sympathy first": 1, "second person": 1, "list": -1, "narrative": -0.5},
    "story": {"narrative": 1, "dialogue": 0.5, "second person": -1, "list": -0.5},
    "coding": {"code": 1, "first person": -0.5, "narrative": -0.5, "exclamation": -0.5, "short first sentence": 0.5},
}
"""Per kind of prompt, which features are preferred (positive) and dispreferred, by weight."""


def reward(task: Task, prompt: Prompt, text: str, tokens: int, ended: bool) -> float:
    """How much an answer is what the task prefers.

    Conditional: the weighted features, between -1 and 1. Concise: half for few tokens, half for short sentences, a
    quarter less for each filler and where the answer was cut off; between -1 and 1. An answer of fewer than
    `LEAST_WORDS` words has -1 in both, so that saying nothing does not pay.
    """
    if len(_words(text)) < LEAST_WORDS:
        return -1.0
    return max(-1.0, min(1.0, sum(parts(task, prompt, text, tokens, ended).values())))


def parts(task: Task, prompt: Prompt, text: str, tokens: int, ended: bool) -> dict[str, float]:
    """What the reward of an answer of at least `LEAST_WORDS` words is the sum of."""
    if task == "concise":
        return {
            "length": 0.5 * max(0.0, 1 - tokens / LONGEST),
            "short sentences": 0.5 * max(0.0, 1 - words_per_sentence(text) / LONGEST_SENTENCE),
            "fillers": -0.25 * occurrences(FILLERS, text),
            "cut off": -0.25 * (not ended),
        }
    preferences = PREFERENCES[prompt.kind]
    most = sum(weight for weight in preferences.values() if weight > 0)
    return {name: weight / most * FEATURES[name](text) for name, weight in preferences.items()}


assert set(PREFERENCES) == set(KINDS)
