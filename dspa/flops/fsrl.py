"""What FSRL's adapter costs by the form in which it is computed: as in its repository, and as here.

Matrices are `d_model * d_sae`. `A` latents of a token fire, `A-` of them with a negative `v`, whose activation the clip
needs (docs/method.md, section 6).
"""

from __future__ import annotations

from dataclasses import dataclass

from dspa.flops.alignment import AlignmentAssumptions
from dspa.flops.inference import InferenceAssumptions
from dspa.flops.quantities import Work
from dspa.flops.shapes import ModelShape

REPOSITORY, DENSE, DELTA, SCREENED = (
    "encode, adapter, two decodes",
    "the same fused, f of all latents",
    "adapter_step, dense",
    "adapter_step, screened",
)
AUTOGRAD, SPARSE = "plain autograd", "gradients of what fires"
INDEX_AND_VALUE = 8  # bytes kept of a latent that fires: which one, and its v
DENSE_TENSORS = 5  # `[tokens, d_sae]` that plain autograd keeps: y, |y| - theta, v, f + v, its sign


@dataclass(frozen=True)
class FsrlToken:
    """The cost of the adapter at one generated token, beside the model's own.

    Attributes:
        form: how it is computed.
        reads: the matrices and rows it reads.
        work: FLOPs and bytes.
    """

    form: str
    reads: str
    work: Work


@dataclass(frozen=True)
class FsrlTraining:
    """The cost of SAE and adapter at one token of training, and what is kept of it for the backward pass.

    Attributes:
        form: how gradients are computed.
        flops: forward and backward.
        kept_bytes: activations.
    """

    form: str
    flops: float
    kept_bytes: float


def fsrl_tokens(shape: ModelShape, a: AlignmentAssumptions, i: InferenceAssumptions) -> tuple[FsrlToken, ...]:
    """Every form of the adapter at one token of one row. The rows of a batch share the matrices and not the rows that
    fire."""
    d_model, d_sae = shape.d_model, a.fsrl_d_sae
    matrix = Work(2.0 * d_model * d_sae, d_sae * (d_model * i.sae_bytes + 8) / i.batch)  # with bias and threshold
    row = Work(2.0 * d_model, d_model * i.sae_bytes)
    decoded, falling = _times(row, a.fsrl_active), _times(row, a.fsrl_falling)
    codes = d_sae * (d_model * i.screen_bytes + 20) / i.batch  # their scale and bounds as well
    rescored = _times(row, i.survivors * d_sae)
    screened = Work(matrix.flops + rescored.flops, codes + rescored.bytes)
    return (
        FsrlToken(REPOSITORY, "W_enc, W_a, W_dec twice", _times(matrix, 4)),
        FsrlToken(DENSE, "W_enc, W_a, A rows of W_dec", _sum(_times(matrix, 2), decoded)),
        FsrlToken(DELTA, "W_a, A rows of W_dec, A- of W_enc", _sum(matrix, decoded, falling)),
        FsrlToken(SCREENED, "codes of W_a, the rows they leave open, the same", _sum(screened, decoded, falling)),
    )


def fsrl_token(shape: ModelShape, a: AlignmentAssumptions) -> float:
    """FLOPs that FSRL adds to a generated token, in the form that needs the fewest: `adapter_step`, dense."""
    return next(token.work.flops for token in fsrl_tokens(shape, a, InferenceAssumptions()) if token.form == DELTA)


def fsrl_training(shape: ModelShape, a: AlignmentAssumptions, i: InferenceAssumptions) -> tuple[FsrlTraining, ...]:
    """Both ways to train the adapter, once it is sparse: at the beginning nearly all latents fire."""
    d_model, d_sae = shape.d_model, a.fsrl_d_sae
    matrix, row = 2.0 * d_model * d_sae, 2.0 * d_model
    rows = a.fsrl_active + a.fsrl_falling  # decoded, and encoded for the clip
    return (
        # Forward: encode, adapter, decode. Backward: the decoder's input and the adapter's weights.
        FsrlTraining(AUTOGRAD, 5 * matrix, DENSE_TENSORS * d_sae * i.sae_bytes),
        # Backward: products with decoder rows, and the outer products of what fires.
        FsrlTraining(
            SPARSE, matrix + row * (rows + 2 * a.fsrl_active), a.fsrl_active * INDEX_AND_VALUE + d_model * i.sae_bytes
        ),
    )


def _times(work: Work, factor: float) -> Work:
    return Work(work.flops * factor, work.bytes * factor)


def _sum(*works: Work) -> Work:
    return Work(sum(work.flops for work in works), sum(work.bytes for work in works))
