"""Shapes of the CUDA backend's launches, which do not change what it computes, to be measured side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

Result = TypeVar("Result")
DENSITY_BYTES = 64 << 20


@dataclass(frozen=True)
class LaunchShape:
    """How the kernels are launched; by default as they are where nobody asked for anything.

    Attributes:
        threads: of a block of token_step.
        cluster: blocks of a cluster of token_step.
        bulk_copies: whether the copy engine brings the weights to token_step.
        warpgroup_products: whether encode_density multiplies by warpgroups, where the GPU can.
        early_launch: whether token_step begins, and prefetches weights, while the kernel before it ends.
    """

    threads: int = 256
    cluster: int = 1
    bulk_copies: bool = False
    warpgroup_products: bool = True
    early_launch: bool = False

    def __str__(self) -> str:
        words = [f"{self.threads} threads"]
        words += [f"clusters of {self.cluster}"] if self.cluster > 1 else []
        words += ["bulk copies"] if self.bulk_copies else []
        words += [] if self.warpgroup_products else ["by warps"]
        words += ["begun early"] if self.early_launch else []
        return ", ".join(words)

    def around(self, library: Any, run: Callable[[], Result]) -> Callable[[], Result]:
        """The same call with launches of this shape, which others after it do not have.

        Args:
            library: where the operations are, `torch.ops.dspa` say.
            run: launches kernels.
        """

        def shaped() -> Result:
            self._set(library)
            try:
                return run()
            finally:
                LaunchShape()._set(library)

        return shaped

    def _set(self, library: Any) -> None:
        library.set_cuda_tuning(
            self.threads, self.cluster, DENSITY_BYTES, self.warpgroup_products, self.bulk_copies, self.early_launch
        )


def of_token_step(library: Any) -> list[LaunchShape]:
    """Every shape that this GPU can launch, the default first."""
    on_sm_90 = library.has_bulk_copies()
    return [
        LaunchShape(threads, cluster, bulk_copies, early_launch=early)
        for bulk_copies in ((False, True) if on_sm_90 else (False,))
        for cluster, early in (((1, False), (1, True), (2, False), (4, False)) if on_sm_90 else ((1, False),))
        for threads in (256, 128)
    ]
