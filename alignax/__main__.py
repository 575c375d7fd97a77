"""`python -m alignax`."""

import sys

from alignax.cli import main

sys.exit(main())
