"""A first policy: collect activation densities, fit the map, save the policy, and generate with and without it.

Without arguments it uses the model, the SAEs and the preference triples that ship with the package. The other examples
read the policy folder that it writes.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import dspa
from dspa import organism


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(organism.DATA / "model"), help="model folder or hub id")
    parser.add_argument("--input-sae", default=str(organism.sae_folder("input")), help="SAE for prompts")
    parser.add_argument("--output-sae", default=str(organism.sae_folder("output")), help="SAE to edit with")
    parser.add_argument("--preferences", default=str(organism.triples_file()), help="preference triples")
    parser.add_argument("--triples", type=int, default=250, help="how many of them")
    parser.add_argument("--prompt", default="My snowball is broken. How do I fix it?")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of densities/ and policy/")
    options = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    input_sae = dspa.SparseAutoencoder.from_sae_lens(options.input_sae)
    output_sae = dspa.SparseAutoencoder.from_sae_lens(options.output_sae)

    triples = dspa.load_preferences(options.preferences, tokenizer, limit=options.triples)
    densities = dspa.collect(
        model, tokenizer, triples, input_sae=input_sae, output_sae=output_sae, out=options.out / "densities"
    )
    conditional_map = dspa.ConditionalDifferenceMap.fit(densities, gate_percentile=90)
    policy = dspa.SteeringPolicy(conditional_map, input_sae, output_sae, k_prompt=32, k_diff=16, alpha=0.2)
    print(f"policy: {policy.save_pretrained(options.out / 'policy')}")

    chat = [{"role": "user", "content": options.prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    width = inputs["input_ids"].shape[1]
    unsteered = model.generate(**inputs, do_sample=False, max_new_tokens=64)
    with dspa.steer(model, policy) as steering:
        steered = model.generate(**inputs, do_sample=False, max_new_tokens=64)
    print(f"unsteered: {tokenizer.decode(unsteered[0, width:], skip_special_tokens=True)}")
    print(f"steered: {tokenizer.decode(steered[0, width:], skip_special_tokens=True)}")
    print(steering.summary())


if __name__ == "__main__":
    main()
