"""Everything that Absorber raises on purpose.

    AbsorberError                    400
    ├── ConfigError                  400  a setting is out of range, unknown, or contradicts another
    ├── ContextError                 422  the text or tokens given cannot be absorbed
    ├── ModelError                   422  the model cannot be found, loaded or used
    ├── AbsorptionError              500  a round could not be carried out
    │   ├── DivergedError            500  the loss is not a finite number
    │   └── DeviceMemoryError        507  the device has no room
    ├── MemoryFileError              422  a folder is not a readable memory
    │   └── MemoryMismatchError      409  the memory belongs to another base model
    ├── SessionError                 400  a session cannot be used
    │   ├── SessionNotFoundError     404
    │   └── SessionBusyError         409  another process works on it
    ├── BenchmarkError               400  a benchmark cannot run or its records cannot be read
    └── MissingExtraError            501  an optional package is not installed

A message says what happened, which value was got, and what to do. The number is the HTTP status that a
server answers with.
"""

from typing import ClassVar


class AbsorberError(Exception):
    """Base of every error that Absorber raises on purpose."""

    status: ClassVar[int] = 400


class ConfigError(AbsorberError):
    """A setting is out of range, unknown, or contradicts another."""


class ContextError(AbsorberError):
    """The text or the tokens given cannot be absorbed."""

    status = 422


class ModelError(AbsorberError):
    """The model cannot be found, loaded or used with this method."""

    status = 422


class AbsorptionError(AbsorberError):
    """A round could not be carried out; the memory is as it was before the round."""

    status = 500


class DivergedError(AbsorptionError):
    """The synchronization loss is not a finite number."""

    status = 500


class DeviceMemoryError(AbsorptionError):
    """The device has no room for the round."""

    status = 507


class MemoryFileError(AbsorberError):
    """A folder is missing, is not a memory, or is damaged."""

    status = 422


class MemoryMismatchError(MemoryFileError):
    """The memory was absorbed with another base model."""

    status = 409


class SessionError(AbsorberError):
    """A session cannot be used."""


class SessionNotFoundError(SessionError):
    """There is no session in this folder."""

    status = 404


class SessionBusyError(SessionError):
    """Another process works on this session."""

    status = 409


class BenchmarkError(AbsorberError):
    """A benchmark cannot run, or its records cannot be read."""


class MissingExtraError(AbsorberError):
    """An optional package is needed and not installed."""

    status = 501
