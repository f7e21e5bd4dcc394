"""``python -m icd_tvm`` is ``icd``."""

import sys

from icd_tvm.cli import main

sys.exit(main())
