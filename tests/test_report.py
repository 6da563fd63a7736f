"""The report of a run: one page that needs nothing else, in which texts from outside are inert."""

import html.parser
import shlex
import shutil

import numpy as np
from conftest import command, records

from export.parity import compare_logits
from harness.reporting import tables
from harness.reporting.tables import Cell, Table
from harness.reporting.words import trial_arguments
from harness.run.directory import RunDirectory
from harness.run.manifest import FileEntry, Manifest
from harness.run.records import read_trial, write_trial


class Page(html.parser.HTMLParser):
    """Collects images and visible text; outside references would break `self-contained`."""

    def __init__(self, text: str):
        super().__init__()
        self.images: list[str] = []
        self.outside: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag == "img":
            self.images.append(values["src"])
        self.outside += [v for k, v in attrs if k in ("src", "href") and not v.startswith("data:")]

    def handle_data(self, data):
        self.text += data


def test_report_is_one_self_contained_page(small_run):
    run, _ = small_run
    page = Page((run / "report" / "index.html").read_text())
    assert page.outside == []
    figures = {p.stem for p in (run / "report" / "figures").glob("*.png")}
    assert figures == {
        "validation_curves",
        "parallel_parameters",
        "accuracy_throughput",
        "accuracy_latency",
        "operators",
        "latency",
        "accuracy_by_class",
        "confusion",
        "mistakes",
        "ledger",
    }
    assert len(page.images) == len(figures)
    for record in records(run):
        assert record.id in page.text
    assert "the highest mean validation accuracy of" in page.text
    assert "val_accuracy" not in page.text
    assert "onnxruntime" in page.text


def test_a_file_whose_logits_are_not_finite_fails():
    """Its accuracy alone would pass the gate."""
    reference = np.tile([1.0, 0.0], (2000, 1))
    logits = reference.copy()
    logits[0, 1] = np.nan
    record = compare_logits(logits, reference, np.zeros(2000, int), 0.005).record()
    manifest = Manifest(
        id="x",
        config={},
        weights_sha256=None,
        classes=[],
        input_size=8,
        files={"model_int8.onnx": FileEntry(format="onnx", precision="int8", parity=record)},
    )
    table = tables.files_table(manifest)
    assert table.rows[0][table.headers.index("check")].text == "fails"


def test_the_winners_configuration_is_a_command_line():
    values = {"options.widths": [[8, 16], [32, 32]], "optimizer.lr": 0.0123456789, "early_stop": None, "epochs": 1000}
    words = shlex.split(trial_arguments(values | {"augmentation.flip": True, "options.weights": "a b.safetensors"}))
    texts = dict(word.removeprefix("trial.").split("=", 1) for word in words)
    assert texts == {
        "options.widths": "[[8,16],[32,32]]",
        "optimizer.lr": "0.0123456789",
        "early_stop": "none",
        "epochs": "1000",
        "augmentation.flip": "true",
        "options.weights": "a b.safetensors",
    }


def test_a_column_without_any_entry_is_left_out():
    rows = [[Cell("a"), Cell(""), Cell("3")], [Cell("b"), Cell(""), Cell("")]]
    table = Table(["variant", "published, %", "seeds"], rows)
    assert table.filled == Table(["variant", "seeds"], [[Cell("a"), Cell("3")], [Cell("b"), Cell("")]])


def test_texts_from_outside_are_inert_in_the_report(small_run, tmp_path):

    run = tmp_path / "run"
    shutil.copytree(small_run[0], run)
    folder = next((run / "trials").glob("*"))
    record = read_trial(folder)
    record.status, record.error = "failed", "<script>alert(1)</script>"
    write_trial(folder, record)
    recorded = RunDirectory(run).recorded()
    names = ["$a_{$", "<b>x</b>", *recorded.data.classes[2:]]
    recorded.data.classes, recorded.data.notes = names, ["<img src=http://example.com/x>"]
    RunDirectory(run)._configure(recorded)
    for file in run.glob("exported/*/manifest.json"):
        manifest = Manifest.read(file)
        manifest.classes = names
        manifest.write(file)
    done = command("-m", "harness.report", f"run={run}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (run / "report" / "index.html").read_text()
    assert "<script>alert" not in text
    assert "&lt;script&gt;" in text
    assert "<img src=http" not in text
    assert "default-src 'none'" in text  # a browser loads nothing and runs nothing
