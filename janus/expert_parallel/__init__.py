"""Experts of a mixture spread over ranks: which rank computes what, planned from the step's own tokens."""
