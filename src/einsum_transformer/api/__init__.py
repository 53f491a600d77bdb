"""The functions that `einsum_transformer` exports and its commands call: any source of a model in, a result
out."""
