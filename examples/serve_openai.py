"""Serving: starts `dspa serve` on a free port, and queries it with the openai client, unsteered and steered.

`first_policy.py` writes the policy. Needs the server's packages: pip install 'dspa[serve]'.
"""

import argparse
import socket
import subprocess
import sys

import openai

from dspa import organism


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(organism.DATA / "model"), help="model folder or hub id")
    parser.add_argument("--policy", default="runs/policy", help="policy folder or hub id")
    parser.add_argument("--prompt", default="My snowball is broken. How do I fix it?")
    options = parser.parse_args()

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", "from dspa.cli import main; main()", "serve", "--model", options.model]
    command += ["--policy", f"kind={options.policy}", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        started = server.stdout.readline()  # one line once the model is loaded, none if the server stops
        if not started:
            raise SystemExit(f"the server stopped with exit code {server.wait()}")
        print(started.strip())
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=10)
        messages = [{"role": "user", "content": options.prompt}]
        for name in (options.model, f"{options.model}@kind"):
            answer = client.chat.completions.create(model=name, messages=messages, max_tokens=64, temperature=0)
            print(f"{name.rpartition('/')[2]}: {answer.choices[0].message.content}")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
