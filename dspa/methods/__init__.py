"""What to change for a prompt or a token: one module for each method."""
