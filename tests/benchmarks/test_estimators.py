"""The comparison of estimators: it measures what is missing and no more, and its report counts by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import estimators
import estimators_report as report
import numpy as np
import pytest

from dspa.organism import DATA

QUICK: dict[str, Any] = {"prompts": 14, "validation_prompts": 6, "neutral_texts": 2, "data": [DATA], "seed": 0}


@pytest.mark.long
@pytest.mark.usefixtures("short_responses")
def test_a_run_measures_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = estimators.load_organism
    monkeypatch.setattr(estimators, "STRENGTHS", estimators.STRENGTHS[::3])
    monkeypatch.setattr(
        estimators,
        "load_organism",
        lambda options, *rest, **more: everything(type(options)(data=options.data, triples=24), *rest, **more),
    )
    out = tmp_path / "estimators_seed0.json"
    estimators.main(out=[out], triples="12,25", draws=1, **QUICK)
    first = json.loads(out.read_text())
    assert list(first["draws"]) == ["12/0"]  # there are no 25
    names = [name for name, _ in report.ROWS]
    assert all(set(draw) == set(names) for draw in first["draws"].values())
    assert all(len(report.gains(row)) == 14 for draw in first["draws"].values() for row in draw.values())
    assert "/" not in json.dumps(first["setup"])  # no path of the machine

    altered = json.loads(out.read_text())
    del altered["draws"]["12/0"]["ridge, control"]
    kept = altered["draws"]["12/0"]["ridge, chosen"]
    kept["gain"] = 77.0
    out.write_text(json.dumps(altered))
    estimators.main(out=[out], triples="12", draws=1, **QUICK)
    second = json.loads(out.read_text())
    assert second["draws"]["12/0"].pop("ridge, chosen") == kept
    del first["draws"]["12/0"]["ridge, chosen"]
    assert second["draws"]["12/0"] == first["draws"]["12/0"]
    assert second["ceiling"] == first["ceiling"]

    capsys.readouterr()
    report.main([str(out), "--png", str(tmp_path / "gains.png")])
    assert "| setting | N = 12 (1) |" in capsys.readouterr().out
    assert (tmp_path / "gains.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="pass another --out"):
        estimators.main(out=[out], triples="12", draws=1, **{**QUICK, "neutral_texts": 3})
    with pytest.raises(SystemExit, match="there are 1 --out and 2 --data"):
        estimators.main(out=[out], triples="12", draws=1, **{**QUICK, "data": [DATA, DATA]})


def row(gains: list[float], **more: Any) -> dict[str, Any]:
    return {"gains": " ".join(map(str, gains)), "gain": float(np.mean(gains)), **more}


def draw(mean: list[float], ridge: list[float]) -> dict[str, Any]:
    rows: dict[str, Any] = {name: row([0.0] * 4, malformed=0.0, perplexity=5.0) for name, _ in report.ROWS}
    rows["mean_difference, published"] = row(mean, malformed=0.0, perplexity=5.0)
    for name, gains in (("mean_difference", mean), ("ridge", ridge)):
        rows[f"{name}, chosen"] = row(gains, malformed=0.1, perplexity=5.0, strength="both 0.3", agreement=gains[0])
    return rows


CEILING = {"ceiling": {"ablate 0.2": row([1.0, 2, 3, 4]), "both 0.3": row([2.0, 4, 8, 2])}}


def test_intervals_are_of_prompts_and_of_draws() -> None:
    samples = np.array([[1.0, 3, 2, 2], [4, 4, 3, 5], [0, 2, 1, 1]])
    of_prompts = 1.959964**2 * np.var([5 / 3, 3, 2, 8 / 3], ddof=1) / 4
    of_draws = 4.303**2 * np.var([2.0, 4, 1], ddof=1) / 3
    found = report.over_draws(samples)
    assert (found.mean, found.half_width) == pytest.approx((7 / 3, (of_prompts + of_draws) ** 0.5))
    one = report.over_draws(samples[:1])
    assert (one.mean, one.half_width) == pytest.approx((2, 1.959964 * (np.var([1, 3, 2, 2], ddof=1) / 4) ** 0.5))
    assert np.isfinite(report.over_draws(np.eye(15)).half_width)


def test_a_share_is_paired_with_its_ceiling() -> None:
    """A gain that is half of the ceiling on every prompt is half of it without doubt."""
    whole = report.with_ceilings({**CEILING, "draws": {"25/0": draw([1.0, 2, 3, 4], [1.0, 2, 4, 1])}})
    draws = report.draws_of(whole, 25)
    half, published = report.share(draws, "ridge, chosen"), report.share(draws, "mean_difference, published")
    assert (half.mean, half.half_width) == pytest.approx((0.5, 0))
    assert (published.mean, published.half_width) == pytest.approx((1, 0))
    uneven = report.share(draws, "mean_difference, chosen")
    rest = np.array([1.0, 2, 3, 4]) - 10 / 16 * np.array([2.0, 4, 8, 2])
    assert (uneven.mean, uneven.half_width) == pytest.approx((10 / 16, 1.959964 * rest.std(ddof=1) / 2 / 4))


def test_organisms_are_pooled_and_draws_that_lack_a_row_left_out() -> None:
    one, other = draw([1.0, 2, 3, 4], [2.0, 2, 3, 4]), draw([0.0, 1, 0, 1], [3.0, 1, 0, 1])
    broken = {name: value for name, value in one.items() if name != "ridge, chosen"}
    reports = {
        "seed0": report.with_ceilings({**CEILING, "draws": {"25/0": one, "100/0": other, "25/1": broken}}),
        "seed1": report.with_ceilings({**CEILING, "draws": {"25/0": other}}),
    }
    both = report.pooled(reports)
    assert report.counts_of(both) == [25, 100]
    assert [len(report.draws_of(both, count)) for count in (25, 100)] == [2, 1]
    assert report.advantage(report.draws_of(both, 25), "chosen").mean == pytest.approx((1 + 3) / 8)
    without = {name: value for name, value in one.items() if name != "ridge, control"}
    some = report.with_ceilings({**CEILING, "draws": {"25/0": one, "25/1": without}})
    control = next(line for line in report.table(some) if "control" in line)
    assert control.endswith("| +0.00 ± 0.00 (1) |")
    more = report.fewer_over_more(both, "chosen")
    assert more is not None
    assert more.mean == pytest.approx(2.75 - 0.5)
    assert report.agreements(both)[0] == "N = 25: 0.50, 2.50; names the better in 2 of 2"
