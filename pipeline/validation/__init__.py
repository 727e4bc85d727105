"""Re-reading an output against its plan: every byte that can be checked, one finding for each that is wrong."""

from pipeline.validation.findings import Finding
from pipeline.validation.repair import repair_output
from pipeline.validation.run import Validation

__all__ = ["Finding", "Validation", "repair_output"]
