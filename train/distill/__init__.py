"""Distillation: students cut out of a teacher, and the teachers that they learn from."""
