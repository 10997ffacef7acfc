"""Processes that live as long as the session."""

from collections.abc import Iterator

import pytest

from tests.truth.processes import Processes


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Two gloo processes."""
    with Processes(2, tmp_path_factory.mktemp("pair")) as processes:
        yield processes


@pytest.fixture(scope="session")
def quartet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Four gloo processes, for rings that turn more than once and for products of axes."""
    with Processes(4, tmp_path_factory.mktemp("quartet")) as processes:
        yield processes
