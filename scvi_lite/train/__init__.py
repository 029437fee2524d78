"""Training: one LightningModule, one call of the Trainer."""

from scvi_lite._lazy import lazy

__getattr__, __dir__ = lazy(
    __name__,
    {
        "Plan": "scvi_lite.train.plan",
        "Task": "scvi_lite.train.task",
        "TrainingDivergedError": "scvi_lite.train.divergence",
        "SaveCheckpoint": "scvi_lite.train.callbacks",
        "TrainerConfig": "scvi_lite.train.configs",
        "TrainingPlanConfig": "scvi_lite.train.configs",
        "merge_kwargs": "scvi_lite.train.configs",
    },
)

__all__ = [
    "Plan",
    "SaveCheckpoint",
    "Task",
    "TrainerConfig",
    "TrainingDivergedError",
    "TrainingPlanConfig",
    "merge_kwargs",
]
