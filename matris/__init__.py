"""matris: the MatRIS interatomic potential, built from janus layers."""

try:
    from janus import __version__
    from janus.name_clash import check_name_clash
except ImportError as error:
    if "PyPI distribution" in str(error):
        raise
    raise ImportError(
        "the package `janus` that Python finds is not the one of janus-matris; probably the PyPI distribution `janus` "
        "is installed: run `pip uninstall janus` and install janus-matris again"
    ) from error

__all__ = ["__version__"]

check_name_clash()
