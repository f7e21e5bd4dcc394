"""Random tests search anew on every run at a desk, and repeat the same examples in CI."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

# No test reads or writes the user's cache.
os.environ.pop("ICD_CACHE_DIR", None)
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="icd-test-cache-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

USABLE = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Train last: jax starts threads, which must not be there when a later test forks."""
    items.sort(key=lambda item: item.path.name == "test_recipes.py")


@pytest.fixture(autouse=True)
def free_thread() -> Iterator[None]:
    """Undo that TVM binds the thread that starts its pool: two test processes shared one CPU."""
    yield
    if USABLE is not None:
        os.sched_setaffinity(0, USABLE)
