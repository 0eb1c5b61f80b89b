"""Radial and angular expansions and the cutoff envelope."""
