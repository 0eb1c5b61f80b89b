"""Weights from one format into another: what `janus-matris convert` does."""
