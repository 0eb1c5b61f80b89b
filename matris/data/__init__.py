"""Structures and labels: from any file to a store, from stores to batches; checks of their quality."""
