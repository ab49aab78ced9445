"""What `import absorber` offers; a change here is a change of the public interface."""

import pytest

import absorber

NAMES = [
    "PRESETS",
    "AbsorbConfig",
    "AbsorberError",
    "AbsorptionError",
    "BenchmarkError",
    "ConfigError",
    "ContextError",
    "DeviceMemoryError",
    "DivergedError",
    "Memory",
    "MemoryFileError",
    "MemoryMismatchError",
    "MissingExtraError",
    "ModelError",
    "Preset",
    "Progress",
    "Round",
    "Session",
    "SessionBatch",
    "SessionBusyError",
    "SessionError",
    "SessionNotFoundError",
    "StreamConfig",
    "__version__",
    "absorb",
    "load",
    "preset",
]


def test_the_public_names():
    assert absorber.__all__ == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_name_can_be_imported_and_is_listed(name):
    assert getattr(absorber, name) is not None
    assert name in dir(absorber)


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'absorbe'"):
        _ = absorber.absorbe
