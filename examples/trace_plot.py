"""Every edit of one response: as a table in the terminal, and as a heat map of tokens and latents.

`first_policy.py` writes the policy. The heat map needs matplotlib: pip install 'dspa[plot]'.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import dspa
from dspa import organism


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(organism.DATA / "model"), help="model folder or hub id")
    parser.add_argument("--policy", default="runs/policy", help="policy folder or hub id")
    parser.add_argument("--prompt", default="My snowball is broken. How do I fix it?")
    parser.add_argument("--png", type=Path, default=Path("runs/trace.png"), help="where the heat map goes")
    options = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    policy = dspa.SteeringPolicy.from_pretrained(options.policy)

    chat = [{"role": "user", "content": options.prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with dspa.steer(model, policy, trace=True) as steering:
        model.generate(**inputs, do_sample=False, max_new_tokens=64)
    trace = steering.trace()
    print(trace)

    changed = max(trace.sequences[0].tokens, key=lambda token: len(token.edits))
    print(f"most latents edited: {len(changed.edits)}, at position {changed.position}")
    options.png.parent.mkdir(parents=True, exist_ok=True)
    trace.plot(tokenizer=tokenizer, path=options.png)
    print(f"heat map: {options.png}")


if __name__ == "__main__":
    main()
