"""Checkpoints: opened read-only, identified by digest, loaded, copied edited."""
