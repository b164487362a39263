"""The server of the tests of batches: one with a Batch API."""

from collections.abc import Iterator

import pytest
from batches import BatchApi, serving


@pytest.fixture
def server() -> Iterator[BatchApi]:
    with serving() as known:
        yield known
