"""An attack for unlearn-audit, as a package of its own."""
