"""janus: training of energy models with exact derivatives over many ranks. Knows no chemistry."""

from janus.name_clash import check_name_clash

__version__ = "0.1.0"

check_name_clash()
