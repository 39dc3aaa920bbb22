"""Run by the Python of an environment with dspa installed: the CPU kernels are there and agree with the reference."""

from __future__ import annotations

import torch

import dspa
from dspa.kernels import EditList, SaeWeights, available, token_step

# Small integers and a power of two: every sum is exact in float32, in whichever order it is taken.
D_MODEL, D_SAE, BATCH, ALPHA = 40, 96, 3, 0.5


def integers(rows: int, columns: int, step: int) -> torch.Tensor:
    """`[rows, columns]` float32, from -3 to 3."""
    return (torch.arange(rows * columns).view(rows, columns) * step % 7 - 3).float()


def edited(backend: str) -> torch.Tensor:
    """`[BATCH, D_MODEL]`: hidden states after one step of a backend."""
    sae = SaeWeights(
        W_enc=integers(D_SAE, D_MODEL, 5),
        b_enc=torch.zeros(D_SAE),
        threshold=torch.zeros(D_SAE),
        activation="relu",
        W_dec=integers(D_SAE, D_MODEL, 3),
    )
    hidden = integers(BATCH, D_MODEL, 4)
    everything = list(range(D_SAE))
    edits = EditList.from_lists(augment=[everything[::2]] * BATCH, ablate=[everything[1::2]] * BATCH)
    token_step(hidden, sae, edits, ALPHA, backend=backend)
    return hidden


def main() -> None:
    answer = available()["cpu"]
    assert answer == "available", answer
    assert torch.equal(edited("cpu"), edited("reference"))
    assert not torch.equal(edited("cpu"), integers(BATCH, D_MODEL, 4)), "nothing was edited"
    print(f"dspa {dspa.__version__} from {dspa.__file__}: cpu kernels available")


if __name__ == "__main__":
    main()
