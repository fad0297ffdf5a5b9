"""The ledger of a run store: which request was carried out on which checkpoint, and what came of it."""
