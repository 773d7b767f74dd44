"""Rename tables of ``stages.layers``, which Stage B and Stage C of both generations are made of.

There are two published layouts: "original" is that of the authors' own files, with query, key and
value in one tensor; "diffusers" is that of the Hub's folders, with three. Each of ours has a query
beside a fused key and value.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from cascade.checkpoints.weight_map import Link, Table, layer

Layout = Literal["original", "diffusers"]


def res_block(ours: str, theirs: str) -> Table:
    """Link a residual block; their response norm keeps its scales as (1, 1, 1, C)."""
    yield from layer(f"{ours}.depthwise", f"{theirs}.depthwise")
    yield from layer(f"{ours}.expand", f"{theirs}.channelwise.0")
    for name in ("gamma", "beta"):
        yield Link(
            (f"{ours}.response_norm.{name}",),
            (f"{theirs}.channelwise.2.{name}",),
            their_leading_ones=3,
        )
    yield from layer(f"{ours}.project", f"{theirs}.channelwise.4")


def timestep_block(ours: str, theirs: str, extra: tuple[str, ...] = ()) -> Table:
    """Link a time modulation and its extra conditions."""
    yield from layer(f"{ours}.mapper", f"{theirs}.mapper")
    for name in extra:
        yield from layer(f"{ours}.extra_mappers.{name}", f"{theirs}.mapper_{name}")


def attn_block(ours: str, theirs: str, layout: Layout) -> Table:
    """Link an attention and the mapper of its condition."""
    yield from layer(f"{ours}.cond_mapper", f"{theirs}.kv_mapper.1")
    yield from _attention(f"{ours}.attention", f"{theirs}.attention", layout)


def _attention(ours: str, theirs: str, layout: Layout) -> Iterator[Link]:
    for name in ("weight", "bias"):
        query, key_value = f"{ours}.query.{name}", f"{ours}.key_value.{name}"
        if layout == "diffusers":
            yield Link((query,), (f"{theirs}.to_q.{name}",))
            key, value = f"{theirs}.to_k.{name}", f"{theirs}.to_v.{name}"
            yield Link((key_value,), (key, value), their_parts=(1, 1))
        else:
            fused = f"{theirs}.attn.in_proj_{name}"
            yield Link((query, key_value), (fused,), our_parts=(1, 2))
    out = "to_out.0" if layout == "diffusers" else "attn.out_proj"
    yield from layer(f"{ours}.out", f"{theirs}.{out}")
