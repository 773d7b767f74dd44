"""Moving the parts of a cascade to the device and away again, through accelerate.

The weights stay in the computer's memory (or in their files, mapped into it) and are copied to the
device; going away drops the copy. Nothing is written back, so the same weights make the same
pictures before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from cascade.errors import UserError
from cascade.pipelines.memory import (
    NO_PICTURE,
    WHOLE_BLOCKS,
    Footprint,
    PictureWork,
    Workload,
    footprints,
)
from cascade.pipelines.memory_plan import (
    MemoryPlan,
    Offload,
    check_offload,
    check_vram,
    pick_plan,
    preset,
)
from cascade.pipelines.parts import CascadeParts
from cascade.pipelines.placement import Dtypes
from cascade.pipelines.plan import PicturePlan, Plan
from cascade.pipelines.prompts import PromptStates
from cascade.text.encoder import TextEncoder


def check_request(
    offload: str | None, vram: float | None, device: torch.device
) -> tuple[Offload | None, int | None]:
    """Return a known mode and a budget in bytes, each None if it was not given.

    A budget beyond the GPU's memory is all of it.

    Raises:
        UserError: For an unknown mode, a budget that is none, or memory that is not there.
    """
    mode, budget = check_offload(offload), check_vram(vram)
    if budget is None:
        return mode, None
    if device.type != "cuda":
        raise UserError(
            f"vram {vram:g}: it bounds a GPU's own memory, and {device} has none; leave it out"
        )
    # A card that is sold with 8 GB has a little less than 8 GiB.
    return mode, min(budget, torch.cuda.get_device_properties(device).total_memory)


class Placement:
    """Keeps the parts of one cascade where a plan wants them.

    Where a part's weights are at home is remembered here, so that a part comes back whole even if
    it was on its way when the user pressed Ctrl-C or the device was full.
    """

    def __init__(self, device: torch.device, parts: Mapping[str, nn.Module]) -> None:
        """Take the device and the parts by name, wherever they are; they stay there at first."""
        self.device = device
        self.plan = preset("none", str(device))
        self._parts = dict(parts)
        self._homes: dict[str, _Home] = {}
        self._visitors: dict[str, Any] = {}
        self._is_settled = True

    def apply(self, plan: MemoryPlan) -> None:
        """Undo the present plan and follow another; nothing of the old one is left.

        If it is interrupted, what uses a part next does it anew.
        """
        self.plan = plan
        self._is_settled = False
        for name in self._parts:
            self._free(name)
        # Those that go make room for those that come.
        for name in sorted(self._parts, key=lambda name: plan.way(name) == "stay"):
            self._settle(name)
        self._is_settled = True
        _clear_cache(self.device)

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """All parts by name."""
        return self._parts

    def settle(self) -> None:
        """Follow the present plan if it was not followed to the end."""
        if not self._is_settled:
            self.apply(self.plan)

    def add(self, name: str, network: nn.Module) -> None:
        """Take a part that was loaded later and place it as the plan says."""
        assert name not in self._parts, f"{name} is a part already"
        self._parts[name] = network
        try:
            self._settle(name)
        except BaseException:
            self.remove(name)
            raise

    def remove(self, name: str) -> None:
        """Forget a part; it has no hook any more, and its weights are at home."""
        self._free(name)
        del self._parts[name]

    def moves(self, name: str) -> bool:
        """Return whether a part leaves the device after its stage."""
        return self.plan.way(name) != "stay"

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        """Have a part on the device inside; however that ends, it then goes as the plan says.

        What comes layer by layer comes by itself, whenever it runs.
        """
        self.settle()
        if name not in self._homes:
            yield
            return
        network = self._parts[name]
        visitor = self._visitors.get(name)
        try:
            if visitor is not None:
                visitor.pre_forward(network)
            yield
        finally:
            # Of a layer, too, that an error kept from going by itself.
            _send_away(network)
            _clear_cache(self.device)

    @torch.inference_mode(False)
    def _free(self, name: str) -> None:
        """Free a part of hooks, from whatever state, and bring its weights home."""
        network = self._parts[name]
        self._visitors.pop(name, None)
        _remove_hooks(network)
        home = self._homes.pop(name, None)
        if home is not None:
            home.restore()

    @torch.inference_mode(False)
    def _settle(self, name: str) -> None:
        """Bring a part that is free to its place in the plan."""
        network, way = self._parts[name], self.plan.way(name)
        if way == "stay":
            network.to(self.device)
            return
        network.to("cpu")
        self._homes[name] = _Home(network)
        # It takes seconds to import, and only what is offloaded needs it.
        from accelerate import cpu_offload
        from accelerate.hooks import AlignDevicesHook

        if way == "layer":
            cpu_offload(network, self.device, preload_module_classes=list(WHOLE_BLOCKS))
            return
        # A stage is many passes and begins before the first, with what it prepares once: its two
        # ends call the hook, not each pass. Buffers, a few kilobytes, stay on the device.
        visitor = AlignDevicesHook(self.device, offload=True, place_submodules=True)
        visitor.init_hook(network)
        self._visitors[name] = visitor


class _Home:
    """The weights and buffers of a network, as they are before it is offloaded."""

    def __init__(self, network: nn.Module) -> None:
        self._parameters = [(one, dict(one._parameters)) for one in network.modules()]
        self._buffers = [(one, dict(one._buffers)) for one in network.modules()]

    def restore(self) -> None:
        """Put them back: the same tensors, so that nothing is copied and ties hold."""
        for module, parameters in self._parameters:
            module._parameters.update(parameters)
        for module, buffers in self._buffers:
            module._buffers.update(buffers)


def _send_away(network: nn.Module) -> None:
    """Drop the copies of weights that are on the device."""
    from accelerate.utils import set_module_tensor_to_device

    for module in network.modules():
        for name, weight in module._parameters.items():
            if weight is not None and not weight.is_meta:
                set_module_tensor_to_device(module, name, "meta")


def _remove_hooks(network: nn.Module) -> None:
    """Take accelerate's hooks off a network, with the ``forward`` that they leave behind.

    accelerate's own removal copies weights, and expects hooks that were attached to the end.
    """
    for module in network.modules():
        attributes = module.__dict__
        attributes.pop("_hf_hook", None)
        if "_old_forward" not in attributes:
            continue
        forward = attributes.pop("_old_forward")
        # The class's own, bound, would be a cycle that keeps the network alive.
        if getattr(forward, "__func__", None) is type(module).forward:
            attributes.pop("forward", None)
        else:
            module.forward = forward


def _clear_cache(device: torch.device) -> None:
    """Give freed memory back, so that other programs see it too."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


class Memory:
    """The memory of one pipeline: what was asked for, and the placement that keeps to it."""

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        encoders: Mapping[str, TextEncoder],
        device: torch.device,
    ) -> None:
        """Take the loaded parts by name; text encoders bring theirs."""
        self._encoders = dict(encoders)
        texts: dict[str, nn.Module] = {name: one.model for name, one in encoders.items()}
        self._placement = Placement(device, texts | dict(networks))
        self._device = device
        self._offload: Offload | None = None
        self._budget: int | None = None
        self._arranged: object = None

    @property
    def device(self) -> torch.device:
        """Where the parts run."""
        return self._device

    @property
    def plan(self) -> MemoryPlan:
        """The plan that is followed."""
        return self._placement.plan

    @property
    def has_budget(self) -> bool:
        """Whether every call gets a plan of its own."""
        return self._budget is not None

    def home(self, name: str) -> torch.device:
        """Return where to load a part, so that it is not on the device before its time."""
        return torch.device("cpu") if self._placement.moves(name) else self._device

    def on(self, name: str) -> AbstractContextManager[None]:
        """Have a part on the device inside."""
        return self._placement.on(name)

    def add(self, name: str, network: nn.Module) -> None:
        """Take a part that was loaded later."""
        self._placement.add(name, network)

    def replace(self, name: str, network: nn.Module) -> None:
        """Let a network take a part's place; the old one is forgotten."""
        self._placement.remove(name)
        self._arranged = None  # it was computed for the old one
        self._placement.add(name, network)

    @contextmanager
    def guest(self, name: str, network: nn.Module) -> Iterator[None]:
        """Have a part for one call alone."""
        self._placement.add(name, network)
        try:
            yield
        finally:
            self._placement.remove(name)

    def place(self, offload: str | None, vram: float | None) -> None:
        """Follow a mode, or keep to a budget; see ``CascadePipeline.place``.

        Raises:
            UserError: See ``check_request``.
        """
        self._offload, self._budget = check_request(offload, vram, self._device)
        self._arranged = None
        # Until a budget meets a picture of known size nothing is brought.
        waiting: Offload = "none" if self._budget is None else "model"
        self._placement.apply(preset(self._offload or waiting, str(self._device)))

    def keep_to_budget(
        self,
        workload: object,
        sizes: Callable[[Mapping[str, nn.Module]], Mapping[str, Footprint]],
        batches: Sequence[int],
        *,
        what: str,
        cell: int,
    ) -> MemoryPlan:
        """Pick and apply the memory plan for a run; without a budget the mode's is kept.

        Args:
            workload: What is worked on; of an equal one the plan is known.
            sizes: Computes what each part takes, of all parts by name.
            batches: Numbers of pictures to run together, best first.
            what: The picture, for the line.
            cell: Pixels along a side of a latent cell, for the line.

        Raises:
            UserError: If nothing fits.
        """
        self._placement.settle()
        wanted = (workload, *batches)
        if self._budget is not None and wanted != self._arranged:
            picked = pick_plan(
                sizes(self._placement.parts),
                self._budget,
                batches,
                offload=self._offload,
                what=what,
                cell=cell,
            )
            self._arranged = None  # an interrupted plan is none
            self._placement.apply(picked)
            self._arranged = wanted
        return self.plan

    def text_length(self, plan: PicturePlan) -> int:
        """Return the tokens of a plan's longest prompt, over all its windows."""
        prompts = (*{request.prompt for request in plan.requests}, plan.negative_prompt)
        return max(
            encoder.num_windows(prompt) * encoder.length
            for encoder in self._encoders.values()
            for prompt in prompts
        )

    def prompt_states(
        self, name: str, encoder: TextEncoder, prompts: Sequence[str]
    ) -> PromptStates:
        """Return the states of a run's prompts; an encoder that leaves encodes all at once."""
        ahead = prompts if self._placement.moves(name) else ()
        return PromptStates(encoder, visit=partial(self.on, name), ahead=ahead)


def batches_up_to(most: int, plan: PicturePlan, batch_size: int | None) -> list[int]:
    """Return the numbers of pictures that may run together, best first."""
    together = min(most, len(plan.requests))
    return [batch_size] if batch_size else list(range(together, 0, -1))


class CascadeMemory(Memory):
    """The memory of a cascade."""

    def __init__(self, parts: CascadeParts, device: torch.device, dtypes: Dtypes) -> None:
        """Take the loaded parts."""
        self._parts = parts
        self._dtypes = dtypes
        encoders = {"text": parts.text}
        if parts.text_b is not None:
            encoders["text_b"] = parts.text_b
        networks = {"stage_c": parts.stage_c, "stage_b": parts.stage_b, "stage_a": parts.stage_a}
        super().__init__(networks, encoders, device)

    def arrange(
        self,
        plan: Plan,
        stage_c_size: tuple[int, int],
        latent_shape: tuple[int, int, int],
        batch_size: int | None,
        most: int,
        picture: PictureWork = NO_PICTURE,
    ) -> MemoryPlan:
        """Pick and apply the memory plan for a run; without a budget the mode's is kept.

        Args:
            plan: The pictures.
            stage_c_size: Height and width of Stage C's latents.
            latent_shape: Channels, height and width of Stage B's latents.
            batch_size: Pictures that must run together; None: up to ``most``.
            most: The most that run together by themselves.
            picture: What is read of a picture; its networks have been added.

        Raises:
            UserError: If nothing fits.
        """
        length = self.text_length(plan) if self.has_budget else 0
        workload = Workload(plan.stage_c, plan.stage_b, stage_c_size, latent_shape, length, picture)
        own = self._parts

        def sizes(parts: Mapping[str, nn.Module]) -> Mapping[str, Footprint]:
            return footprints(
                own.stage_c,
                own.stage_b,
                own.stage_a,
                self._encoders,
                self._dtypes,
                workload,
                parts,
            )

        mode = "" if plan.picture is None else f" {plan.picture.mode}"
        control = "" if plan.control is None else " with a ControlNet"
        return self.keep_to_budget(
            workload,
            sizes,
            batches_up_to(most, plan, batch_size),
            what=f"{plan.width}x{plan.height}{mode}{control}",
            cell=own.stage_a.downscale,
        )
