"""One batch whose rows follow different policies: the saved one, a stronger one, a static list, and no policy.

All of them share one SAE, so a single kernel call edits all rows. `first_policy.py` writes the policy.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import dspa
from dspa import organism


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(organism.DATA / "model"), help="model folder or hub id")
    parser.add_argument("--policy", default="runs/policy", help="policy folder or hub id")
    parser.add_argument("--prompt", default="My snowball is broken. How do I fix it?")
    options = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    published = dspa.SteeringPolicy.from_pretrained(options.policy)
    policies = {
        "published": published,
        "stronger": dspa.SteeringPolicy.from_pretrained(options.policy, edit="both", alpha=0.3),
        "static": dspa.StaticPolicy.from_mean_difference(published),
    }
    rows = ["published", "stronger", "static", None]

    chats = [[{"role": "user", "content": options.prompt}] for _ in rows]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
    )
    with dspa.steer(model, policies, select=rows) as steering:
        output = model.generate(**inputs, do_sample=False, max_new_tokens=64)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for name, text in zip(rows, texts, strict=True):
        print(f"{name or 'unsteered'}: {text}")
    print(steering.summary())


if __name__ == "__main__":
    main()
