"""The error rates of the report's sentences, simulated: a sample by default, more of it in the slow tests."""

import pytest
from conftest import TOP

from benchmarks.evidence import measure_rate, scenarios

SCENARIOS = {scenario.name: scenario for scenario in scenarios()}


@pytest.mark.parametrize("name", SCENARIOS)
def test_error_rates_keep_their_limits(name):
    """In a sample too small to see more than a gross error."""
    rate = measure_rate(SCENARIOS[name], 3 if "auto" in name else 10)
    assert rate.keeps_limit, (rate.hits, rate.simulations)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_error_rates_keep_their_limits_in_full(name):
    rate = measure_rate(SCENARIOS[name], 50 if "auto" in name else 150)
    assert rate.keeps_limit, (rate.hits, rate.simulations)


def test_the_page_has_every_rate():
    """docs/evidence.md has the table that python -m benchmarks.evidence wrote."""
    import pandas as pd

    page = (TOP / "docs" / "evidence.md").read_text()
    table = pd.read_csv(TOP / "benchmarks" / "results" / "evidence" / "rates.csv")
    assert [f"{row.sentence}: {row.given}" for row in table.itertuples()] == list(SCENARIOS)
    for row in table.itertuples():
        assert row.low <= row.limit if row.kind == "error" else row.high >= row.limit
        cells = f"| {row.sentence} | {row.given} | {row.rate:.3f} [{row.low:.3f}, {row.high:.3f}] | "
        assert cells in page
