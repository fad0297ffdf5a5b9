"""Curvature of the loss: Kronecker factors, their corrections, operators and the figures read from them."""
