from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

import sample
from cascade.checkpoints.files import load_network, read_metadata, save_network
from cascade.diffusion.samplers import SAMPLERS
from cascade.diffusion.trigflow import clean, turned
from cascade.errors import UserError, run_main
from cascade.pipelines.cascade import CascadePipeline
from cascade.pipelines.few_steps import DISTILLED_KEY
from stages.layers import TimestepBlock
from stages.stage_b import StageB
from stages.stage_c import StageC, StageCCondition, StageCConfig
from train.assemble import main as assemble_main
from train.assemble import sampling_said
from train.data.cached import CachedBatch
from train.distill.few_steps_student import copy_teacher, student_config
from train.distill.stage_teacher import StageTeacher, captured, evenly
from train.distill.teacher_walk import walked
from train.draws import StepDraws
from train.losses.consistency import TangentConfig
from train.settings import RunConfig
from train.systems.step_distil import StepDistilSystem
from train.systems.step_distil_config import GuidanceConfig, StepDistilRun, StepsConfig


def refused(run: object, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert run_main(lambda: run.start(*arguments)) == 2  # type: ignore[attr-defined]
    lines = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def teacher(tiny_model: Path) -> StageTeacher:
    found = StageTeacher(str(tiny_model), "stage_c")
    found.load(torch.device("cpu"))
    return found


def told(count: int = 3) -> tuple[StageCCondition, StageCCondition]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, count, 4, 16, generator=generator)
    pooled = torch.randn(2, count, 12, generator=generator)
    cond, uncond = (StageCCondition(*one) for one in zip(states, pooled, strict=True))
    return cond, uncond


def point(count: int = 3) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 16, 2, 2, generator=torch.Generator().manual_seed(1))
    return x, torch.linspace(0.2, 1.4, count)


def test_a_student_begins_as_its_teacher_whatever_scale_it_is_told(teacher: StageTeacher) -> None:
    sizes = student_config(teacher.config, told_guidance=True, time_unit=1.0)
    assert sizes.time_conds == ("cfg",)
    student = StageC(sizes)
    assert copy_teacher(teacher.network, student) == 0.0
    cond, _ = told()
    x, t = torch.randn(3, 16, 2, 2), torch.tensor([0.1, 0.5, 0.9])
    for scale in (1.0, 7.0):
        said = student(x, t, dataclasses.replace(cond, cfg=torch.full((3,), scale)))
        torch.testing.assert_close(said, teacher.network(x, t, cond))
    with torch.no_grad():
        for block in student.modules():
            if isinstance(block, TimestepBlock):
                block.extra_mappers["cfg"].weight.fill_(0.1)
    one, other = (
        student(x, t, dataclasses.replace(cond, cfg=torch.full((3,), w))) for w in (1.0, 7.0)
    )
    assert (one - other).abs().max() > 1e-4


def test_slow_waves_take_the_place_of_fast_ones() -> None:
    """Slow modulations are kept whole; what jitters in time is dropped."""
    config = StageCConfig(
        cond_channels=8,
        hidden_channels=(8,),
        num_heads=(2,),
        down_blocks=(1,),
        up_blocks=(1,),
        text_channels=6,
        text_pooled_channels=5,
        time_conds=(),
    )
    old = StageC(config)
    new = StageC(student_config(config, told_guidance=False, time_unit=1e-3))
    blocks = [one for one in old.modules() if isinstance(one, TimestepBlock)]
    with torch.no_grad():
        for block in blocks:
            block.mapper.weight[:, -4:].normal_()  # the slowest cosines
    assert copy_teacher(old, new) < 0.02
    with torch.no_grad():
        for block in blocks:
            block.mapper.weight.zero_()
            block.mapper.weight[:, :4].normal_()  # the fastest sines
    assert copy_teacher(old, new) > 0.9


def test_the_teachers_velocity_is_guided(teacher: StageTeacher) -> None:
    (cond, uncond), (x, angle) = told(), point()
    plain, without, guided = (
        teacher.velocity(x, angle, cond, uncond, torch.full((3,), scale))
        for scale in (1.0, 0.0, 3.0)
    )
    torch.testing.assert_close(guided, without + 3.0 * (plain - without), atol=1e-4, rtol=1e-4)
    assert not guided.requires_grad


def test_guidance_that_is_off_costs_one_pass(tiny_model: Path, teacher: StageTeacher) -> None:
    (cond, uncond), (x, angle), counted = told(), point(), []
    teacher.network.register_forward_hook(lambda _, inputs, __: counted.append(len(inputs[0])))
    plain = teacher.velocity(x, angle, cond, None, torch.ones(3))
    torch.testing.assert_close(plain, teacher.velocity(x, angle, cond, uncond, torch.ones(3)))
    assert counted == [3, 6]
    off = make_system(tiny_model, teacher, guidance=GuidanceConfig(1.0, 1.0, 1.0))
    assert off.told(synthetic_batch()).uncond is None
    assert make_system(tiny_model, teacher).told(synthetic_batch()).uncond is not None


def test_features_have_the_gradient_of_what_is_shown_and_leave_no_hook(
    teacher: StageTeacher,
) -> None:
    cond, _ = told()
    x, angle = point()
    names = evenly(teacher.network, 2)
    assert names == ["down_blocks.1.0", "up_blocks.1.0"]
    shown = teacher.features(x.requires_grad_(), angle, cond, names)
    sum(one.sum() for one in shown).backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    with captured(teacher.network, names):
        assert teacher.network.get_submodule(names[0])._forward_hooks
    assert not teacher.network.get_submodule(names[0])._forward_hooks
    with pytest.raises(ValueError, match="9 blocks are wanted, the network has 4"):
        evenly(teacher.network, 9)


def make_system(tiny_model: Path, teacher: StageTeacher, **changes: object) -> StepDistilSystem:
    run = RunConfig(out="unused", max_steps=4, precision="32-true")
    values: dict[str, object] = {"run": run, "data": None, "stage": "stage_c", **changes}
    names = {"teacher": str(tiny_model), "text": "unused", "compressor": "unused"}
    config = StepDistilRun(**names, **values)  # type: ignore[arg-type]
    sizes = student_config(teacher.config, told_guidance=True, time_unit=config.time_unit)
    system = StepDistilSystem(config, sizes, teacher, (torch.zeros(4, 16), torch.zeros(12)))
    copy_teacher(teacher.network, system.network)
    return system


def synthetic_batch() -> CachedBatch:
    cond, _ = told(4)
    return CachedBatch(
        captions=[""] * 4,
        groups=torch.zeros(4),
        stage_c_latents=torch.randn(4, 16, 2, 2, generator=torch.Generator().manual_seed(2)),
        text_hidden=cond.text_hidden,
        text_pooled=cond.text_pooled,
    )


@pytest.mark.parametrize("objective", ["consistency", "multistep", "guidance"])
def test_the_gradient_reaches_the_student_and_never_the_teacher(
    objective: str, tiny_model: Path, teacher: StageTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = make_system(tiny_model, teacher, objective=objective)
    monkeypatch.setattr("train.systems.step_distil.step_draws", lambda *_: StepDraws(0, step=2))
    monkeypatch.setattr(system, "log", lambda *_, **__: None)
    before = {name: value.clone() for name, value in teacher.network.state_dict().items()}
    optimizer = torch.optim.SGD(system.parameters(), lr=0.1)
    loss = system.training_step(synthetic_batch(), 0)
    loss.backward()
    without = [name for name, one in system.network.named_parameters() if one.grad is None]
    assert without == []
    scale = [one for name, one in system.network.named_parameters() if "cfg" in name]
    assert scale and all(one.grad.abs().sum() > 0 for one in scale if one.grad is not None)
    assert all(one.grad is None and not one.requires_grad for one in teacher.network.parameters())
    assert not any("teacher" in name for name, _ in system.named_parameters())
    optimizer.step()
    after = teacher.network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def learned(system: StepDistilSystem, steps: int, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Learn one batch by heart; return the losses."""
    monkeypatch.setattr("train.systems.step_distil.step_draws", lambda *_: StepDraws(0, step=2))
    monkeypatch.setattr(system, "log", lambda *_, **__: None)
    optimizer = torch.optim.Adam(system.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = system.training_step(synthetic_batch(), 0)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_guidance_in_one_pass_is_learned(
    tiny_model: Path, teacher: StageTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = make_system(tiny_model, teacher, objective="guidance")
    losses = learned(system, 60, monkeypatch)
    assert losses[-1] < 0.1 * losses[0]


def test_a_student_of_guidance_keeps_its_steps_and_says_its_scales(make_run) -> None:
    run = make_run(
        "step_distil",
        objective="guidance",
        guidance={"low": 1.0, "high": 6.0, "default": 3.0},
    )
    assert run.start("--run.max_steps", 1) == 0
    said = sampling_said(str(run.out / "stage_c.safetensors"))
    assert said is not None
    assert (said.sampler, said.guidance, said.guidance_range) == ("ddpm", 3.0, (1.0, 6.0))
    assert not said.is_guided_by_passes and said.max_steps is None
    # It is a teacher itself: of the scales that it knows.
    path = str(run.out / "stage_c.safetensors")
    known = {"low": 2.0, "high": 5.0, "default": 3.0}
    assert make_run("step_distil", "next", teacher=path, guidance=known).start() == 0


@pytest.mark.parametrize("objective", ["guidance", "multistep"])
@pytest.mark.parametrize("stage", ["stage_b", "stage_c"])
def test_either_stage_learns_guidance_and_jumps_from_step_to_step(
    stage, objective, make_run, tiny_model
):
    more = {"stage_a": str(tiny_model / "stage_a.safetensors")} if stage == "stage_b" else {}
    times = [1.0, 0.6, 0.0]
    steps = {"steps": 2, "times": times} if objective == "multistep" else {}
    run = make_run("step_distil", stage=stage, objective=objective, sampling=steps, **more)
    assert run.start("--run.max_steps", 3) == 0
    assert len(run.losses()) == 3 and all(math.isfinite(one) for one in run.losses())
    assert all(("error_of_step_2" in row) is (objective == "multistep") for row in run.metrics())
    said = sampling_said(str(run.out / f"{stage}.safetensors"))
    assert said is not None
    if objective == "guidance":
        assert (said.sampler, said.max_steps) == ("ddpm", None)
    else:
        assert (said.sampler, said.steps, said.max_steps) == ("ddim", 2, 2)
        assert said.times == tuple(times)


def test_a_path_is_walked_closer_the_smaller_the_steps() -> None:
    std, bounds = 0.3, torch.tensor([math.pi / 2, 1.2, 0.7, 0.0], dtype=torch.float64)
    noise = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def spread(angle: Tensor) -> Tensor:
        return (std**2 * angle.cos().square() + angle.sin().square()).sqrt()

    def teacher(x: Tensor, angle: Tensor) -> Tensor:  # of N(0, std^2)
        rate = angle.sin() * angle.cos() * (1.0 - std**2) / spread(angle).square()
        return rate[:, None] * x

    wanted = spread(bounds)[:, None, None] * noise
    errors = [float((walked(teacher, noise, bounds, k) - wanted).abs().max()) for k in (4, 8, 16)]
    assert errors[0] < 0.05 and errors[1] < errors[0] / 4 and errors[2] < errors[0] / 8


def test_a_student_of_steps_lands_where_its_teacher_walks(
    tiny_model: Path, teacher: StageTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = (1.0, 0.6, 0.0)
    system = make_system(
        tiny_model,
        teacher,
        objective="multistep",
        sampling=StepsConfig(steps=2, times=times),
        guidance=GuidanceConfig(3.0, 3.0, 3.0),
        time_unit=1.0,
    )
    losses = learned(system, 150, monkeypatch)
    assert losses[-1] < 0.1 * losses[0]
    # A step of the file's own sampler is the jump that was trained.
    cond, _ = told(4)
    noise = StepDraws(0, step=2).normal("noise", (4, 16, 2, 2))
    bounds, flow = system.bounds(), teacher.trigflow
    torch.testing.assert_close(bounds[:2], flow.angle_of(torch.tensor(times[:2])))
    assert bounds[2] == 0

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        angle = flow.angle_of(t).expand(len(x))
        return clean(system.student(cond)(x, angle), x, angle)

    x = noise
    with torch.no_grad():
        drawn = SAMPLERS["ddim"](denoise, flow.schedule, noise, torch.tensor(times))
        for angle, end in pairwise(bounds):
            velocity = system.student(cond)(x, angle.expand(4))
            x = (angle - end).cos() * x - (angle - end).sin() * velocity
    torch.testing.assert_close(drawn, x, rtol=1e-3, atol=1e-3)


def test_a_warm_up_begins_anew_only_without_an_earlier_student(tiny_model, teacher) -> None:
    for tangent, init_from, steps in (
        (TangentConfig(), None, 1000),
        (TangentConfig(), "x.safetensors", 0),
        (TangentConfig(warmup_steps=7), "x.safetensors", 7),
    ):
        system = make_system(tiny_model, teacher, tangent=tangent, init_from=init_from)
        assert system._warmup_steps == steps


@pytest.mark.parametrize("prediction", ["epsilon", "flow", "x0"])
@pytest.mark.parametrize("stage", ["stage_b", "stage_c"])
def test_either_stage_learns_from_any_teacher(stage, prediction, make_run, tiny_model, tmp_path):
    kind = StageB if stage == "stage_b" else StageC
    path = tmp_path / "teacher.safetensors"
    schedule = "cosine" if prediction == "epsilon" else "linear"
    values = {"prediction": prediction, "schedule": schedule, "zero_terminal_snr": False}
    metadata = {"cascade_diffusion": json.dumps(values | {"time_input": "cosine"})}
    network = load_network(tiny_model / f"{stage}.safetensors", expect=kind)
    save_network(path, network, metadata=metadata)
    more = {"stage_a": str(tiny_model / "stage_a.safetensors")} if stage == "stage_b" else {}
    run = make_run(
        "step_distil",
        stage=stage,
        teacher=str(path),
        adversarial={"weight": 0.3, "blocks": 2},
        adaptive_weight=True,
        **more,
    )
    assert run.start("--run.max_steps", 2) == 0
    rows = [row for row in run.metrics() if row["loss"]]
    assert {"tangent", "adversarial", "heads", "error"} <= rows[0].keys()
    written = read_metadata(run.out / f"{stage}.safetensors")
    assert json.loads(written["cascade_diffusion"])["prediction"] == prediction
    said = json.loads(written[DISTILLED_KEY])
    assert (said["sampler"], said["steps"], said["max_steps"]) == ("lcm", 4, 8)


@pytest.fixture
def model(make_run, tiny_model: Path, clip_folder: Path, tmp_path: Path) -> Path:
    """A model folder with a second Stage C for few steps."""
    run = make_run("step_distil", guidance={"low": 1.0, "high": 6.0, "default": 3.0})
    assert run.start("--run.max_steps", 4) == 0
    names = ("stage_a", "stage_b", "stage_c", "compressor", "previewer")
    values: dict[str, object] = {name: f"{tiny_model}/{name}.safetensors" for name in names}
    values |= {"text": str(clip_folder), "stage_c_few": str(run.out / "stage_c.safetensors")}
    spec = json.loads((tiny_model / "model.json").read_text())
    spec["stage_c"]["steps"] = 12
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump({**values, "spec": spec}))
    assert assemble_main(["--config", str(path), "--out", str(tmp_path / "model")]) == 0
    return tmp_path / "model"


def test_a_student_alone_is_assembled_with_the_steps_that_it_takes(
    model: Path, tmp_path: Path
) -> None:
    spec = json.loads((model / "model.json").read_text())
    student = spec.pop("stage_c_few")
    names = ("stage_a", "stage_b", "compressor", "previewer")
    values: dict[str, object] = {name: f"{model}/{name}.safetensors" for name in names}
    values |= {"text": f"{model}/text", "stage_c": f"{model}/stage_c_few.safetensors"}
    path = tmp_path / "alone.yaml"
    command = ["--config", str(path), "--out", str(tmp_path / "alone")]
    path.write_text(
        yaml.safe_dump({**values, "spec": spec | {"stage_c": student | {"max_steps": None}}})
    )
    with pytest.raises(UserError, match="trained with max_steps 8"):
        assemble_main(command)
    path.write_text(yaml.safe_dump({**values, "spec": spec | {"stage_c": student}}))
    assert assemble_main(command) == 0


def test_steps_say_which_network_draws(model: Path) -> None:
    pipeline = CascadePipeline.from_folder(model, device="cpu", dtype="float32")
    assert pipeline.few == {"stage_c"} and "cfg" in pipeline.stage_c.config.time_conds
    counted: list[int] = []

    def drawn(**settings: object) -> Tensor:
        counted.clear()
        output = pipeline("a red apple", seed=1, progress=False, **settings)
        return output.stage_c_latents

    def count(module: object, inputs: tuple[Tensor, ...], output: object) -> None:
        counted.append(len(inputs[0]))

    pipeline.stage_c.register_forward_hook(count)
    four = drawn()
    assert counted == [1] * 4  # one pass a step
    torch.testing.assert_close(drawn(), four, atol=0, rtol=0)
    drawn(steps_c=2)
    assert counted == [1, 1]
    assert (drawn(guidance_c=5.0) - four).abs().max() > 0
    plain = drawn(steps_c=20)
    assert pipeline.few == frozenset() and pipeline.stage_c.config.time_conds == ()
    alone = CascadePipeline.from_folder(model, device="cpu", dtype="float32")
    alone.use(frozenset())
    told = alone("a red apple", seed=1, steps_c=20, progress=False).stage_c_latents
    torch.testing.assert_close(plain, told, atol=0, rtol=0)
    torch.testing.assert_close(drawn(steps_c=4), four, atol=0, rtol=0)
    assert drawn(sampler="ddim").shape == four.shape and pipeline.few == frozenset()


def test_sample_says_which_network_draws(model: Path, tmp_path: Path, capsys) -> None:
    words = ["--prompt", "a red apple", "--model", str(model), "--seed", "1", "--device", "cpu"]
    assert sample.main([*words, "--out", str(tmp_path / "few.png"), "--steps-c", "4"]) == 0
    assert "(Stage C for few steps, 4)" in capsys.readouterr().out
    assert sample.main([*words, "--out", str(tmp_path / "plain.png"), "--steps-c", "9"]) == 0
    assert "few steps" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--guidance-c", "9"], "guidance_c 9: 1 to 6 were distilled into this network"),
        (["--steps-c", "2", "--sampler", "ddim"], "was distilled for few steps of 'lcm'"),
        (["--steps-c", "9", "--sampler", "lcm"], "steps were not distilled into this Stage C"),
    ],
)
def test_what_was_not_distilled_is_refused_in_one_line(words, message, model, tmp_path, capsys):
    given = ["--prompt", "a hat", "--model", str(model), "--out", str(tmp_path / "x.png"), *words]
    assert run_main(lambda: sample.main(given)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "stage_b"], "stage_a is missing"),
        (["--stage", "stage_a"], "stage"),
        (["--stage_a", "x"], "knows no stage_a"),
        (["--teacher", "/none"], "/none: no such file or folder"),
        (["--taught.prediction", "v"], "taught.prediction is v but"),
        (["--guidance.low", "0.5"], "1 <= low <= default <= high"),
        (["--guidance.default", "9"], "1 <= low <= default <= high"),
        (["--time_unit", "0"], "time_unit is 0"),
        (["--tangent.derivative", "exact"], "tangent.derivative"),
        (["--tangent.normalize", "-1"], "must be positive, or null"),
        (["--adversarial.weight", "1", "--objective", "guidance"], "objective is guidance"),
        (["--adversarial.weight", "1", "--adversarial.blocks", "9"], "the network has 4"),
        (["--sampling.steps", "9"], "steps is 9, max_steps 8"),
        (["--small_steps", "0"], "small_steps is 0"),
        (["--objective", "guidance", "--tangent.warmup_steps", "9"], "only consistency has one"),
        (["--objective", "multistep", "--angles.mean", "1"], "give sampling.times"),
        (
            ["--objective", "multistep", "--sampling.steps", "1", "--sampling.times", "[0.9, 0]"],
            "goes from 1 to 0",
        ),
        (["--angles.last_share", "2"], "last_share=2"),
        (["--run.strategy", "fsdp"], "use ddp"),
        (["--objectiv", "guidance"], "objective"),
    ],
)
def test_bad_runs_are_refused_in_one_line(arguments, message, make_run, capsys) -> None:
    assert message in refused(make_run("step_distil"), capsys, *arguments)


def test_a_student_for_few_steps_is_no_teacher(make_run, capsys) -> None:
    first = make_run("step_distil", "first")
    assert first.start("--run.max_steps", 1) == 0
    path = str(first.out / "stage_c.safetensors")
    second = make_run("step_distil", "second", teacher=path)
    assert "a student for few steps itself" in refused(second, capsys)
    third = make_run("step_distil", "third", init_from=path)
    assert third.start("--run.max_steps", 1) == 0
    said = refused(third, capsys, "--resume", "--time_unit", "0.01")
    assert "time_unit is 0.01 but the run was started with 0.001" in said


def test_points_of_a_path_have_unit_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 2000, 2, generator=generator)
    assert turned(x0, noise, torch.full((2000,), 0.7)).var() == pytest.approx(1.0, abs=0.05)
