"""Records on disk, global batches, micro-batches and their loading. Knows no chemistry."""
