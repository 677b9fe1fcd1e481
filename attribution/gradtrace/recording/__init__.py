"""What training itself shows: each row's push on some probes, and on the weights that training ends with (HyDRA)."""

from gradtrace.recording.files import Recording, read_recording
from gradtrace.recording.influence_recorder import InfluenceRecorder

__all__ = ["InfluenceRecorder", "Recording", "read_recording"]
