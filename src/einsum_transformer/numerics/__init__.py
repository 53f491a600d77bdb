"""Operations that are not contractions, each forward pass with its backward pass."""
