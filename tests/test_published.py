"""docs/published.md says what the trials under benchmarks/results/published/ say, to the last digit."""

import re
from collections import Counter
from pathlib import Path

import pytest

from harness import report, results
from harness.plugins import load, load_space

TOP = Path(__file__).parent.parent
RUN = results.RunDirectory(TOP / "benchmarks" / "results" / "published")
PAGE = TOP / "docs" / "published.md"
SPACE = load("tune_spaces", "published", "SPACE")
RECORDED = {
    "variants": list(SPACE.variants),
    "published": SPACE.published,
    "claims": [vars(claim) for claim in SPACE.claims],
}


def rows() -> list[str]:
    """The table's."""
    machines = {r["variant"]: r["environment"]["cpu"] for r in RUN.trials()}
    lines = []
    for one in report.variants_of(RECORDED, RUN.trials()):
        test, published = one["test"], one["published"]
        cells = [
            f"`{one['variant']}`",
            "" if published is None else f"{published:.4f}",
            f"{test.mean:.4f} [{test.low:.4f}, {test.high:.4f}]",
            str(test.n),
            f"{one['epochs']:.1f}",
            f"{one['seconds']:,.0f}",
            machines[one["variant"]],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def sentences() -> list[str]:
    return [f"- {finding.sentence}." for finding in report.findings_of(RECORDED, RUN.trials())]


@pytest.mark.parametrize("lines", [rows, sentences])
def test_the_page_has_every_figure(lines):
    page = PAGE.read_text()
    missing = [line for line in lines() if line not in page]
    assert not missing, "docs/published.md has to say:\n" + "\n".join(lines())


def test_every_row_was_trained():
    """Those that need a download aside; a history and a record each, with nobody's paths in them."""
    trained = Counter(record["variant"] for record in RUN.trials() if results.is_done(record))
    assert {name for name in SPACE.variants if trained[name] < 3} <= {"transfer"}
    for record in RUN.trials():
        folder = RUN.trial_folder(record["id"])
        assert len(RUN.history(record["id"])) == round(2 * record["metrics"]["epochs"])
        assert "/" not in (folder / results.TRIAL).read_text()


def test_the_spaces_that_it_shows_are_ones(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert blocks
    for number, block in enumerate(blocks):
        assert len(block.splitlines()) <= 15
        file = tmp_path / f"space_{number}.py"
        file.write_text(block)
        assert load_space(str(file)).variants
