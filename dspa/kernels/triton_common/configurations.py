"""Block sizes of the Triton kernels by architecture and SAE shape (d_model, d_sae).

Written by benchmarks/tune_triton.py where a GPU was at hand. These were chosen by hand among a few that spill no
register on their architecture; only those of sm_90 have been measured, against a few others.
"""

# latents, tokens, model, warps, stages: see dspa.kernels.triton_common.table.Tile
Sizes = tuple[int, int, int, int, int]

# For each shape, first the sizes for plain products, then those for products in parts.
TOKEN_STEP: dict[str, dict[tuple[int, int], tuple[Sizes, Sizes]]] = {
    "sm_80": {
        (2304, 16384): ((64, 16, 64, 4, 4), (128, 16, 32, 8, 4)),
        (3584, 65536): ((128, 16, 64, 8, 3), (128, 16, 32, 8, 4)),
    },
    "sm_90": {
        (2304, 16384): ((64, 16, 128, 4, 4), (128, 16, 64, 8, 4)),
        (3584, 65536): ((64, 16, 128, 4, 4), (128, 16, 64, 8, 4)),
    },
    "sm_100": {
        (2304, 16384): ((64, 16, 64, 8, 4), (64, 16, 64, 4, 4)),
    },
    "gfx942": {
        (2304, 16384): ((64, 16, 128, 4, 2), (64, 16, 64, 4, 2)),
        (3584, 65536): ((128, 16, 64, 8, 2), (64, 16, 64, 4, 2)),
    },
}
ENCODE_DENSITY: dict[str, dict[tuple[int, int], tuple[Sizes, Sizes]]] = {
    "sm_80": {(2304, 16384): ((128, 128, 64, 8, 3), (64, 64, 32, 8, 3))},
    "sm_90": {(2304, 16384): ((256, 128, 64, 8, 3), (128, 64, 64, 8, 3))},
    "sm_100": {(2304, 16384): ((128, 128, 64, 8, 3), (64, 64, 32, 8, 3))},
    "gfx942": {(2304, 16384): ((128, 128, 64, 8, 2), (64, 64, 32, 8, 2))},
}
