"""FSRL (arXiv 2509.12934; docs/method.md, section 6): a trained adapter adds a vector of latents at every token."""
