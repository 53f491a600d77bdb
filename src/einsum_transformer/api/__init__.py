"""The public functions, which the commands call: they take any source of a model and return a result."""
