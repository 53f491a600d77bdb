"""Training on several processes and machines, over Ray."""
