"""Shards to batches.

The way of a sample: ``sources`` (an address) -> ``archive`` (members of a tar file) -> ``index``
(what is where) -> ``select`` (filters and shapes) -> ``plan`` or ``resampled`` (whose turn it is)
-> ``read`` (pixels, captions, latents) -> ``loader`` (workers, losses, stalls). ``open`` ties them
together for a run; ``check``, ``write`` and ``latents`` are the tools of ``python -m train.data``.
"""
