"""From what a user names to a model: source, config, places, checks, weights."""
