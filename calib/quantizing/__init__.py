"""From a fused float model to the artifact: the plan, what is observed, the calibrator."""
