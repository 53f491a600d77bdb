"""Readings of a recorded or dry-run program: what it computes, what it cost."""
