"""Training: one LightningModule, one call of the Trainer."""

from scvi_lite._lazy import lazy

__getattr__, __dir__ = lazy(
    __name__,
    {
        "Plan": "scvi_lite.train.plan",
        "Task": "scvi_lite.train.task",
        "TrainingDivergedError": "scvi_lite.train.task",
    },
)

__all__ = ["Plan", "Task", "TrainingDivergedError"]
