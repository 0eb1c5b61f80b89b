"""Layers of MatRIS as Megatron modules."""
