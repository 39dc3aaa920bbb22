"""All that touches the insides of transformers models."""
