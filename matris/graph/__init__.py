"""Structures, neighbour graphs, line graphs and batches of them."""
