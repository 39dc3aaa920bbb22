"""Steering a transformers model while it generates."""
