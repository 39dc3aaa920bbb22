"""Which backend was the fastest on which GPU, by operation and SAE: d_model, d_sae, whether it is top-k.

Written by benchmarks/choose_backends.py from reports of `make gpu`.
"""

FASTEST: dict[str, dict[str, dict[tuple[int, int, bool], str]]] = {
    "sm_90": {
        "token_step": {
            (2304, 16384, False): "triton",
            (2304, 16384, True): "triton",
            (2304, 65536, False): "triton",
            (2304, 65536, True): "triton",
            (2304, 131072, False): "triton",
            (3584, 16384, False): "triton",
            (3584, 65536, False): "triton",
            (3584, 131072, False): "triton",
            (4096, 16384, False): "triton",
            (4096, 65536, False): "triton",
            (4096, 131072, False): "triton",
        },
        "encode_density": {
            (2304, 16384, False): "triton",
            (3584, 16384, False): "triton",
            (4096, 16384, False): "triton",
        },
    },
}
