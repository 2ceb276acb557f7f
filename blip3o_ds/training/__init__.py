"""The training run: DeepSpeed engine, checkpoints, EMA, telemetry."""
