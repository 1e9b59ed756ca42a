"""``python -m trimtab.cli``."""

import sys

from trimtab.cli import main

sys.exit(main())
