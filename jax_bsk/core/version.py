"""The one home of the version: read by the build, compared with the native libraries, carried by every custom call."""

__version__ = "0.2.0"
