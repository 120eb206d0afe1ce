"""Every error that layerpack raises on purpose.

    LayerpackError
    ├── PackError              a pack on disk is not what its manifest or the format says
    │   └── PackVersionError   the pack needs a newer layerpack
    ├── SourceError            a checkpoint cannot be read or converted
    │   ├── HubError           the Hub refused, is unreachable, or sent what it did not state
    │   └── UnsupportedError   a model or a storage type that layerpack does not handle
    ├── CalibrationError       a calibration that is damaged, or another model's
    ├── TargetError            the output cannot be written where it was asked for
    │   └── DiskFullError      not enough free space, before or during the work
    ├── CapacityError          the asked context, tiers or slots do not fit into memory
    ├── StreamError            a layer did not arrive: read error, short read, lost device
    │   └── StalledError       no progress within the watchdog's time
    ├── PromptError            a prompt that cannot be run: empty, too long, no chat template
    └── OptionError            an option's value that means nothing

A message is one line: where, what was wanted, what was found, what to do. Only cli turns
these into exit codes; anything else that escapes is a bug.
"""


class LayerpackError(Exception):
    """Root of the tree."""


class PackError(LayerpackError):
    """A pack on disk is not what its manifest or the format says."""


class PackVersionError(PackError):
    """The pack needs a newer layerpack."""


class SourceError(LayerpackError):
    """A checkpoint cannot be read or converted."""


class HubError(SourceError):
    """The Hub refused, is unreachable, or sent something else than it stated."""


class UnsupportedError(SourceError):
    """A model or a storage type that layerpack does not handle."""


class CalibrationError(LayerpackError):
    """A calibration that is damaged, or another model's."""


class TargetError(LayerpackError):
    """The output cannot be written where it was asked for."""


class DiskFullError(TargetError):
    """Not enough free space, found before the work or during it."""


class CapacityError(LayerpackError):
    """The asked context, tiers or slots do not fit into memory."""


class StreamError(LayerpackError):
    """A layer did not arrive: read error, short read, lost device."""


class StalledError(StreamError):
    """No progress within the watchdog's time."""


class PromptError(LayerpackError):
    """A prompt that cannot be run: empty, too long, no chat template."""


class OptionError(LayerpackError):
    """An option's value that means nothing."""
