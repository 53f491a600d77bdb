"""Puts this folder on the import path, so that tests in sub-folders find the helpers that lie here."""
