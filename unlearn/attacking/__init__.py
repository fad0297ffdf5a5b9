"""Attacks in a run: what they share, which of them run, what they leave behind."""
