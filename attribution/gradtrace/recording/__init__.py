"""Recording a training as it runs: each row's effect on probes (TracIn by step) and on the final weights (HyDRA)."""

from gradtrace.recording.files import Recording, read_recording
from gradtrace.recording.influence_recorder import InfluenceRecorder

__all__ = ["InfluenceRecorder", "Recording", "read_recording"]
