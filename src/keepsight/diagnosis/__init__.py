"""What the visual tokens of every layer still hold: probes, structure, spectrum, fidelity, in one forward pass."""

from keepsight.diagnosis.collect.batches import DEFAULT_PROMPT
from keepsight.diagnosis.result import Diagnosis
from keepsight.diagnosis.run import diagnose

__all__ = ["DEFAULT_PROMPT", "Diagnosis", "diagnose"]
