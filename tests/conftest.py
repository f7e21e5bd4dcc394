"""Random tests search anew on every run at a desk, and repeat the same examples in CI."""

import atexit
import os
import shutil
import tempfile

from hypothesis import settings

settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

# No test reads or writes the user's cache.
os.environ["ICD_CACHE_DIR"] = tempfile.mkdtemp(prefix="icd-test-cache-")
atexit.register(shutil.rmtree, os.environ["ICD_CACHE_DIR"], ignore_errors=True)
