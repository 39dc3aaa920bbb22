"""What a policy edits, how much that changes, and what the edited latents mean."""
