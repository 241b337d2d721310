"""One pool of processes for the whole folder."""

from __future__ import annotations

import pytest

from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def pool():
    pool = Pool()
    yield pool
    pool.close()
