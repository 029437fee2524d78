"""Training: one LightningModule, one call of the Trainer."""

from scvi_lite._lazy import lazy

PLACE_OF = {
    "Plan": "scvi_lite.train.plan",
    "Task": "scvi_lite.train.task",
    "TrainingDivergedError": "scvi_lite.train.divergence",
    "SaveCheckpoint": "scvi_lite.train.callbacks",
    **dict.fromkeys(("TrainerConfig", "TrainingPlanConfig", "merge_kwargs"), "scvi_lite.train.configs"),
}

__getattr__, __dir__ = lazy(__name__, PLACE_OF)

__all__ = [*PLACE_OF]
