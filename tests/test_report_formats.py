"""Tables of any evaluator's rows with intervals, as text, HTML, Markdown, LaTeX and CSV."""

import csv
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from fmdistill import report
from fmdistill.evaluate import intervals
from fmdistill.evaluate.intervals import Means
from fmdistill.evaluate.results import Metric, Result, value
from fmdistill.report import bars, decided, formats, rows, tables

METRICS = {
    "pck": Metric("PCK & co", across="joint", percent=True, better="higher", help="PCK: keypoints within reach."),
    "offset_px": Metric("offset_px", "mean", better="lower"),
    "hidden": Metric("hidden", shown=False),
}
JOINTS = ("hand", "foot_left", "50% knee")
WEATHER = ("rain", "fog #1")


def judged(shift: float, images=range(30)) -> Result:
    """Return the result of an evaluator of its own: odd metrics, dimensions, and intervals."""
    generator, means = np.random.default_rng(0), Means()
    for image in images:
        for joint in JOINTS:
            base = generator.beta(4, 4, size=image % 3 + 1)
            means.add(f"{image}", "student", "pck", np.clip(base + shift, 0, 1), joint=joint)
            for size in ("small", "large"):
                means.add(f"{image}", "student", "pck", np.clip(base + shift, 0, 1), joint=joint, size=size)
        for weather in WEATHER:
            noise = generator.normal(size=2)
            means.add(f"{image}", "student", "offset_px", 3 - 5 * shift + noise, weather=weather, k=2)
            means.add(f"{image}", "nothing", "offset_px", 9 + noise, weather=weather, k=2)
        means.add(f"{image}", "student", "hidden", [1.0])
    given = {
        "subject": "student",
        "metric": "undescribed",
        "value": 2.5,
        "low": 1,
        "high": 4,
        "interval": "by a friend",
    }
    plain = {"subject": "student", "metric": "undescribed", "value": 7, "camera": "left|right"}
    return Result({"name": "own:Own"}, [*means.rows(), given, plain], METRICS, {}, means.details()["per_image"])


def write_run(folder, result: Result) -> str:
    (folder / "evaluation").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(f"""
out: {folder}
images: {{name: scenes}}
teacher: {{name: sam_mini}}
cache: {{root: {folder / "nowhere"}}}
student: {{name: tinyvit_sam_mini}}
task: {{name: distill}}
optimizer: {{name: adamw}}
schedule: {{name: cosine}}
train: {{steps: 29}}
""")
    stored = {**result.to_json(), "per_image": result.per_image}
    (folder / "evaluation" / "own.json").write_text(json.dumps(stored))
    return str(folder)


def a_table(*shifts: float) -> tables.Table:
    runs = [rows.Run(f"run_{i}", None, None, [], {"own": judged(shift)}) for i, shift in enumerate(shifts)]
    return tables.build(rows.rows(runs, "own"), METRICS)


def section(table: tables.Table, kind: str) -> tables.Section:
    (one,) = (each for each in table.sections if each.kind == kind)
    return one


def test_rows_of_any_evaluator_are_reported_with_their_intervals_without_a_change_to_the_report(tmp_path):
    runs = [write_run(tmp_path / name, judged(shift)) for name, shift in (("a", 0.0), ("b_100%", 0.05))]
    page = report.run(runs, str(tmp_path / "out")).read_text()
    for text in (
        "PCK &amp; co, all images",
        "50% knee",
        "weather",
        "left|right",
        "by a friend",
        "PCK: keypoints within",
    ):
        assert text in page or text == "weather"
    (row,) = (r for r in judged(0.05).rows if r["metric"] == "pck" and r.get("joint") == "hand" and "size" not in r)
    shown = f"[{100 * row['low']:.2f}, {100 * row['high']:.2f}]"
    assert f"<strong>{100 * row['value']:.2f}</strong><small>{shown}</small>" in page
    assert "hidden" not in page and "PCK &amp; co by size, 50% knee" in page
    for ending in ("md", "tex"):
        text = (tmp_path / "out" / f"own.{ending}").read_text()
        assert f"{100 * row['value']:.2f}" in text and shown in text
    text = report.text(runs)
    assert f"{100 * row['value']:.2f} {shown}" in text
    assert "[low, high] of a value: by a friend." in text and "[low, high] of a difference: 95 % paired" in text


def test_a_difference_has_the_paired_interval_of_the_stored_sums():
    table = a_table(0.0, 0.05, -0.05)
    results = [judged(shift) for shift in (0.0, 0.05, -0.05)]
    key = ("pck", (("joint", "hand"),))
    entries = [next(e for e in r.per_image if intervals.entry_key(e) == key) for r in results]
    for number, row in enumerate(section(table, "difference").rows, start=1):
        difference, low, high = intervals.paired(entries[number], entries[0])
        assert row.cells[key] == pytest.approx(difference)
        assert (row.intervals[key].low, row.intervals[key].high) == (low, high)
        means = [value(r.rows, "pck", joint="hand") for r in (results[number], results[0])]
        assert row.cells[key] == pytest.approx(means[0] - means[1])
        assert high - low < 0.02 and section(table, "run").rows[0].intervals[key].high > low + 0.3  # far narrower
    assert ("undescribed", ()) not in row.intervals and row.cells["undescribed", ()] == 0


def test_more_than_three_runs_are_corrected_for():
    key, results = ("offset_px", (("k", 2), ("weather", "rain"))), [judged(shift) for shift in (0.0, 0.1, 0.2, 0.3)]
    table = a_table(0.0, 0.1, 0.2, 0.3)
    entries = [
        next(e for e in r.per_image if intervals.entry_key(e) == key and e["subject"] == "student") for r in results
    ]
    interval = section(table, "difference").rows[2].intervals[key]
    assert (interval.low, interval.high) == intervals.paired(entries[3], entries[0], 1 - 0.05 / 3)[1:]
    assert interval.of == "98.33 % paired bootstrap over the images of both, corrected for 3 differences"
    assert decided.level(3) == 0.95 and decided.level(11) == pytest.approx(1 - 0.05 / 10)


def test_runs_judged_on_other_images_have_no_interval_of_their_difference():
    runs = [
        rows.Run("a", None, None, [], {"own": judged(0.0)}),
        rows.Run("b", None, None, [], {"own": judged(0.1, range(29))}),
    ]
    table = tables.build(rows.rows(runs, "own"), METRICS)
    (difference,) = section(table, "difference").rows
    assert difference.intervals == {} and difference.cells and table.best == {}


def test_the_best_is_bold_only_if_it_is_decided():
    pck, offset = ("pck", (("joint", "hand"),)), ("offset_px", (("k", 2), ("weather", "rain")))
    apart = a_table(0.0, 0.1, 0.05).best
    assert apart[pck] == "run_1" and apart[offset] == "run_1"  # less of an offset is better
    assert ("undescribed", ()) not in apart
    assert a_table(0.0, 0.1, 0.1).best == {}  # two are the same
    assert a_table(0.1).best == {}


def test_wide_tables_are_cut_into_blocks_that_fit_and_keep_every_value():
    table = a_table(0.0, 0.1)
    blocks = formats.blocks(table)
    assert len(blocks) > 1 and [c for block in blocks for c in block.columns] == table.columns
    assert max(map(len, formats.plain(table).split("[low")[0].splitlines())) <= formats.WIDTH
    values = [v for s in table.sections for r in s.rows for v in r.cells if v in {c.key for c in table.columns}]
    kept = [v for b in blocks for s in b.sections for r in s.rows for v in r.cells if v in {c.key for c in b.columns}]
    assert sorted(map(str, kept)) == sorted(map(str, values))


def test_markdown_has_as_many_cells_in_every_line_of_a_table():
    text = formats.markdown(a_table(0.0, 0.1))
    for part in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        lines = [re.sub(r"\\\|", "", line) for line in part.splitlines()]
        assert len({line.count("|") for line in lines}) == 1 and re.fullmatch(r"\| --- \|( ---: \|)+", lines[1])
    assert r"left\|right" in text and "**Difference to run_0**" in text
    assert re.search(r"\| run_1 \| \*\*\d+\.\d\d\*\* \[\d+\.\d\d, \d+\.\d\d\] \|", text)


def test_csv_has_a_line_for_each_value_unscaled():
    table = a_table(0.0, 0.1)
    lines = list(csv.DictReader(io.StringIO(formats.as_csv(table))))
    keys = {column.key for column in table.columns}
    assert len(lines) == sum(len(row.cells.keys() & keys) for s in table.sections for row in s.rows)
    (line,) = (
        x for x in lines if x["name"] == "run_1" and x["joint"] == "hand" and not x["size"] and x["section"] == "run"
    )
    (row,) = (r for r in judged(0.1).rows if r["metric"] == "pck" and r.get("joint") == "hand" and "size" not in r)
    assert [float(line[name]) for name in ("value", "low", "high")] == [row["value"], row["low"], row["high"]]
    assert line["interval"] == row["interval"]
    (line,) = (x for x in lines if x["section"] == "difference" and x["camera"] == "left|right")
    assert line["value"] == "0" and line["low"] == line["interval"] == ""


def test_latex_is_balanced_escaped_and_has_as_many_cells_in_every_row():
    text = formats.latex(a_table(0.0, 0.1))
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    for tabular in re.findall(r"\\begin\{tabular\}.*?\\end\{tabular\}", body, re.DOTALL):
        columns = len(re.search(r"\{(lr+)\}", tabular)[1])
        for line in (line for line in tabular.splitlines() if line.endswith(r"\\")):
            spans = [int(n) for n in re.findall(r"\\multicolumn\{(\d+)\}", line)]
            assert len(re.findall(r"(?<!\\)&", line)) + 1 + sum(spans) - len(spans) == columns
            unescaped = re.sub(r"\\[&%#$_{}\\]|\$(\\times|-)\$", "", line.removesuffix(r"\\"))
            assert unescaped.count("{") == unescaped.count("}") and not re.search(r"[%#$_^~×−]", unescaped)
        assert tabular.index(r"\toprule") < tabular.index(r"\midrule") < tabular.index(r"\bottomrule")
    assert r"50\% knee" in body and r"foot\_left" in body and r"PCK \& co" in body and r"fog \#1" in body
    assert re.search(r"run\\_1 & \\textbf\{\d+\.\d\d\} \{\\scriptsize \[\d+\.\d\d, \d+\.\d\d\]\}", body)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs a LaTeX with booktabs")
def test_latex_compiles(tmp_path):
    table = formats.latex(a_table(0.0, 0.1))
    document = "\\documentclass{article}\n\\usepackage{booktabs}\n\\begin{document}\n" + table + "\\end{document}\n"
    (tmp_path / "t.tex").write_text(document)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and (tmp_path / "t.pdf").exists(), done.stdout[-2000:]
    assert "Missing character" not in done.stdout


def test_bars_are_of_every_part_of_the_images_in_the_evaluator_s_order():
    runs = [rows.Run(name, None, None, [], {"own": judged(shift)}) for name, shift in (("a", 0.0), ("b", 0.1))]
    panels = bars.gather(rows.rows(runs, "own"), METRICS)
    assert [panel.title for panel in panels] == [f"PCK & co by size, {joint}" for joint in JOINTS]
    first = panels[0]
    assert first.labels == ["small", "large"] and list(first.values) == ["a", "b"] and first.percent
    expected = [value(judged(0.1).rows, "pck", joint="hand", size=size) for size in first.labels]
    assert first.values["b"] == expected and first.intervals["b"][0].low < expected[0] < first.intervals["b"][0].high
    assert first.kinds == [intervals.INTERVAL]


def test_areas_and_edges_in_one_dimension_are_bars_of_their_own_and_missing_values_have_none():
    def row(name, **by_bucket):
        cells = {("miou", (("bucket", bucket), ("grid", "5x5"))): number for bucket, number in by_bucket.items()}
        return rows.TableRow(name, "run", cells)

    both = [row("a", area_small=0.1, area_large=0.2, edge_near=0.3, edge_far=0.4), row("b", area_large=0.5)]
    area, edge = bars.gather(both, {})
    assert (area.title, area.labels) == ("miou by area, 5x5", ["small", "large"]) and not area.percent
    assert area.values == {"a": [0.1, 0.2], "b": [None, 0.5]} and area.kinds == []
    assert (edge.title, edge.labels) == ("miou by edge, 5x5", ["near", "far"])
    assert bars.gather([row("a", area_small=0.1)], {}) == []  # a single part is no picture
    shares = [row("a", **{"below_1%": 0.1, "1-3%": 0.2})]
    assert bars.gather(shares, {})[0].labels == ["below 1%", "1-3%"]
