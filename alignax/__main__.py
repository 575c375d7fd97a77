"""`python -m alignax`."""

import sys

from alignax.interrupts import install

install()  # before the command line is imported

from alignax.cli import main  # noqa: E402

sys.exit(main())
