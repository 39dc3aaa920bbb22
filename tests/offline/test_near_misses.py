"""What is almost what `collect` expects: accepted where it is clear what is meant, else refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_collection as tiny

import dspa
from dspa.errors import InvalidInputError
from dspa.offline.collection import collect
from dspa.offline.preferences import load_preferences
from dspa.offline.triples import PreferenceTriples
from dspa.online.steering import steer

SAES = {"input_sae": tiny.tiny_sae(tiny.D_SAE_IN, 1), "output_sae": tiny.tiny_sae(tiny.D_SAE_OUT, 2)}
LAYERS = {"input_layer": 1, "output_layer": 2}
TRIPLES = tiny.tiny_triples(7, seed=4)


def run(out: Path, triples: Any = TRIPLES, model: Any = None, **changes: Any) -> Any:
    return collect(model or tiny.tiny_model(), None, triples, out=out, **{**SAES, **LAYERS, **changes})


@pytest.mark.parametrize("chosen", [lambda t: t[2:5], lambda t: list(t)[2:5], lambda t: (t[2], t[3], t[4])])
def test_a_slice_or_a_list_of_triples(chosen: Any, tmp_path: Path) -> None:
    store = run(tmp_path, chosen(TRIPLES))
    assert store.run.triples == TRIPLES[2:5].fingerprint()
    assert store.run.uncounted_token_ids == TRIPLES.uncounted_token_ids


def test_triples_of_different_rules(tmp_path: Path) -> None:
    other = PreferenceTriples(TRIPLES.triples, TRIPLES.uncounted_token_ids, count_bos=not TRIPLES.count_bos)
    with pytest.raises(InvalidInputError, match="not alike, by which rules"):
        run(tmp_path, [TRIPLES[0], other[1]])


@pytest.mark.parametrize("triples", ["prefs.jsonl", Path("prefs.jsonl"), [], [{"chosen": "a"}], None, 3], ids=str)
def test_other_things_for_triples(triples: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"the triples are a \w+; expected what load_preferences"):
        run(tmp_path, triples)


@pytest.mark.parametrize("which", ["input", "output"])
@pytest.mark.parametrize(
    "sae", ["some/folder", Path("some/folder"), None, object()], ids=["str", "Path", "None", "object"]
)
def test_other_things_for_saes(which: str, sae: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=f"the {which} SAE is a .*; expected a SparseAutoencoder"):
        run(tmp_path, **{f"{which}_sae": sae})


def test_live_objects_of_sae_lens(tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens", reason="in dspa[sae]")
    config = sae_lens.StandardSAEConfig(d_in=tiny.D_MODEL, d_sae=24, apply_b_dec_to_input=False)
    live = sae_lens.StandardSAE(config)
    ours = dspa.SparseAutoencoder.from_sae_lens(live)
    store = run(tmp_path, input_sae=live, output_sae=live)
    assert store.run.input_sae == ours.encoder_only().fingerprint()
    policy = dspa.SteeringPolicy(dspa.ConditionalDifferenceMap.fit(store), live, live, k_prompt=4, k_diff=4)
    assert policy.input_sae.fingerprint() == ours.fingerprint()


def test_a_steered_model(tmp_path: Path) -> None:
    model = tiny.tiny_model()
    vector = dspa.VectorPolicy(tiny.torch.ones(tiny.D_MODEL).double(), layer=1)
    with steer(model, vector), pytest.raises(InvalidInputError, match="the model is steered"):
        run(tmp_path, model=model)
    run(tmp_path, model=model)


def test_other_things_for_a_model(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="has no transformers configuration; pass a transformers model"):
        run(tmp_path, model="google/gemma-2-2b")


# ------------------------------------------------------------------------------------------- rows of plain strings


ROW = {"prompt": "w10 w20", "chosen": "w30 w31", "rejected": "w40"}


@pytest.fixture
def tokenizer() -> Any:
    from tiny_models import tiny_tokenizer

    found = tiny_tokenizer()
    template = str(found.chat_template)
    found.chat_template = template.replace("{% endfor %}", "{{ ' <eos>' if message.role == 'assistant' }}{% endfor %}")
    return found


@pytest.mark.filterwarnings("error")
def test_the_chat_template_for_strings(tokenizer: Any) -> None:
    (triple,) = load_preferences([ROW], tokenizer, chat=True)
    messages = [{"role": "user", "content": ROW["prompt"]}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(triple.prompt) == expected
    conversation = [
        {key: [{"role": role, "content": ROW[key]}] for key, role in (("prompt", "user"), ("chosen", "assistant"))}
        | {"rejected": [{"role": "assistant", "content": ROW["rejected"]}]}
    ]
    (same,) = load_preferences(conversation, tokenizer)
    assert (triple.prompt, triple.chosen, triple.rejected) == (same.prompt, same.chosen, same.rejected)
    (plain,) = load_preferences([ROW], tokenizer, chat=False)
    assert list(plain.prompt) == tokenizer("w10 w20")["input_ids"]


def test_without_a_choice_it_is_said(tokenizer: Any) -> None:
    with pytest.warns(
        UserWarning, match=r"1 rows of .* were read without the chat template, which dspa generate applies"
    ):
        load_preferences([ROW], tokenizer)


def test_strings_that_are_no_conversation(tokenizer: Any) -> None:
    row = {"chosen": "w10 w20", "rejected": "w10 w21"}
    with pytest.raises(InvalidInputError, match="strings without a prompt column cannot be made a conversation"):
        load_preferences([row], tokenizer, chat=True)
