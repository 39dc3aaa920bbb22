"""The errors raised on purpose. Each message is one line: what was found, what was expected, what to do."""


class DspaError(Exception):
    """Base of every error raised on purpose. The command line prints it as one line and exits with code 2."""


class InvalidInputError(DspaError):
    """An argument, a data row or an option that cannot be used as it was given."""


class UnsupportedSaeError(DspaError):
    """A sparse autoencoder whose arithmetic this package cannot represent exactly, or that does not edit the
    residual stream it reads."""


class MismatchError(DspaError):
    """Parts that do not belong together: a policy and a model, an SAE and a layer, a folder and a run."""


class CorruptFileError(DspaError):
    """A file on disk that is truncated, altered, or holds values out of their bounds."""


class BackendUnavailableError(DspaError):
    """A kernel backend that was named explicitly and is not available; the message says why."""
