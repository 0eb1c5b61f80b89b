"""`python -m matris` is the command `janus-matris`."""

import sys

from matris.cli import main

sys.exit(main())
