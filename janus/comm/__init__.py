"""All communication between ranks, counted by a ledger."""
