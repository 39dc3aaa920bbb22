"""On the organism, the audit's examples show which latents carry the registers of its language. It is not told that
there are any: what a register is stands in `dspa.organism.language`, which no audit reads."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from naive_generation import hidden_after, latents

import dspa
from dspa.auditing.forward import Decoding
from dspa.auditing.records import Example
from dspa.auditing.report import PolicyAudit
from dspa.organism import INPUT_LAYER, OUTPUT_LAYER, load_model, sae_folder, triples_file
from dspa.organism.language import REGISTERS, draw_prompts, draw_response, parse

pytestmark = pytest.mark.long

REGISTER_OF = {move: register for register, moves in REGISTERS.items() for move in moves}
MOST_EDITED = 60
EXAMPLES = 4


def register_of(example: Example) -> str | None:
    """The register of the sentence that an example's token stands in; None for a prompt and for a broken sentence."""
    texts = [token.text for token in example.tokens]
    if example.tokens[example.focus].in_prompt:
        return None
    place = len("".join(texts[: example.focus])) + len(texts[example.focus]) - len(texts[example.focus].lstrip())
    for sentence in re.finditer(r"[^.!?>]+[.!?]", "".join(texts)):
        if sentence.start() <= place < sentence.end():
            moves = parse(sentence.group()).moves
            return REGISTER_OF.get(moves[0]) if moves else None
    return None


@pytest.fixture(scope="module")
def organism(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, dspa.SteeringPolicy, PolicyAudit]:
    model, tokenizer = load_model()
    saes = [dspa.SparseAutoencoder.from_sae_lens(sae_folder(which)) for which in ("input", "output")]
    triples = dspa.load_preferences(str(triples_file()), tokenizer, limit=60)
    store = dspa.collect(
        model,
        tokenizer,
        triples,
        input_sae=saes[0],
        output_sae=saes[1],
        input_layer=INPUT_LAYER,
        output_layer=OUTPUT_LAYER,
        out=tmp_path_factory.mktemp("organism") / "densities",
    )
    policy = dspa.SteeringPolicy(dspa.ConditionalDifferenceMap.fit(store), saes[0], saes[1], edit="both")
    prompts = [prompt.text for prompt in draw_prompts(np.random.default_rng(0), "heldout", 36)]
    found = dspa.audit(
        policy,
        model,
        tokenizer,
        prompts=prompts,
        densities=store,
        triples=triples,
        decoding=Decoding(max_new_tokens=84, sample=True, batch_size=36),
    )
    return model, tokenizer, policy, found


def shown_registers(found: PolicyAudit) -> dict[int, str]:
    """Of the most edited latents, those whose examples are all of one register, and which one."""
    shown = {}
    for latent in found.latents[:MOST_EDITED]:
        registers = {register_of(example) for example in latent.examples}
        if len(latent.examples) == EXAMPLES and len(registers) == 1 and (register := registers.pop()) is not None:
            shown[latent.latent] = register
    return shown


def test_examples_show_the_latents_that_carry_registers(
    organism: tuple[Any, Any, dspa.SteeringPolicy, PolicyAudit],
) -> None:
    """Were registers nothing to these latents, four examples of one latent would be of one register for about two
    latents of the sixty, by the shares of registers among the examples. Measured with seven seeds: 25 to 33."""
    *_, found = organism
    shown = Counter(shown_registers(found).values())
    assert sum(shown.values()) >= 15
    assert set(shown) == set(REGISTERS)


@torch.no_grad()
def test_what_the_examples_show_is_so_in_other_texts(
    organism: tuple[Any, Any, dspa.SteeringPolicy, PolicyAudit],
) -> None:
    """Responses drawn from the language, read without steering: where a latent is active most."""
    model, tokenizer, policy, found = organism
    shown = shown_registers(found)
    names, generator = list(REGISTERS), np.random.default_rng(1)
    active, tokens = torch.zeros(len(names), policy.output_sae.d_sae, dtype=torch.float64), torch.zeros(len(names))
    for _ in range(60):
        ids, of = [tokenizer.bos_token_id], [-1]
        for sentence in re.findall(r"[^.!?]+[.!?]", draw_response(generator).text):
            more = tokenizer(sentence, add_special_tokens=False)["input_ids"]
            register = REGISTER_OF.get(parse(sentence).moves[0])
            ids += more
            of += [-1 if register is None else names.index(register)] * len(more)
        (hidden,) = hidden_after(model, OUTPUT_LAYER, lambda ids=ids: model(torch.tensor([ids])))
        f = latents(hidden[0], policy.output_sae)
        for index in range(len(names)):
            mine = torch.tensor(of) == index
            active[index] += f[mine].sum(dim=0)
            tokens[index] += mine.sum()
    strongest = (active / tokens[:, None]).argmax(dim=0)
    right = sum(names[int(strongest[latent])] == register for latent, register in shown.items())
    assert right >= 0.8 * len(shown)


def test_clusters_and_supporting_triples(organism: tuple[Any, Any, dspa.SteeringPolicy, PolicyAudit]) -> None:
    """Prompts of one kind have lists more alike than those of others, and the triples named are of the right sign."""
    *_, found = organism
    assert found.measured is not None
    assert found.measured.overlap is not None
    assert 1 < len(found.measured.overlap.clusters) < 36
    supports = [support for latent in found.latents for support in latent.support]
    assert supports
    assert all(support.difference * support.contribution > 0 for support in supports)
    assert all(support.prompt and support.chosen != support.rejected for support in supports)


def test_the_reports_are_of_one_piece(
    organism: tuple[Any, Any, dspa.SteeringPolicy, PolicyAudit], tmp_path: Path
) -> None:
    import json

    *_, found = organism
    record = json.loads(found.to_json())
    assert [latent["latent"] for latent in record["latents"]] == [latent.latent for latent in found.latents]
    assert len(found.to_json()) < 2**21
    text, markdown = str(found), found.to_markdown()
    for title in ("The policy", "The map", "Steering", "Classes", "Output latents", "Edit lists", "Prompts"):
        assert title in text
        assert f"## {title}\n" in markdown
    assert max(map(len, text.splitlines())) <= 160
