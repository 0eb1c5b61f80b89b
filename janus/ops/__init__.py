"""Differentiable operations that keep little memory under double backward."""
