"""How many examples the fuzz suite tries: a few beside the other tests, many where `-m fuzz` asks for it."""

from hypothesis import HealthCheck, settings

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


def pytest_configure(config):
    """Those of every run are the same each time; those of the suite are others each time."""
    asked = "fuzz" in config.option.markexpr and "not fuzz" not in config.option.markexpr
    settings.register_profile(
        "fuzz", max_examples=1000 if asked else 10, derandomize=not asked, deadline=None, suppress_health_check=SLOW
    )
