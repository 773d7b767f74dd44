"""LoRA: small updates of a network whose weights stay; trained, merged and in files."""
