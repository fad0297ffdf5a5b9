"""The demo: fictitious records planted in a real model, audited, forgotten, audited again."""
