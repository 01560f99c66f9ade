"""What every test leaves behind as it found it."""

from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """A command line that runs within a test configures structlog to write to that test's standard error, which is
    closed afterwards.
    """
    before = structlog.get_config()
    yield
    structlog.configure(**before)
