"""ckpt-sidecar: durable checkpoints for a training job that knows nothing of it."""

__version__ = "0.1.0"
