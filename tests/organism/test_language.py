"""The generated language: its rule, its splits, exact parsing, matched lengths, and a base reward of zero."""

import itertools
import re
from collections import Counter

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from dspa.organism.language import (
    KINDS,
    MAX_RESPONSE_TOKENS,
    MOVES,
    REGISTER_SHARE,
    REGISTERS,
    RULES,
    Parsed,
    Split,
    draw_prompt,
    draw_prompts,
    draw_response,
    draw_triple,
    draw_triples,
    neutral_text,
    parse,
    reward,
)
from dspa.organism.sentences import NOUN_HALVES, NOUNS, TEMPLATES, WORDING_TOKENS
from dspa.organism.tokenizer import ASSISTANT, BOS, END, USER, build_tokenizer, chat_text

SPLITS: tuple[Split, ...] = ("train", "validation", "heldout")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


# The rule


def test_size() -> None:
    assert len(KINDS) >= 12
    assert len(MOVES) == 16
    assert sorted(move for moves in REGISTERS.values() for move in moves) == sorted(MOVES)


def test_every_kind_prefers_five_moves_and_disprefers_five_others() -> None:
    assert set(RULES) == set(KINDS)
    for rule in RULES.values():
        assert len(rule.preferred) == len(rule.dispreferred) == 5
        assert not rule.preferred & rule.dispreferred
        assert rule.preferred | rule.dispreferred <= set(MOVES)


def test_every_move_is_preferred_as_often_as_dispreferred() -> None:
    preferred = Counter(move for rule in RULES.values() for move in rule.preferred)
    dispreferred = Counter(move for rule in RULES.values() for move in rule.dispreferred)
    assert preferred == dispreferred
    assert min(preferred[move] for move in MOVES) >= 2


def test_reward_counts_preferred_minus_dispreferred_moves() -> None:
    rule = RULES["loss"]
    indifferent = next(move for move in MOVES if move not in rule.preferred | rule.dispreferred)
    liked, disliked = min(rule.preferred), min(rule.dispreferred)
    assert reward("loss", (liked, liked, indifferent, disliked)) == 1
    assert reward("loss", ()) == 0


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_base_text_has_mean_reward_zero_for_every_kind(kind: str) -> None:
    rng = np.random.default_rng(1)
    rewards = np.array([reward(kind, draw_response(rng).moves) for _ in range(4000)])
    standard_error = rewards.std() / len(rewards) ** 0.5
    assert abs(rewards.mean()) < 4 * standard_error
    assert rewards.std() > 3


# Responses


def test_parse_reads_every_response_back() -> None:
    rng = np.random.default_rng(2)
    for _ in range(500):
        response = draw_response(rng)
        assert parse(response.text) == Parsed(response.moves, malformed=0)


def test_each_sentence_belongs_to_one_move() -> None:
    sentences = [sentence for wordings in MOVES.values() for sentence in wordings]
    assert len(set(sentences)) == len(sentences)
    for move, wordings in MOVES.items():
        for sentence in wordings:
            assert parse(sentence) == Parsed((move,), malformed=0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Parsed((), 0)),
        ("   ", Parsed((), 0)),
        ("Hey there, my friend! So yeah, you", Parsed(("greeting",), 1)),
        ("Hey there, my cat! So yeah, you know.", Parsed(("filler",), 1)),
        ("Every rule exists for a reason", Parsed((), 1)),
        ("...", Parsed((), 3)),
    ],
)
def test_parse_counts_what_is_not_of_the_language(text: str, expected: Parsed) -> None:
    assert parse(text) == expected


def test_responses_keep_to_a_register_and_no_move_follows_itself() -> None:
    rng = np.random.default_rng(3)
    register_of = {move: register for register, moves in REGISTERS.items() for move in moves}
    registers: Counter[str] = Counter()
    shares: list[float] = []
    for _ in range(2000):
        moves = draw_response(rng).moves
        assert all(first != second for first, second in itertools.pairwise(moves))
        register, count = Counter(register_of[move] for move in moves).most_common(1)[0]
        registers[register] += 1
        shares.append(count / len(moves))
    assert abs(np.mean(shares) - REGISTER_SHARE) < 0.02
    assert all(400 < registers[register] < 600 for register in REGISTERS)


def test_drawing_depends_on_the_generator_alone() -> None:
    def draw(seed: int) -> tuple[object, ...]:
        rng = np.random.default_rng(seed)
        return draw_prompt(rng, "heldout"), draw_response(rng), draw_triple(rng), neutral_text(rng, "heldout")

    assert draw(4) == draw(4)
    assert draw(4) != draw(5)


# Splits


@pytest.mark.parametrize("other", ["validation", "heldout"])
def test_no_noun_or_template_of_another_split_is_in_training_text(other: Split) -> None:
    train_templates = {template for kind in KINDS for template in TEMPLATES[kind]["train"]}
    templates = {template for kind in KINDS for template in TEMPLATES[kind][other]}
    assert not templates & train_templates
    assert not set(NOUNS[other]) & set(NOUNS["train"])

    # The nouns are in no word of any other training sentence either.
    rng = np.random.default_rng(6)
    training = words(" ".join(sentence for wordings in MOVES.values() for sentence in wordings))
    for template in train_templates:
        training |= words(template)
    for _ in range(500):
        training |= words(neutral_text(rng, "train"))
    assert not set(NOUNS[other]) & training


def test_validation_and_heldout_are_disjoint() -> None:
    assert not set(NOUNS["validation"]) & set(NOUNS["heldout"])
    for kind in KINDS:
        assert not set(TEMPLATES[kind]["validation"]) & set(TEMPLATES[kind]["heldout"])


@pytest.mark.parametrize("other", ["validation", "heldout"])
def test_new_nouns_are_made_of_trained_halves(other: Split, tokenizer: PreTrainedTokenizerFast) -> None:
    firsts, seconds = (set(halves) for halves in zip(*NOUN_HALVES["train"], strict=True))
    for first, second in NOUN_HALVES[other]:
        assert first in firsts
        assert second in seconds
        assert tokenizer.tokenize(first + second) == [first, f"##{second}"]


@pytest.mark.parametrize("other", ["validation", "heldout"])
def test_new_templates_use_tokens_of_training_prompts_only(other: Split, tokenizer: PreTrainedTokenizerFast) -> None:
    trained = {
        token
        for kind in KINDS
        for template in TEMPLATES[kind]["train"]
        for token in tokenizer.tokenize(template.format(noun=""))
    }
    for kind in KINDS:
        for template in TEMPLATES[kind][other]:
            assert set(tokenizer.tokenize(template.format(noun=""))) <= trained, template


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_are_balanced_over_kinds_and_stay_in_their_split(split: Split) -> None:
    prompts = draw_prompts(np.random.default_rng(7), split, 1003)
    counts = Counter(prompt.kind for prompt in prompts)
    assert set(counts) == set(KINDS)
    assert max(counts.values()) - min(counts.values()) <= 1
    for prompt in prompts:
        assert prompt.noun in NOUNS[split]
        assert set(prompt.templates) <= set(TEMPLATES[prompt.kind][split])
        assert len(set(prompt.templates)) == 2
        assert prompt.text == " ".join(prompt.templates).replace("{noun}", prompt.noun)


# Triples


def test_triples_are_matched_in_length_and_ordered_by_the_rule(tokenizer: PreTrainedTokenizerFast) -> None:
    triples = draw_triples(np.random.default_rng(8), 300)
    assert {triple.prompt.kind for triple in triples} == set(KINDS)
    for triple in triples:
        kind = triple.prompt.kind
        assert reward(kind, triple.chosen.moves) > reward(kind, triple.rejected.moves)
        assert len(tokenizer.tokenize(triple.chosen.text)) == len(tokenizer.tokenize(triple.rejected.text))
        assert triple.prompt.noun in NOUNS["train"]
        assert set(triple.prompt.templates) <= set(TEMPLATES[kind]["train"])


# The tokenizer


def test_wordings_have_their_token_counts(tokenizer: PreTrainedTokenizerFast) -> None:
    for wordings in MOVES.values():
        assert tuple(len(tokenizer.tokenize(sentence)) for sentence in wordings) == WORDING_TOKENS


@pytest.mark.parametrize("split", SPLITS)
def test_every_text_is_tokenized_and_decoded_exactly(split: Split, tokenizer: PreTrainedTokenizerFast) -> None:
    rng = np.random.default_rng(9)
    texts = [prompt.text for prompt in draw_prompts(rng, split, 600)]
    texts += [neutral_text(rng, split) for _ in range(100)]
    texts += [draw_response(rng).text for _ in range(100)]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids, text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt, response = "What is a teabag?", "So yeah, you know."
    opening = f"{BOS}{USER}{prompt}{END}{ASSISTANT}"
    assert chat_text(tokenizer, prompt) == opening
    assert chat_text(tokenizer, prompt, response) == f"{opening}{response}{END}"
    with pytest.raises(Exception, match="roles"):
        tokenizer.apply_chat_template([{"role": "system", "content": "Be kind."}])


def test_responses_fit_the_token_budget(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = np.random.default_rng(10)
    longest = max(len(tokenizer.tokenize(draw_response(rng).text)) for _ in range(1000))
    assert longest + 1 <= MAX_RESPONSE_TOKENS
