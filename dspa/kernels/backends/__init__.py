"""The backends: which there are, what each serves, and which one a call gets."""
