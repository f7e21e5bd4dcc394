"""One exception tree; every class has one stable code that users and CI can match on."""

from __future__ import annotations


class IcdError(Exception):
    """Base of every error this package raises on purpose.

    Parameters
    ----------
    message : str
        One line that says what is wrong, with the offending name and value.
    hint : str, optional
        One line that says what the user can do about it.
    """

    code = "ICD-E000"

    def __init__(self, message: str, hint: str = "") -> None:
        # The hint is part of the text: only the text survives a trip through TVM's C++ side.
        super().__init__(f"{message} ({hint})" if hint else message)
        self.message = message
        self.hint = hint

    def line(self) -> str:
        """Return the error as the single line the command line prints."""
        return f"error {self.code}: {self}"


class ModelFileError(IcdError):
    """The model file is missing, unreadable, truncated or not ONNX."""

    code = "ICD-E101"


class UnsupportedOpError(IcdError):
    """The importer has no converter for an operator of the model."""

    code = "ICD-E102"


class DynamicShapeError(IcdError):
    """An input dimension is symbolic and the user gave no size for it."""

    code = "ICD-E103"


class NonFiniteError(IcdError):
    """A weight or an input holds NaN or infinity."""

    code = "ICD-E104"


class ShapeError(IcdError):
    """An array, an input or a flag has the wrong shape or dtype."""

    code = "ICD-E105"


class MissingDependencyError(IcdError):
    """An optional package or data file that this call needs is absent."""

    code = "ICD-E106"


class ConfigError(IcdError):
    """A flag or configuration value is unknown or out of range."""

    code = "ICD-E201"


class OutputError(IcdError):
    """The output folder or file cannot be written."""

    code = "ICD-E301"


class PermutationError(IcdError):
    """A permutation is invalid or violates the constraint of its axis group."""

    code = "ICD-E401"


class TransformError(IcdError):
    """A transform (S, Q or K) cannot be applied as asked."""

    code = "ICD-E402"


class VerificationError(IcdError):
    """A rewritten module does not compute what the original computes."""

    code = "ICD-E501"


class MeasurementError(IcdError):
    """A measurement could not be taken; the text says which and why."""

    code = "ICD-E601"
