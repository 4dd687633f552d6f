"""`python -m fmdistill` is `fmdistill`."""

import sys

from fmdistill.cli import main

sys.exit(main())
