"""The report: one page that is whole, says what the runs did, and trusts nothing that it is told."""

from __future__ import annotations

import errno
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner

import megacore
from megacore.cli import cli
from megacore.errors import DataError, OutputError
from megacore.runs import MetricsFile, RunDirectory
from megacore.runs.chart import Curve, chart, thin_curve, ticks


def make_run(path: Path, *, lr: float = 0.1, losses=(3.0, 2.0, 1.0), versions=None, **settings) -> Path:
    directory = RunDirectory(path)
    tables = {"training": {"train_iters": 9}, "optimizer": {"lr": lr}, "data": {"prefix": "text"} | settings}
    directory.create(tables, {"torch": "2.13.0"} | (versions or {}), iteration=0)
    file = MetricsFile(directory.metrics_file)
    file.start(0)
    for iteration, loss in enumerate(losses, start=1):
        file.step(iteration, {"loss": loss, "lr": lr, "tokens": 100, "seconds": 2.0, "tokens_per_second": 50.0})
    file.evaluation(2, "valid", {"loss": 2.25})
    file.evaluation(3, "valid", {"loss": 1.75})
    file.close()
    return path


class Page(HTMLParser):
    """The parts of a page: figures by heading, cells of tables by row, and all tags with their attributes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict]] = []
        self.rows: list[list[str]] = []
        self._in_cell = False
        self.feed(self.text)
        self.charts = {
            re.sub(r"<.*", "", re.search(r"<figcaption>(.*?)</figcaption>", figure)[1]).strip(): ElementTree.fromstring(
                re.search(r"<svg.*</svg>", figure)[0]
            )
            for figure in re.findall(r"<figure>.*?</figure>", self.text)
        }

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data):
        if self._in_cell:
            self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        [found] = [row[1:] for row in self.rows if row[0] == name]
        return found


def values_in(svg: ElementTree.Element, run: int) -> list[tuple[float, float]]:
    """Iterations and values of a run's curve, from where it is drawn."""
    x_low, x_high, y_low, y_high, left, right, top, bottom = json.loads(svg.get("data-place"))
    points = [
        tuple(map(float, point.split(",")))
        for line in svg.iter("polyline")
        if line.get("class") == f"run{run}"
        for point in line.get("points").split()
    ]
    return [
        (
            x_low + (x - left) / (right - left) * (x_high - x_low),
            y_low + (bottom - y) / (bottom - top) * (y_high - y_low),
        )
        for x, y in points
    ]


def test_a_report_draws_each_curve_where_its_values_are(tmp_path):
    out = megacore.report(make_run(tmp_path / "one"))

    page = Page(out)
    assert out == tmp_path / "one" / "report.html"
    assert list(page.charts) == ["loss", "learning rate", "speed", "valid: loss"]  # nothing for what there is none of
    drawn = values_in(page.charts["loss"], 0)
    assert [x for x, _ in drawn] == pytest.approx([1, 2, 3], abs=0.02)
    assert [y for _, y in drawn] == pytest.approx([3, 2, 1], abs=0.02)
    assert [y for _, y in values_in(page.charts["valid: loss"], 0)] == pytest.approx([2.25, 1.75], abs=0.01)


def test_several_runs_are_overlaid_and_their_differences_listed(tmp_path):
    one = make_run(tmp_path / "one", lr=0.1)
    two = make_run(tmp_path / "two", lr=0.2, losses=(4.0, math.nan, 3.0, 2.5, 2.0), seed=7)

    page = Page(megacore.report([one, two], tmp_path / "both.html"))

    assert len(values_in(page.charts["loss"], 0)) == 3
    assert [round(x) for x, _ in values_in(page.charts["loss"], 1)] == [3, 4, 5]  # broken at 2, so 1 is a point
    assert len(list(page.charts["loss"].iter("circle"))) == 1
    assert ["optimizer.lr", "0.1", "0.2"] in page.rows
    assert ["data.seed", "–", "7"] in page.rows
    assert not [row for row in page.rows if row[0] == "data.prefix" and len(row) == 3]  # equal in both
    assert page.row("Iterations") == ["3 of 9", "5 of 9"]
    assert page.row("Final loss") == ["1", "2"]
    assert page.row("Tokens") == ["300", "500"]
    assert page.row("torch") == ["2.13.0", "2.13.0"]


def test_runs_of_the_same_name_are_told_apart_by_where_they_are(tmp_path):
    for place in ("a", "b"):
        make_run(tmp_path / place / "run")
    page = Page(megacore.report([tmp_path / "a" / "run", tmp_path / "b" / "run"], tmp_path / "both.html"))
    assert ["", "a/run", "b/run"] in page.rows


def test_what_a_run_says_is_text_and_never_markup(tmp_path):
    evil = '</script><script>alert(1)</script><img src=x onerror="alert(2)">'
    name = "<b>run&'"
    run = make_run(tmp_path / name, versions={evil: {evil: evil}}, **{evil: evil})
    file = MetricsFile(run / "metrics.jsonl")
    file.evaluation(3, evil, {evil: 1.0})
    file.close()

    page = Page(megacore.report([run, make_run(tmp_path / "two")], tmp_path / "out.html"))

    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1
    assert not {"img", "b"} & set(tags)
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert any(evil in cell for row in page.rows for cell in row)


def test_the_page_asks_for_nothing_outside_of_it_and_forbids_it(tmp_path):
    page = Page(megacore.report(make_run(tmp_path / "one")))

    loading = {"src", "href", "srcset", "action", "data", "background", "poster"}
    assert not [(tag, name) for tag, attributes in page.tags for name in attributes if name in loading]
    assert "url(" not in page.text and "@import" not in page.text and "fetch(" not in page.text
    assert "http://www.w3.org/2000/svg" in page.text  # the name of a vocabulary, the only address
    assert len(re.findall(r"https?:", page.text)) == 1
    [policy] = [a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")


def test_a_run_that_goes_on_and_has_damaged_lines_is_reported_and_they_are_counted(tmp_path):
    run = make_run(tmp_path / "one")
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'rubbish\n{"iteration": 4, "lo')

    page = Page(megacore.report(run))

    assert page.row("Skipped damaged lines") == ["1"]
    assert page.row("Iterations") == ["3 of 9"]


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("versions.json", '{"starts": [3]}', r'is damaged: "starts" must be a list of JSON objects.* or remove it'),
        ("versions.json", '{"starts": {"torch": 2}}', "is damaged"),
        ("versions.json", '{"starts": [{"run_id": []}]}', "is damaged"),
        ("versions.json", "[]", "is damaged"),
        ("versions.json", '{"starts": [', "cannot be read: Expecting value"),
        ("run.toml", "training = 3", "is damaged: training is not a section. Restore the run file"),
        ("run.toml", "[training]\nseed = 1979-05-27", r"training\.seed is 1979-05-27, which is not a possible setting"),
        ("run.toml", "[a]\nb = [{c = 07:32:00}]", r"a\.b is "),
        ("run.toml", "training", "cannot be read"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_with_what_to_do(tmp_path, file, content, said):
    run = make_run(tmp_path / "one")
    (run / file).write_text(content)

    for runs in ([run], [run, make_run(tmp_path / "two")]):
        told = CliRunner().invoke(cli, ["report", *map(str, runs), "--out", str(tmp_path / "out.html")])

        assert told.exit_code == 2 and told.stderr.startswith(f"Error: {run / file} ")
        assert re.search(said, told.stderr)


@pytest.mark.parametrize(
    "line",
    [
        '{"iteration": 4, "time": 1e300, "loss": 9}',
        '{"iteration": 4, "time": -1, "loss": 9}',
        '{"iteration": 4, "time": null, "loss": 9}',
        '{"iteration": 9300000000000000000, "loss": 9}',
        '{"iteration": 9300000000000000000, "split": "valid", "values": {"loss": 9}}',
        '{"iteration": -1, "loss": 9}',
        '{"iteration": 1, "start": "2"}',
        '{"start": 9300000000000000000}',
    ],
)
def test_a_line_of_no_iteration_or_time_that_can_be_is_damaged(tmp_path, line):
    run = make_run(tmp_path / "one")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f"{line}\n")

    page = Page(megacore.report(run))

    assert page.row("Skipped damaged lines") == ["1"]
    assert page.row("Iterations") == ["3 of 9"] and page.row("Final loss") == ["1"]


def test_numbers_too_large_to_be_added_and_a_line_without_a_time_are_reported(tmp_path):
    run = make_run(tmp_path / "one")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "tokens": 1e308}\n{"iteration": 5, "tokens": 1e308}\n')

    page = Page(megacore.report(run))

    assert page.row("Iterations") == ["5 of 9"]
    assert page.row("Last update") == ["–"]


def test_a_run_without_a_step_is_reported(tmp_path):
    page = Page(megacore.report(make_run(tmp_path / "one", losses=())))
    assert page.row("Iterations") == ["0 of 9"] and page.row("Final loss") == ["–"]


def test_a_report_is_replaced_by_the_next_and_nothing_else_is(tmp_path):
    run = make_run(tmp_path / "one")
    first = megacore.report(run).read_text()
    assert megacore.report(run).read_text() == first
    (tmp_path / "thesis.html").write_text("<!DOCTYPE html>\nyears of work")

    with pytest.raises(OutputError, match=r"thesis\.html exists and is not a report, so it is not replaced"):
        megacore.report(run, tmp_path / "thesis.html")
    with pytest.raises(OutputError, match="is a directory"):
        megacore.report(run, tmp_path / "one")
    with pytest.raises(OutputError, match=r"nowhere, which r\.html is to be written into, is not a directory"):
        megacore.report(run, tmp_path / "nowhere" / "r.html")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["one", "thesis.html"]  # no half of a page


def test_a_report_that_cannot_be_finished_leaves_the_earlier_one(tmp_path, monkeypatch):
    run = make_run(tmp_path / "one")
    first = megacore.report(run).read_text()
    MetricsFile(run / "metrics.jsonl").step(4, {"loss": 0.5})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match=r"no room for .*report\.html \(No space left"):
        megacore.report(run)
    assert (run / "report.html").read_text() == first
    names = sorted(file.name for file in run.iterdir())
    assert names == ["metrics.jsonl", "report.html", "run.toml", "versions.json"]


def test_the_command_writes_a_report_and_refuses_what_is_no_run(tmp_path):
    run = make_run(tmp_path / "one")
    done = CliRunner().invoke(cli, ["report", str(run), "--out", str(tmp_path / "r.html")])
    assert (done.exit_code, done.output) == (0, f"Wrote {tmp_path / 'r.html'}.\n")

    for path in (tmp_path, tmp_path / "nowhere"):
        no_run = CliRunner().invoke(cli, ["report", str(path)])
        assert no_run.exit_code == 2 and "is not the directory of a run, which has a run.toml" in no_run.output
    several = CliRunner().invoke(cli, ["report", str(run), str(make_run(tmp_path / "two"))])
    assert several.exit_code == 2 and "give it with --out FILE.html" in several.output


def test_a_run_that_is_named_twice_is_refused(tmp_path):
    run = make_run(tmp_path / "one")
    with pytest.raises(DataError, match="a run is given twice"):
        megacore.report([run, run], tmp_path / "r.html")


# --- what is left of a long curve


def test_a_long_curve_keeps_its_peaks_its_dips_and_its_ends_and_is_small():
    values = np.sin(np.arange(1_000_000) / 1e5) + 3
    values[123_456], values[654_321] = 50.0, -50.0
    [piece] = thin_curve(range(1, 1_000_001), values)
    assert (123_457, 50.0) in piece and (654_322, -50.0) in piece
    assert piece[0] == (1, 3.0) and piece[-1] == (1_000_000, values[-1])
    assert len(piece) <= 1600
    assert [x for x, _ in piece] == sorted(x for x, _ in piece)
    assert len(chart("loss", "", [Curve(0, [piece])])) < 30_000


def test_a_short_curve_keeps_every_point():
    assert thin_curve([1, 2, 5], [3.0, 1.0, 2.0]) == [[(1, 3.0), (2, 1.0), (5, 2.0)]]


def test_values_that_are_not_finite_break_a_curve_and_one_of_nothing_else_is_empty():
    nan = math.nan
    assert thin_curve([1, 2, 3, 4, 5], [1.0, nan, math.inf, 2.0, 3.0]) == [[(1, 1.0)], [(4, 2.0), (5, 3.0)]]
    assert thin_curve([1, 2, 3, 4, 5], [1.0, 1e308, -1e308, 2.0, 3.0]) == [[(1, 1.0)], [(4, 2.0), (5, 3.0)]]
    assert thin_curve([1, 2], [nan, nan]) == []
    assert thin_curve([], []) == []


@pytest.mark.parametrize("low, high", [(0, 1), (2.31, 4.98), (1, 1_000_000), (-3e-9, 2e-9), (1e14, 9.7e15)])
def test_ticks_are_a_few_round_numbers_within(low, high):
    found = list(ticks(low, high))
    steps = np.diff(found)
    assert 2 <= len(found) <= 7
    assert low - 1e-6 * abs(high) <= found[0] and found[-1] <= high * (1 + 1e-6)
    assert np.allclose(steps, steps[0])
    assert f"{steps[0]:.0e}"[0] in "125" and math.isclose(steps[0], float(f"{steps[0]:.0e}"))


@pytest.mark.parametrize("value", [0.0, 5.0, -2e-8])
def test_a_curve_of_one_value_has_a_chart(value):
    assert "polyline" in chart("lr", "", [Curve(0, [[(1, value), (2, value)]])])
