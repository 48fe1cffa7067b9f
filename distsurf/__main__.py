"""``python -m distsurf`` is the command ``distsurf``."""

import sys

from distsurf.cli import main

sys.exit(main())
