"""``python -m spgdd`` is the command ``spgdd``."""

import sys

from spgdd.cli import main

sys.exit(main())
