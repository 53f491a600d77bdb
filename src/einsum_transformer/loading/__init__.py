"""Load a model from a source: find the source, read its config, check its tensors, read the weights."""
