"""Benchmark runs: what is read from their files, what counts as moved, and what is shown."""

from __future__ import annotations

import json
from dataclasses import replace
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from history.command import main, read_history
from history.records import Run, compare, read_run
from history.report import change_table, run_tables, to_html

from dspa.bench.measurements import Better, Column, Interval, Row
from dspa.errors import CorruptFileError, DspaError, InvalidInputError

READ = Column("read W_enc", "ms", Interval(2.0, 1.9, 2.1), spread=(1.9, 2.1), bytes_read=20 << 20)
EAGER = Column("eager", "ms", Interval(20.0, 19.0, 21.0), spread=(19.0, 21.0), relative=Interval.exactly(1))
STEP = replace(
    EAGER, name="step", measured=Interval(2.5, 2.4, 2.6), spread=(2.4, 2.6), relative=Interval(0.125, 0.12, 0.13)
)
GAIN = Column("gain", "reward", Interval(0.8, 0.6, 1.0), better="higher")
BYTES = Column("bytes", "bytes", Interval.exactly(1024))
FAST = Row("2304x16384", "token_step", (READ, EAGER, STEP), reference="eager")
BROKEN = Row("3584x16384", "token_step", (), failed="lazy differs from dense")
QUALITY = Row("organism", "quality", (GAIN, BYTES))
RUN = Run("base", "2026-11-20T10:00:00", "0123456789", "a machine", (FAST, BROKEN, QUALITY))


def with_column(run: Run, column: Column, name: str = "later") -> Run:
    """The run with one column replaced, by name."""
    rows = tuple(replace(r, columns=tuple(column if c.name == column.name else c for c in r.columns)) for r in run.rows)
    return replace(run, name=name, time="2026-11-21T10:00:00", rows=rows)


def write(run: Run, folder: Path, **changes: Any) -> Path:
    record = {
        "datetime": run.time,
        "commit_info": {"id": run.commit + "abcdef", "dirty": False},
        "machine_info": {"dspa": run.machine},
        "benchmarks": [{"extra_info": row.as_json()} for row in run.rows] + [{"extra_info": {}}],
    }
    path = folder / f"{run.name}.json"
    path.write_text(json.dumps(record | changes))
    return path


@pytest.mark.parametrize("count", [6, 7, 10, 20, 51, 200])
def test_interval_of_a_median_covers_it_in_95_percent_of_cases_and_not_much_more(count: int) -> None:
    interval = Interval.around_median(list(range(count, 0, -1)))
    assert interval.value == np.median(range(1, count + 1))
    below = int(interval.low) - 1  # samples that would all have to lie on one side of the median

    def missed(rank: int) -> float:
        return 2 * sum(comb(count, i) for i in range(rank + 1)) / 2**count

    assert interval.low + interval.high == count + 1
    assert missed(below) <= 0.05 < missed(below + 2)


def test_interval_of_few_samples_is_their_range() -> None:
    assert Interval.around_median([3.0, 1.0, 2.0]) == Interval(2, 1, 3)


def test_a_run_survives_its_file(tmp_path: Path) -> None:
    assert read_run(write(RUN, tmp_path)) == RUN


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (None, DspaError, "cannot be read"),
        ("{", CorruptFileError, "is not JSON"),
        ("{}", CorruptFileError, "'commit_info'"),
        ('{"benchmarks": 3, "commit_info": {}}', CorruptFileError, "not a run"),
    ],
)
def test_a_file_that_is_no_run_is_refused(tmp_path: Path, content: str | None, error: type, words: str) -> None:
    path = tmp_path / "run.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(error, match=words):
        read_run(path)


@pytest.mark.parametrize(
    ("column", "value", "better", "moved", "improved"),
    [
        (STEP, Interval(0.126, 0.121, 0.131), "lower", False, False),  # inside the noise
        (STEP, Interval(0.129, 0.1289, 0.1291), "lower", False, False),  # inside what two runs of one code differ by
        (STEP, Interval(0.1, 0.097, 0.103), "lower", True, True),
        (STEP, Interval(0.2, 0.19, 0.21), "lower", True, False),
        (GAIN, Interval(0.9, 0.7, 1.1), "higher", False, False),
        (GAIN, Interval(1.6, 1.4, 1.8), "higher", True, True),
        (GAIN, Interval(0.0, -0.2, 0.2), "higher", True, False),  # no quotient there
        (GAIN, Interval(0.4, -0.1, 0.9), "higher", False, False),
        (BYTES, Interval.exactly(1025), "lower", True, False),  # counted: every change is one
        (BYTES, Interval.exactly(1024), "lower", False, False),
        (BYTES, Interval.exactly(0), "lower", True, True),
    ],
)
def test_moved_is_what_lies_beyond_the_noise(
    column: Column, value: Interval, better: Better, moved: bool, improved: bool
) -> None:
    name = "relative" if column.relative else "measured"
    after = with_column(RUN, replace(column, better=better, **{name: value}))
    (change,) = (change for change in compare(RUN, after) if change.column == column.name)
    assert (change.moved, change.improved) == (moved, improved)


def test_a_slower_machine_moves_nothing() -> None:
    slower = with_column(RUN, replace(STEP, measured=Interval(5.0, 4.8, 5.2)))
    assert not any(change.moved for change in compare(RUN, slower))


def test_only_what_both_runs_have_is_compared() -> None:
    changes = compare(replace(RUN, rows=(FAST,)), RUN)
    assert [(change.row, change.column) for change in changes] == [(FAST.name, "read W_enc"), (FAST.name, "step")]


def test_a_failed_row_is_shown_as_failed_and_never_as_a_time() -> None:
    (table,) = (table for table in run_tables(RUN) if table.title == "token_step")
    (row,) = (row for row in table.rows if row[0] == BROKEN.name)
    assert row[1:] == ("FAILED: lazy differs from dense", "", "", "", "")
    assert f"FAILED: {BROKEN.name}" in change_table(RUN, RUN, compare(RUN, RUN)).note


def test_table_says_time_bandwidth_and_ratio() -> None:
    (table,) = (table for table in run_tables(RUN) if table.title == "token_step")
    by_name = {row[1]: row[2:] for row in table.rows if row[0] == FAST.name}
    assert by_name["read W_enc"] == ("2 ms (1.9 to 2.1)", "10.5", "100%", "")
    assert by_name["step"] == ("2.5 ms (2.4 to 2.6)", "", "", "8x")


def test_history_is_in_order_of_time_and_draws_a_page(tmp_path: Path) -> None:
    write(with_column(RUN, replace(STEP, relative=Interval(0.1, 0.097, 0.103)), "a_later_run"), tmp_path)
    base = write(RUN, tmp_path)
    page = tmp_path / "history.html"
    history = read_history([tmp_path], base, page)
    assert [run.name for run in history.runs] == ["base", "a_later_run"]
    assert [change.column for change in history.changes if change.moved] == ["step"]
    text = page.read_text()
    assert text == to_html(history.runs)
    assert text.count("<svg") == 4  # two times, reward, bytes; none for the references and the row that failed
    assert "FAILED: lazy differs from dense" in text
    assert "http" not in text.replace("http://www.w3.org", "").replace("https://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "")


def test_one_run_is_bars_without_a_history() -> None:
    text = to_html([RUN])
    assert "<svg" not in text
    assert "read W_enc</span>" in text
    assert '<i class="base" style="width:100.0%"></i>' in text
    assert f"<h3>{BROKEN.name}" not in text


def test_the_page_of_the_runs_that_are_kept_is_small() -> None:
    kept = Path(__file__).parents[2] / "benchmarks" / "results"
    runs = read_history([kept], None, None).runs
    assert len(to_html(runs).encode()) < 300_000
    assert len(to_html([*runs, *runs]).encode()) < 300_000


def test_no_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="run make bench"):
        read_history([tmp_path], None, None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["token_step", "FAILED: lazy differs", "2.5 ms"]),
        (["--base", "base.json"], ["What moved", "3 of 4 quantities did not move", "better"]),
        (["--base", "base.json", "--all"], ["as before", "better"]),
        (["--json"], ['"changes": []', '"commit": "0123456789"']),
    ],
)
def test_command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write(RUN, tmp_path)
    write(with_column(RUN, replace(STEP, relative=Interval(0.1, 0.097, 0.103)), "a_later_run"), tmp_path)
    assert main([".", *options]) == 0
    output = capsys.readouterr().out
    for word in words:
        assert word in output


def test_bad_input_of_the_command_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: no benchmark run in ")
