"""Which backend was the fastest on which GPU, by operation and SAE: d_model, d_sae, whether it is top-k.

Written by benchmarks/choose_backends.py from reports of `make gpu`. There is none yet, so nothing stands here.
"""

FASTEST: dict[str, dict[str, dict[tuple[int, int, bool], str]]] = {}
