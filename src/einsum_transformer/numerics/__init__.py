"""What is not a contraction, each forward beside its backward."""
