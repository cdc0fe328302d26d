"""What every training run needs: steps, checkpoints that survive, exact resume, averaged weights, clean stops."""

from .run import StepLoss, TrainingRun

__all__ = ["StepLoss", "TrainingRun"]
