"""From live models to a verdict: measurements, figures, criteria."""
