"""Training checkpoints: safetensors and JSON, without pickle."""
