"""What can stand where a weight array stands."""
