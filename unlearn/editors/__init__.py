"""Editors change a copy of a checkpoint so that records are no longer in it. One file per method."""
