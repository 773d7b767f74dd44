"""Students of a U-Net: which of a teacher's modules are removed, and what the student's come from.

A recipe is a list of the teacher's modules that go, so that a hand-made choice, a user's own and
one that was measured are the same kind of table. The plan that it makes of a teacher says which
weights each of the student's modules inherits, and, since a feature site is named as its module,
which features it imitates.

Reference: Kim et al., 2023, BK-SDM, arXiv:2305.15798, section 3.1; Lee et al., 2023, KOALA,
arXiv:2312.04005, section 3.1; Gupta et al., 2024, SSD-1B and Segmind-Vega, arXiv:2401.02677.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import MappingProxyType

from stages.unet.config import Depths, UNetConfig


@dataclass(frozen=True)
class Recipe:
    """What a student lacks of its teacher; the default lacks nothing."""

    remove: tuple[str, ...] = ()
    """Paths of the teacher's modules, or shell patterns of paths as
    ``*.transformer_blocks.[5-9]``. Each must match something.

    - ``down_blocks.1.resnets.1``, ``up_blocks.0.resnets.1``: a resnet and the attention after it.
      A level keeps one resnet more on the way up than on the way down, and each that stays reads as
      many channels as before.
    - ``down_blocks.2.attentions.0``: the attention alone;
      ``down_blocks.2.attentions.0.transformer_blocks.7``: one transformer block of it.
    - ``mid_block``: the middle; ``mid_block.attentions.0`` with ``mid_block.resnets.1``: all of it
      but one resnet.
    - ``down_blocks.3`` with ``up_blocks.0``: the deepest level and what resamples to it and back;
      it must be as wide as the level above it.
    """


@dataclass(frozen=True)
class StudentPlan:
    """A student, and where each of its modules comes from."""

    teacher: UNetConfig
    """Sizes of the teacher."""
    student: UNetConfig
    """Sizes of the student."""
    origins: Mapping[str, str]
    """Student module path -> teacher module path, for every resnet, attention stack, transformer
    block, resampler, block ("down_blocks.1"), the middle and the ends (conv_in, ...).

    A block whose resampler was removed with the level below it comes from a teacher's block of
    another size of output; all other outputs are of the same size."""

    def __post_init__(self) -> None:
        """Refuse origins that leave a module out, or use one of the teacher's twice."""
        own, theirs = set(_modules(self.student)), set(_modules(self.teacher))
        for kind, names in (
            ("has no origin", own - self.origins.keys()),
            ("is no module of the student", self.origins.keys() - own),
            ("is no module of the teacher", set(self.origins.values()) - theirs),
        ):
            if names:
                raise ValueError(f"{min(names)} {kind}")
        if len(set(self.origins.values())) != len(self.origins):
            raise ValueError("two modules of the student have one origin")
        _check_widths(self)
        shape = replace(
            self.teacher,
            channels=self.student.channels,
            num_heads=self.student.num_heads,
            down_depths=self.student.down_depths,
            mid_depth=self.student.mid_depth,
            up_depths=self.student.up_depths,
        )
        if shape != self.student:
            raise ValueError("the student differs from its teacher in more than what is removed")

    def teacher_name(self, name: str) -> str:
        """Return the teacher's name of a student's tensor or feature site.

        The rule is the longest path in ``origins`` that the name starts with.

        Raises:
            ValueError: The name is below no module of the student.
        """
        path = name
        while path not in self.origins:
            path, dot, _ = path.rpartition(".")
            if not dot:
                raise ValueError(f"{name!r} is below no module of the student")
        return self.origins[path] + name[len(path) :]


@dataclass(frozen=True)
class _Layer:
    """A resnet that stays, and which transformer blocks stay after it."""

    index: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class _Kept:
    """What stays of a teacher, in running order, by the teacher's numbers."""

    down: tuple[tuple[_Layer, ...], ...]
    middle: tuple[_Layer, ...]
    up: tuple[tuple[_Layer, ...], ...]
    gone: int
    """How many of the deepest levels are removed."""


def plan_student(teacher: UNetConfig, recipe: Recipe) -> StudentPlan:
    """Apply a recipe to a teacher.

    Args:
        teacher: Any U-Net, of any width.
        recipe: What to remove.

    Raises:
        ValueError: They do not fit: the teacher has no such module, or what is left makes no U-Net
            of whose tensors each has one of the same shape in the teacher.
    """
    kept = _kept(teacher, _removed(teacher, recipe))
    _check_levels(kept)
    levels = len(kept.down)
    student = replace(
        teacher,
        channels=teacher.channels[:levels],
        num_heads=teacher.num_heads[:levels],
        down_depths=_depths(kept.down),
        mid_depth=len(kept.middle[0].blocks) if kept.middle else None,
        up_depths=_depths(kept.up),
    )
    return StudentPlan(teacher, student, dict(_origins(teacher, kept)))


def removable(config: UNetConfig) -> tuple[str, ...]:
    """Return the paths of all modules that a recipe may name."""
    kinds = ("downsamplers", "upsamplers")
    return tuple(
        name
        for name in _modules(config)
        if name not in _ends(config) and not any(f".{kind}." in name for kind in kinds)
    )


def _removed(teacher: UNetConfig, recipe: Recipe) -> set[str]:
    names = removable(teacher)
    removed: set[str] = set()
    for pattern in recipe.remove:
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            like = difflib.get_close_matches(_words(pattern), map(_words, names), n=1, cutoff=0.7)
            hint = f"; did you mean {like[0]}?" if like and like[0] != _words(pattern) else ""
            raise ValueError(
                f"the recipe removes {pattern!r}, but nothing that can be removed of this teacher "
                f"is called so (transformer blocks by layer: {_shape(teacher)}){hint}"
            )
        removed |= found
    return removed


def _words(path: str) -> str:
    """Return a path with N for its numbers, which a slip of the pen does not concern."""
    return re.sub(r"\d+|\[[^]]*\]|[*?]", "N", path)


def _shape(config: UNetConfig) -> str:
    """Return the depths of a U-Net in one line."""
    middle = "none" if config.mid_depth is None else config.mid_depth
    return f"down {config.down_depths}, middle {middle}, up {config.up_depths}"


def _kept(teacher: UNetConfig, removed: set[str]) -> _Kept:
    levels = _levels(teacher, removed)
    gone = len(teacher.channels) - levels
    return _Kept(
        tuple(
            _layers(f"down_blocks.{level}", teacher.down_depths[level], removed)
            for level in range(levels)
        ),
        _middle(teacher, removed),
        tuple(
            _layers(f"up_blocks.{index}", depths, removed)
            for index, depths in enumerate(teacher.up_depths)
            if index >= gone
        ),
        gone,
    )


def _levels(teacher: UNetConfig, removed: set[str]) -> int:
    """Return how many levels stay; those that go are the deepest, on both ways."""
    levels = len(teacher.channels)
    down = [level for level in range(levels) if f"down_blocks.{level}" in removed]
    up = [level for level in range(levels) if f"up_blocks.{levels - 1 - level}" in removed]
    kept = levels - len(down)
    if down != up or down != list(range(kept, levels)) or not kept:
        raise ValueError(
            f"the recipe removes the levels {down} on the way down and {up} on the way up, but "
            f"levels go from the deepest, as down_blocks.{levels - 1} with up_blocks.0, and one "
            "stays"
        )
    return kept


def _layers(block: str, depths: tuple[int, ...], removed: set[str]) -> tuple[_Layer, ...]:
    def blocks(stack: str, depth: int) -> tuple[int, ...]:
        if stack in removed:
            return ()
        names = (f"{stack}.transformer_blocks.{number}" for number in range(depth))
        return tuple(number for number, name in enumerate(names) if name not in removed)

    return tuple(
        _Layer(index, blocks(f"{block}.attentions.{index}", depth))
        for index, depth in enumerate(depths)
        if f"{block}.resnets.{index}" not in removed
    )


def _middle(teacher: UNetConfig, removed: set[str]) -> tuple[_Layer, ...]:
    if teacher.mid_depth is None or "mid_block" in removed:
        return ()
    kept = _layers("mid_block", _middle_depths(teacher.mid_depth), removed)
    attends = [bool(layer.blocks) for layer in kept]
    if attends not in ([True, False], [False], []):
        raise ValueError(
            "the recipe leaves a middle that is neither whole, nor one resnet, nor nothing: for "
            "one resnet remove both mid_block.attentions.0 and mid_block.resnets.1"
        )
    return kept


def _check_levels(kept: _Kept) -> None:
    for level, (down, up) in enumerate(zip(kept.down, reversed(kept.up), strict=True)):
        if not down or len(up) != len(down) + 1:
            index = kept.gone + len(kept.up) - 1 - level
            raise ValueError(
                f"the recipe keeps {len(down)} resnets of down_blocks.{level} and {len(up)} of "
                f"up_blocks.{index}, which is of the same level: keep one or more, and one more on "
                "the way up, where each reads a skip"
            )


def _depths(blocks: tuple[tuple[_Layer, ...], ...]) -> Depths:
    return tuple(tuple(len(layer.blocks) for layer in layers) for layers in blocks)


def _middle_depths(depth: int) -> tuple[int, ...]:
    return (depth, 0) if depth else (0,)


# Paths of modules


def _ends(config: UNetConfig) -> tuple[str, ...]:
    """Return the modules that every student keeps."""
    added = () if config.size_channels is None else ("add_embedding",)
    return ("conv_in", "time_embedding", *added, "conv_norm_out", "conv_out")


def _origins(config: UNetConfig, kept: _Kept) -> Iterator[tuple[str, str]]:
    """Yield each module of the student and the teacher's that it comes from."""
    for name in _ends(config):
        yield name, name
    for level, layers in enumerate(kept.down):
        yield from _block(f"down_blocks.{level}", f"down_blocks.{level}", layers)
        if level + 1 < len(kept.down):
            name = f"down_blocks.{level}.downsamplers.0"
            yield name, name
    if kept.middle:
        yield from _block("mid_block", "mid_block", kept.middle)
    for index, layers in enumerate(kept.up):
        own, theirs = f"up_blocks.{index}", f"up_blocks.{index + kept.gone}"
        yield from _block(own, theirs, layers)
        if index + 1 < len(kept.up):
            yield f"{own}.upsamplers.0", f"{theirs}.upsamplers.0"


def _block(own: str, theirs: str, layers: tuple[_Layer, ...]) -> Iterator[tuple[str, str]]:
    yield own, theirs
    for number, layer in enumerate(layers):
        yield f"{own}.resnets.{number}", f"{theirs}.resnets.{layer.index}"
        if not layer.blocks:
            continue
        stack, origin = f"{own}.attentions.{number}", f"{theirs}.attentions.{layer.index}"
        yield stack, origin
        for place, block in enumerate(layer.blocks):
            yield f"{stack}.transformer_blocks.{place}", f"{origin}.transformer_blocks.{block}"


def _modules(config: UNetConfig) -> list[str]:
    """Return the paths of all modules that have an origin."""

    def whole(depths: Depths) -> tuple[tuple[_Layer, ...], ...]:
        return tuple(
            tuple(_Layer(index, tuple(range(depth))) for index, depth in enumerate(row))
            for row in depths
        )

    middle = () if config.mid_depth is None else _middle_depths(config.mid_depth)
    kept = _Kept(whole(config.down_depths), whole((middle,))[0], whole(config.up_depths), gone=0)
    return [name for name, _ in _origins(config, kept)]


# Widths


def _check_widths(plan: StudentPlan) -> None:
    """Refuse a student of whose modules one has other widths or heads than its origin."""
    own, theirs = _widths(plan.student), _widths(plan.teacher)
    for name, widths in own.items():
        origin = plan.origins[name]
        if widths != theirs[origin]:
            raise ValueError(
                f"the student's {name} would be {_described(widths)}, but {origin} of the teacher, "
                f"whose weights it inherits, is {_described(theirs[origin])}: remove others, so "
                "that each resnet that stays reads what it did"
            )


def _described(widths: tuple[int, int, int]) -> str:
    read, width, heads = widths
    return f"{read} -> {width} channels with {heads} heads"


def _widths(config: UNetConfig) -> dict[str, tuple[int, int, int]]:
    """Return what each resnet reads and returns, and the heads of its level, in running order."""
    found: dict[str, tuple[int, int, int]] = {}
    x = config.channels[0]
    skips = [x]
    last = len(config.channels) - 1
    for level, depths in enumerate(config.down_depths):
        width, heads = config.channels[level], config.num_heads[level]
        for layer in range(len(depths)):
            found[f"down_blocks.{level}.resnets.{layer}"] = (x, width, heads)
            x = width
            skips.append(x)
        if level < last:
            skips.append(x)
    if config.mid_depth is not None:
        for layer in range(len(_middle_depths(config.mid_depth))):
            found[f"mid_block.resnets.{layer}"] = (x, x, config.num_heads[last])
    for index, depths in enumerate(config.up_depths):
        width, heads = config.channels[last - index], config.num_heads[last - index]
        for layer in range(len(depths)):
            found[f"up_blocks.{index}.resnets.{layer}"] = (x + skips.pop(), width, heads)
            x = width
    return found


# Published recipes

_PAIRS = ("down_blocks.*.resnets.1", "up_blocks.*.resnets.1")
"""BK-SDM's rule, which KOALA follows: the second pair of every stage down, the middle one of every
stage up. The pairs that stay are those whose widths change."""
_ONE_RESNET = ("mid_block.attentions.0", "mid_block.resnets.1")
_BK_SMALL = Recipe((*_PAIRS, "mid_block"))

PUBLISHED: Mapping[str, Recipe] = MappingProxyType(
    {
        # SDXL's. Which blocks of a stack KOALA and Segmind kept is not published: the first ones,
        # after KOALA's finding that these change the features most.
        "bk_sdxl_base": Recipe(_PAIRS),
        "koala_1b": Recipe((*_PAIRS, "*.transformer_blocks.[6-9]")),
        "koala_700m": Recipe((*_PAIRS, "mid_block", "*.transformer_blocks.[5-9]")),
        "ssd_1b": Recipe(
            (
                *_ONE_RESNET,
                "down_blocks.2.*.transformer_blocks.[4-9]",
                "up_blocks.0.attentions.[01].transformer_blocks.[4-9]",
                "up_blocks.1.attentions.[12].transformer_blocks.1",
            )
        ),
        "vega": Recipe(
            (
                *_ONE_RESNET,
                "*.transformer_blocks.[2-9]",
                "down_blocks.1.*.transformer_blocks.1",
                "up_blocks.1.*.transformer_blocks.1",
            )
        ),
        # Those of SD 1.x and, as BK-SDM-v2, of SD 2.x.
        "bk_base": Recipe(_PAIRS),
        "bk_small": _BK_SMALL,
        "bk_tiny": Recipe((*_BK_SMALL.remove, "down_blocks.3", "up_blocks.0")),
        # Segmind's names of the same.
        "sd_small": Recipe(_PAIRS),
        "sd_tiny": Recipe((*_BK_SMALL.remove, "down_blocks.3", "up_blocks.0")),
    }
)
"""What published students lack of their teachers: SDXL, and SD 1.x or 2.x."""
