"""What notebooks and terminals show of the objects: short, and a picture where there is one."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tiny_collection as tiny
import torch
from tiny_models import prompts, tiny_model, tiny_policy, tiny_tokenizer

import dspa
from dspa.methods.steering_policy import SteeringPolicy
from dspa.online.steering import steer


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> dspa.SteeringTrace:
    """Of a model that was loaded from a folder with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with steer(model, {"kind": tiny_policy(model, dtype=torch.float32)}, select="kind", trace=True) as steering:
        model.generate(torch.tensor(prompts((5,))), max_new_tokens=4, do_sample=False)
    return steering.trace()


def test_a_plot_is_a_picture_in_a_fresh_notebook(traced: dspa.SteeringTrace) -> None:
    """What IPython asks an object for, without pyplot or a backend having been imported."""
    pytest.importorskip("matplotlib", reason="in dspa[plot]")
    figure: Any = traced.plot()
    assert figure._repr_png_().startswith(b"\x89PNG")
    (axes,) = (axes for axes in figure.axes if axes.get_xlabel() == "token")
    assert axes.get_title(loc="left") == "Edits of call 0, row 0: policy kind"


def test_a_plot_takes_the_models_own_tokenizer(traced: dspa.SteeringTrace) -> None:
    pytest.importorskip("matplotlib", reason="in dspa[plot]")
    words = [str(tiny_tokenizer().decode([token.token_id or 0])) for token in traced.sequences[0].tokens]

    def labels(trace: dspa.SteeringTrace) -> list[str]:
        axes: Any = trace.plot().axes[0]
        return [label.get_text() for label in axes.get_xticklabels()]

    assert labels(traced) == words
    ids = [str(token.token_id) for token in traced.sequences[0].tokens]
    assert labels(replace(traced, model_name=None)) == ids
    assert labels(replace(traced, model_name="no/such/model")) == ids


def test_triples_are_short() -> None:
    triples = tiny.tiny_triples(300, seed=1)
    assert repr(triples).startswith("PreferenceTriples(300 triples, ")
    assert len(repr(triples)) < 100
    page = triples._repr_html_()
    assert "<th>triples</th><td>300</td>" in page
    assert len(page) < 1000
    assert "0 triples" in repr(triples[:0])
    assert triples[:0]._repr_html_()


def test_a_map_is_short() -> None:
    model = tiny_model("llama")
    fitted = tiny_policy(model).conditional_map
    assert repr(fitted) == "ConditionalDifferenceMap(40 x 56, 2240 entries, 10 triples, layers 1 -> 2)"
    page = fitted._repr_html_()
    assert "2240 in 56 columns" in page
    assert len(page) < 1000


def test_a_policy_folder_has_its_card(tmp_path: Path) -> None:
    policy = tiny_policy(tiny_model("llama"))
    source = replace(policy.output_sae.metadata, release="some-release", sae_id="layer_2")
    policy = replace(policy, output_sae=replace(policy.output_sae, metadata=source))
    card = policy.save_pretrained(tmp_path / "mine") / "README.md"
    assert "# path/of/this/policy" in card.read_text()
    assert "after layer 2: some-release layer_2" in card.read_text()
    replace(policy, alpha=0.125).save_pretrained(tmp_path / "mine")
    assert "| alpha | 0.125 |" in card.read_text()
    card.write_text("# my own words")
    policy.save_pretrained(tmp_path / "mine")
    assert card.read_text() == "# my own words"
    assert SteeringPolicy.from_pretrained(tmp_path / "mine").alpha == policy.alpha


def test_latents_name_their_layer_with_one_policy_too() -> None:
    model = tiny_model("llama")
    with steer(model, tiny_policy(model)) as steering:
        model.generate(torch.tensor(prompts((5,))), max_new_tokens=4)  # type: ignore[operator]
    summary = steering.summary()
    record = json.loads(json.dumps(asdict(summary)))
    assert {latent["layer"] for latent in record["latents"]} == {2}
    assert f"latents edited (tokens): {summary.latents[0].latent} (" in str(summary)


def test_names_that_docstrings_mention_are_exported() -> None:
    assert dspa.FitOptions().gate_percentile == 90
    assert dspa.SaeMetadata().layer is None
