"""`python tools/convert_checkpoint.py` is `janus-matris convert`, without an installation."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from matris.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
