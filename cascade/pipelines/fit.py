"""Whether the parts of a cascade were made for each other: the widths at which they meet."""

from __future__ import annotations

from cascade.errors import UserError
from cascade.text.encoder import TextEncoder
from stages.stage_a import StageA
from stages.stage_b import StageB
from stages.stage_b_v2 import StageBV2
from stages.stage_c import StageC
from stages.stage_c_v2 import StageCV2


def check_fit(
    text: TextEncoder,
    stage_c: StageC | StageCV2,
    stage_b: StageB | StageBV2,
    stage_a: StageA,
    where: str,
) -> None:
    """Let parts pass whose outputs are as wide as the inputs that they go to.

    Args:
        text: The text encoder of Stage C, and of v3's Stage B.
        stage_c: Stage C.
        stage_b: Stage B.
        stage_a: Stage A.
        where: The model's folder; an error begins with it.

    Raises:
        UserError: Naming both widths.
    """
    hidden, pooled = text.hidden_channels, text.pooled_channels
    meetings = [
        ("the text encoder's states", hidden, "Stage C", stage_c.config.text_channels),
        (
            "Stage C's latents",
            stage_c.config.latent_channels,
            "Stage B",
            stage_b.config.compressed_channels,
        ),
        (
            "Stage B's latents",
            stage_b.config.latent_channels,
            "Stage A",
            stage_a.config.latent_channels,
        ),
    ]
    for name, stage in (("Stage C", stage_c), ("Stage B", stage_b)):
        if isinstance(stage, (StageC, StageB)):
            wanted = stage.config.text_pooled_channels
            meetings.append(("the text encoder's pooled state", pooled, name, wanted))
    for what, made, reader, wanted in meetings:
        if made != wanted:
            raise UserError(
                f"{where}: {what}: {made} channels, but {reader} was made for {wanted}; "
                "the files belong to different models"
            )
