"""Radial and angular expansions."""
