"""The model of a launch: what has to hold whatever its constants, and the goals that it sets."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
pytest.importorskip("triton")

from launch_model import H100, Mode, predict, resident

from dspa.kernels.triton_common.table import tile_of

SHAPES = [(2304, 16384), (3584, 16384), (4096, 65536), (3584, 131072)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("mode", ["dense", "lazy"])
def test_a_launch_takes_longer_than_its_floor(shape: tuple[int, int], batch: int, mode: Mode) -> None:
    predicted = predict(H100, *shape, batch, mode)
    assert 0 < predicted.reading < predicted.total
    assert predicted.floor < predicted.total


@pytest.mark.parametrize("shape", SHAPES)
def test_what_makes_a_launch_slower(shape: tuple[int, int]) -> None:
    one = predict(H100, *shape, 1, "dense").total
    assert predict(H100, *shape, 1, "lazy").total > one
    assert predict(H100, *shape, 64, "dense").total > one
    assert predict(replace(H100, load_us=2 * H100.load_us), *shape, 1, "dense").total > one
    assert predict(replace(H100, read_bytes_per_us=H100.read_bytes_per_us / 2), *shape, 1, "dense").total > 1.5 * one


@pytest.mark.parametrize("shape", SHAPES)
def test_the_programs_of_the_table_keep_the_memory_busy(shape: tuple[int, int]) -> None:
    """As many bytes asked for as arrive in the time of one load: else latency, and not the memory, sets the pace."""
    tile = tile_of("token_step", H100.architecture, *shape, False)
    in_flight = H100.multiprocessors * resident(H100, tile) * (tile.stages - 1) * 2 * tile.model * tile.latents
    assert in_flight >= H100.read_bytes_per_us * H100.load_us


@pytest.mark.parametrize(
    ("shape", "least"), [((2304, 16384), 0.85), ((4096, 65536), 0.92), ((3584, 131072), 0.92)], ids=str
)
def test_dense_is_near_its_floor(shape: tuple[int, int], least: float) -> None:
    """The floor is a launch that only reads. Of the time of the bytes alone it is 0.72 at 2304 x 16384, where a launch
    that only reads is at 0.85."""
    assert predict(H100, *shape, 1, "dense").share_of_floor >= least


@pytest.mark.parametrize(
    ("shape", "most"), [((2304, 16384), 1.2), ((4096, 65536), 1.1), ((3584, 131072), 1.1)], ids=str
)
def test_lazy_that_needs_the_maximum_is_near_dense(shape: tuple[int, int], most: float) -> None:
    """The goal is 1.1; at 2304 x 16384 the 6 us of the preparation are more than that. To read meanwhile makes a token
    that needs the maximum faster, and those that do not, which are more, slower by as much (docs/kernels.md)."""
    assert predict(H100, *shape, 1, "lazy").total <= most * predict(H100, *shape, 1, "dense").total


@pytest.mark.parametrize("shape", SHAPES)
def test_64_rows_take_little_longer_than_one(shape: tuple[int, int]) -> None:
    assert predict(H100, *shape, 64, "dense").total <= 1.25 * predict(H100, *shape, 1, "dense").total
