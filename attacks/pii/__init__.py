"""Personal data in text: detectors of its kinds, and the games that measure how much of it a model gives away."""
