"""Extraction attacks: what a live language model can be brought to emit of its records. One attack a file."""

from __future__ import annotations

from attacks.extraction.greedy import Confirmation, confirm, emits, greedy_tokens, neutral_generation

__all__ = ["Confirmation", "confirm", "emits", "greedy_tokens", "neutral_generation"]
