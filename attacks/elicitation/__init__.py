"""Attacks that search for an input which brings suppressed records back: vectors, nearby inputs, universal suffixes."""
