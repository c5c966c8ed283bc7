"""What goes wrong with videos."""

from pathlib import Path


class VideoError(RuntimeError):
    """A file that is missing, damaged or cannot be decoded; the message names it."""


class OutsideError(VideoError):
    """A clip that begins after its video ends, or whose frames lie in a chunk that is not there."""


def reason(path: Path, error: BaseException) -> str:
    """The first line of a decoder's error, which may be pages long; what is plain to see comes first."""
    if path.exists() and path.stat().st_size == 0:
        return "the file is empty"
    if "size must exactly match" in str(error):
        # decord2 3.4 takes a padded row for a fourth channel, which rows of up to 97 pixels can have.
        return "decord2 cannot read frames this narrow on this CPU; use the decoder 'av'"
    if words := getattr(error, "strerror", None):  # of FFmpeg or the system, without the number and the path
        return str(words)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'cannot be decoded'}"
