"""How many examples the fuzz suite tries: a few beside the other tests, many where `-m fuzz` asks for it. Which tests
share a process, and how often it looks for garbage.
"""

import gc
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


gc.set_threshold(20_000, 20, 20)
"""Objects of a process with thousands of tests and torch, each time walked in vain, are a tenth of what tests take."""


def pytest_collection_finish():
    """What is there before the first test stays."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """Tests of a file share a process, as their fixtures do."""
    for item in items:
        real = item.path.is_relative_to(REAL)
        item.add_marker(pytest.mark.xdist_group("truth" if real else item.path.stem))
        if real:
            item.add_marker(pytest.mark.slow)
