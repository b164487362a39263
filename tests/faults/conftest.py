"""One worker for all tests here: it takes seconds to import the program."""

from collections.abc import Iterator

import pytest
from campaign import Worker, worker


@pytest.fixture(scope="session")
def hand() -> Iterator[Worker]:
    with worker() as made:
        yield made
