"""Requests, policies, suites and method presets: the YAML a run is asked with."""
