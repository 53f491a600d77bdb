"""Leaves: objects that take the place of a weight array."""
