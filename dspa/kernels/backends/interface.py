"""What a backend is: its operations, and the calls that it serves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from dspa.kernels.adapter_weights import AdapterWeights
from dspa.kernels.types import CsrMap, EditKind, EditList, TokenStats
from dspa.sae.weights import SaeWeights

OperationName = Literal["encode_density", "lookup", "token_step", "token_step_with_lookup", "adapter_step"]
StepMode = Literal["dense", "lazy", "screened"]
AdapterMode = Literal["dense", "screened"]


class EncodeDensity(Protocol):
    def __call__(self, hidden: Tensor, offsets: Tensor, sae: SaeWeights) -> Tensor: ...


class Lookup(Protocol):
    def __call__(
        self, density: Tensor, conditional_map: CsrMap, k_prompt: int, k_diff: int, edit: EditKind, sign_guard: bool
    ) -> EditList: ...


class TokenStep(Protocol):
    def __call__(
        self,
        hidden: Tensor,
        sae: SaeWeights,
        edits: EditList,
        alpha: float | Tensor,
        enabled: Tensor | None,
        stats: TokenStats | None,
        mode: StepMode | None,
    ) -> None: ...


class BoundStep(Protocol):
    """A token step whose SAE, lists, strength and mode are laid out for the kernel already."""

    def __call__(self, hidden: Tensor, enabled: Tensor | None, stats: TokenStats | None) -> bool:
        """Runs it on operands that were checked. False, and nothing is done, if what was laid out no longer holds."""
        ...


class BindStep(Protocol):
    def __call__(
        self, hidden: Tensor, sae: SaeWeights, edits: EditList, alpha: float | Tensor, mode: StepMode | None
    ) -> BoundStep | None:
        """Lays a step out for hidden states like `hidden`, which may be run on; None where that cannot be done."""
        ...


class TokenStepWithLookup(Protocol):
    def __call__(
        self,
        hidden: Tensor,
        sae: SaeWeights,
        density: Tensor,
        conditional_map: CsrMap,
        k_prompt: int,
        k_diff: int,
        edit: EditKind,
        sign_guard: bool,
        alpha: float | Tensor,
        enabled: Tensor | None,
        stats: TokenStats | None,
        mode: StepMode | None,
    ) -> EditList: ...


class AdapterStep(Protocol):
    def __call__(
        self,
        hidden: Tensor,
        sae: SaeWeights,
        adapter: AdapterWeights,
        enabled: Tensor | None,
        stats: TokenStats | None,
        steering_fraction: float | None,
        mode: AdapterMode | None,
    ) -> None: ...


class Cannot(Protocol):
    def __call__(self, operation: OperationName, sae: SaeWeights) -> str | None:
        """Why a call may be refused when it is launched, in a few words; None if it is not. Does not depend on the
        batch, or its rows' bits would."""
        ...


@dataclass(frozen=True)
class Serves:
    """The calls that a backend serves; None stands for no restriction.

    Attributes:
        devices: types of the devices on which all tensors of a call must be; with it, they must be on one device.
        encode_density, lookup, token_step, token_step_with_lookup, adapter_step: the dtypes of tensors that each
            operation takes.
        adapter_ranks: whether its adapter step can rank all latents of a row.
    """

    devices: tuple[str, ...] | None = None
    encode_density: tuple[torch.dtype, ...] | None = None
    lookup: tuple[torch.dtype, ...] | None = None
    token_step: tuple[torch.dtype, ...] | None = None
    token_step_with_lookup: tuple[torch.dtype, ...] | None = None
    adapter_step: tuple[torch.dtype, ...] | None = None
    adapter_ranks: bool = True


def refusal(
    serves: Serves,
    operation: OperationName,
    tensors: tuple[Tensor, ...],
    sae: SaeWeights | None,
    *,
    ranks_all: bool = False,
) -> str | None:
    """Why a backend cannot serve a call, in a few words, or None if it can.

    Args:
        serves: the calls that it serves.
        operation: the operation to call.
        tensors: the tensors of the call whose device and dtype matter.
        sae: the SAE of the call, where there is one; its `W_enc` counts as another tensor.
        ranks_all: whether an adapter step has to rank all latents of a row.
    """
    if ranks_all and not serves.adapter_ranks:
        return "it has to rank all latents of a row"
    dtypes: tuple[torch.dtype, ...] | None = getattr(serves, operation)
    for tensor in tensors if sae is None else (*tensors, sae.W_enc):
        if serves.devices is not None:
            if tensor.device.type not in serves.devices:
                return f"a tensor is on {tensor.device}"
            if tensor.device != tensors[0].device:
                return f"a tensor is on {tensor.device}, another on {tensors[0].device}"
        if dtypes is not None and tensor.dtype not in dtypes:
            return f"a tensor is {tensor.dtype}"
    return None


@dataclass(frozen=True)
class Operations:
    """The operations of one backend, once it is loaded.

    Attributes:
        encode_density, lookup, token_step: the three operations of DSPA.
        token_step_with_lookup: both in one step, where the backend has that.
        adapter_step: the operation of FSRL, where the backend has that.
        devices: replaces `Serves.devices` where only loading decides (Triton's interpreter runs on the CPU).
        cannot: why "auto" should go on to the next backend for an SAE, beyond `Serves`; see `Cannot`.
        bind_step: `token_step` without the work that is the same for every token, where the backend has that.
    """

    encode_density: EncodeDensity
    lookup: Lookup
    token_step: TokenStep
    token_step_with_lookup: TokenStepWithLookup | None = None
    adapter_step: AdapterStep | None = None
    devices: tuple[str, ...] | None = None
    bind_step: BindStep | None = None
    cannot: Cannot | None = None


@dataclass(frozen=True)
class Backend:
    """A backend by name.

    Attributes:
        name: its name in `backend=` and DSPA_BACKEND.
        device_types: the devices for which "auto" may choose it.
        load: imports or builds its operations; raises BackendUnavailableError with the reason where that fails.
        serves: the calls that it serves; "auto" goes on to the next backend for others.
    """

    name: str
    device_types: tuple[str, ...]
    load: Callable[[], Operations]
    serves: Serves = Serves()
