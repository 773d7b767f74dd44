"""LPIPS: how far two pictures are apart to a network that sees as people do.

The trunk's weights (torchvision's AlexNet or VGG-16 for ImageNet) come from a local file; the
linear heads are those of the authors, version 0.1, which torchmetrics carries in its package.
Where there is no trunk, :class:`PatchDistance` measures with the tokens of a CLIP picture tower
instead; its figures are no LPIPS and carry the CLIP's name.
"""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.checkpoints.files import assign_strictly
from cascade.errors import UserError
from cascade.evaluate.weight_files import read_state
from cascade.placed import example_of
from cascade.text.picture_encoder import PictureEncoder, centre_square

Trunk = Literal["alex", "vgg"]
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_EPS = 1e-8
_ENDS = {"alex": (2, 5, 8, 10, 12), "vgg": (4, 9, 16, 23, 30)}
"""Where the trunk's five slices end, each at a ReLU."""
_CHANNELS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}
_HEADS = "functional/image/lpips_models"


def _alex() -> nn.Sequential:
    """AlexNet's convolutions, numbered as torchvision's."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    )


def _vgg() -> nn.Sequential:
    """VGG-16's convolutions, numbered as torchvision's."""
    layers: list[nn.Module] = []
    widths = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
    channels = 3
    for index, group in enumerate(widths):
        if index:
            layers.append(nn.MaxPool2d(2, stride=2))
        for width in group:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers)


class Lpips(nn.Module):
    """Pairs of pictures to distances.

    Reference: Zhang et al., 2018, arXiv:1801.03924, version 0.1 of the authors' weights.
    """

    def __init__(self, trunk: Trunk) -> None:
        """Build trunk and heads without weights of use."""
        super().__init__()
        self.trunk: Trunk = trunk
        self.features = _alex() if trunk == "alex" else _vgg()
        self.heads = nn.ParameterList(torch.zeros(count) for count in _CHANNELS[trunk])

    @classmethod
    def from_file(cls, path: Path, heads: Path | None = None) -> Lpips:
        """Load torchvision's AlexNet or VGG-16, told by its shapes, and its heads.

        Args:
            path: The trunk: ``.pth`` or safetensors.
            heads: File of the heads; None takes torchmetrics' own.

        Raises:
            UserError: If a file is missing, or holds something else.
        """
        state = read_state(path)
        first = state.get("features.0.weight")
        trunk: Trunk = "alex" if first is not None and first.shape[-1] == 11 else "vgg"
        with torch.device("meta"):
            network = cls(trunk)
        kept = {key: value for key, value in state.items() if key.startswith("features.")}
        heads = heads or _shipped_heads(trunk)
        for index, value in enumerate(_read_heads(heads)):
            kept[f"heads.{index}"] = value
        assign_strictly(network, kept, str(path))
        return network.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, pixels: Tensor, reference: Tensor) -> Tensor:
        """Return ``(B,)`` distances of pictures ``(B, 3, H, W)`` in [0, 1]; 0 is the same."""
        weight = self.heads[0]
        distance = torch.zeros(len(pixels), device=weight.device)
        pairs = zip(self._slices(pixels), self._slices(reference), strict=True)
        for head, (found, wanted) in zip(self.heads, pairs, strict=True):
            squared = (_unit(found) - _unit(wanted)).square()
            distance += (squared * head.view(1, -1, 1, 1)).sum(dim=1).mean(dim=(1, 2))
        return distance.cpu()

    def _slices(self, pixels: Tensor) -> list[Tensor]:
        weight = self.heads[0]
        x = 2 * pixels.to(weight.device, torch.float32) - 1
        x = (x - x.new_tensor(_SHIFT).view(1, 3, 1, 1)) / x.new_tensor(_SCALE).view(1, 3, 1, 1)
        found = []
        for start, end in pairwise((0, *_ENDS[self.trunk])):
            x = self.features[start:end](x)
            found.append(x)
        return found


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(dim=1, keepdim=True) + _EPS).sqrt()


def _shipped_heads(trunk: Trunk) -> Path:
    found = importlib.util.find_spec("torchmetrics")
    if found is None or found.origin is None:
        raise UserError('LPIPS needs its heads from torchmetrics: pip install -e ".[eval]"')
    return Path(found.origin).parent / _HEADS / f"{trunk}.pth"


def _read_heads(path: Path) -> list[Tensor]:
    state = read_state(path)
    keys = [f"lin{index}.model.1.weight" for index in range(5)]
    if missing := [key for key in keys if key not in state]:
        raise UserError(f"{path}: not the heads of LPIPS: {missing[0]} is missing")
    return [state[key].float().flatten() for key in keys]


class PatchDistance:
    """The distance of two pictures between the tokens of a CLIP picture tower: LPIPS's form.

    After each block the tokens of the patches are brought to unit length; squared differences are
    summed over the channels and averaged over patches and blocks. No head was ever fitted to what
    people see, so it orders pictures of one kind and says nothing beside a LPIPS.
    """

    def __init__(self, encoder: PictureEncoder) -> None:
        """Take the picture tower."""
        self._encoder = encoder

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, reference: Tensor) -> Tensor:
        """Return ``(B,)`` distances of pictures ``(B, 3, H, W)`` in [0, 1]; 0 is the same."""
        pairs = zip(self._tokens(pixels), self._tokens(reference), strict=True)
        layers = [
            (F.normalize(found, dim=-1) - F.normalize(wanted, dim=-1)).square().sum(-1).mean(-1)
            for found, wanted in pairs
        ]
        return torch.stack(layers).mean(dim=0).cpu()

    def _tokens(self, pixels: Tensor) -> list[Tensor]:
        """Return the patches' tokens ``(B, P, C)`` after each block."""
        model: Any = self._encoder.model
        prepared = self._encoder.preprocessing(
            centre_square(pixels).float().to(example_of(model).device)
        )
        states = model(pixel_values=prepared, output_hidden_states=True).hidden_states
        return [state[:, 1:].float() for state in states[1:]]  # without the class token
