"""How many examples the fuzz suite tries: a few beside the other tests, many where `-m fuzz` asks for it. Which tests
share a process.
"""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


def pytest_configure(config):
    """Those of every run are the same each time; those of the suite are others each time."""
    asked = "fuzz" in config.option.markexpr and "not fuzz" not in config.option.markexpr
    settings.register_profile(
        "fuzz", max_examples=1000 if asked else 10, derandomize=not asked, deadline=None, suppress_health_check=SLOW
    )


REAL = Path(__file__).parent / "truth"
"""Tests of real torch: the processes that they share are started once."""


def pytest_collection_modifyitems(items):
    """Tests of a file share a process, as their fixtures do."""
    for item in items:
        real = item.path.is_relative_to(REAL)
        item.add_marker(pytest.mark.xdist_group("truth" if real else item.path.stem))
        if real:
            item.add_marker(pytest.mark.slow)
