"""The Triton kernel of a token step, in parts: `kernel.py` describes the whole."""
