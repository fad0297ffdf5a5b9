"""Probes as stages of a run: what they need, what they leave in `probes/`. One file per probe."""
