"""A run of a model as one page: program, arrays, times, memory, attention and predictions."""
