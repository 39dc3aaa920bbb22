"""Evaluating a steered model with lm-eval: importing this registers the model "dspa" there."""

from dspa.errors import InvalidInputError

try:
    from dspa.evaluation.lm_eval_model import SteeredLM
except ImportError as error:
    raise InvalidInputError(
        f"evaluating needs packages that are not installed ({error}); install them with: pip install 'dspa[eval]'"
    ) from error

__all__ = ["SteeredLM"]
