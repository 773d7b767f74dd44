"""The system that runs the networks: diffusion, text, checkpoints, pipelines, measurement."""
