"""Every error that gptvq raises on purpose derives from GptvqError."""


class GptvqError(Exception):
    """Base of all errors raised by gptvq."""


class ConfigError(GptvqError, ValueError):
    """A setting, argument or tensor handed in by the caller is unusable; the message says what to change."""


class FormatError(GptvqError):
    """A checkpoint on disk is damaged, incomplete or of a newer layout."""


class NumericalError(GptvqError, ArithmeticError):
    """Weights, activations or a Hessian hold values no repair can use."""


class ResumeMismatch(GptvqError):
    """A job in the output folder was started with other settings."""


class BackendUnavailable(GptvqError, RuntimeError):
    """A kernel backend was asked for that this machine or build does not have."""
