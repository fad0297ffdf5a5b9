"""Try to get records out of a live model. Builds on `probes`; touches no disk, configuration or console."""
