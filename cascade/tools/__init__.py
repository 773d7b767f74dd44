"""Commands on model files: ``python -m cascade.tools describe`` and ``convert``."""
