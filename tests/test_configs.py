from __future__ import annotations

import json
import os
import re
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from cascade.checkpoints.files import on_meta
from cascade.checkpoints.hub import is_hub_name
from cascade.checkpoints.part_files import find_network
from cascade.config import from_dict, load_yaml, read_yaml
from cascade.errors import run_main
from cascade.evaluate.flops import FlopCounter
from cascade.evaluate.protocol import load_protocol
from stages.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from stages.previewer import Previewer, PreviewerConfig
from stages.semantic_compressor import SemanticCompressor
from stages.stage_a import StageA, StageAConfig
from stages.stage_a_fast import StageAFast, StageAFastConfig
from stages.stage_b import StageB, StageBConfig
from stages.stage_b_v2 import StageBV2, StageBV2Config
from stages.stage_c import StageC, StageCConfig
from stages.stage_c_v2 import StageCV2, StageCV2Config
from stages.unet.compress import PUBLISHED, plan_student
from stages.unet.config import UNetConfig
from stages.unet.unet import UNet, UNetCondition
from tests.unet_models import save_tiny
from train import __main__ as command
from train import cascade_kd_runs, runs, stage_kd_runs, step_runs, unet_runs
from train.assemble import AssembleConfig
from train.assemble_latent import AssembleLatentConfig
from train.assemble_unet import AssembleUNetConfig
from train.distill import __main__ as distill
from train.distill.few_steps_student import student_config
from train.distill.generate_config import GenerateConfig
from train.distill.plans import read_recipe
from train.losses.distillation import site_pairs
from train.study.rates import load_compression
from train.study.settings import StudyConfig
from train.study.steps import Places
from train.systems.unet import UNetRun

ROOT = Path(__file__).parents[1]
NOT_A_RUN = {"model.yaml", "model_f8.yaml", "switches.yaml", "rates.yaml"}
NOT_A_RUN |= {"cascade.yaml", "unet_model.yaml"}
"""Configurations of other commands: of train.assemble, of benchmarks/recipes.py, of train.distill,
of train.study cost."""
ALL = sorted((ROOT / "configs").rglob("*.yaml"))
PRESETS = sorted((ROOT / "configs" / "presets").glob("*.yaml"))
STUDENTS = sorted((ROOT / "configs" / "distill").glob("*.yaml"))
TEACHERS = sorted((ROOT / "configs" / "teachers").glob("*.yaml"))
PROTOCOLS = sorted((ROOT / "configs" / "protocols").glob("*.yaml"))
STUDIES = sorted((ROOT / "configs" / "study").glob("*.yaml"))
NO_RUNS = {*PRESETS, *STUDENTS, *TEACHERS, *PROTOCOLS, *STUDIES}
RUNS = [path for path in ALL if path.name not in NOT_A_RUN and path not in NO_RUNS]

EVERY_RUN = pytest.mark.parametrize(
    "path", RUNS, ids=lambda path: str(path.relative_to(ROOT / "configs"))
)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, object, bool]]:
    """What ``python -m train`` would have started: (kind, configuration, resume)."""
    calls: list[tuple[str, object, bool]] = []
    for kind in command.KINDS:

        def start(config: object, *, resume: bool, kind: str = kind) -> None:
            calls.append((kind, config, resume))

        monkeypatch.setattr(_MODULES.get(kind, runs), f"train_{kind}", start)
    return calls


_MODULES = {
    "unet": unet_runs,
    "unet_kd": unet_runs,
    "cascade_kd": cascade_kd_runs,
    "step_distil": step_runs,
    "stage_b_kd": stage_kd_runs,
    "stage_a_decoder": stage_kd_runs,
}


def _kind(path: Path) -> str:
    """``stage_c.yaml``, ``stage_c_large.yaml``, ``finetune_stage_c.yaml`` are of ``stage_c``."""
    if path.parent.name == "recipes":  # all of one network, so their names say the recipe
        return "stage_c"
    if path.parent.name == "step_distil":  # their names say the stage
        return "step_distil"
    name = path.stem.removeprefix("finetune_")
    fitting = [k for k in command.KINDS if name == k or name.startswith(f"{k}_")]
    # "unet_kd_koala" is of "unet_kd", "autoencoder" of "autoencoder_kl".
    return max(fitting or [k for k in command.KINDS if k.startswith(f"{name}_")], key=len)


def _header(path: Path) -> str:
    """Return the comment that a file opens with."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return "\n".join(lines)


def test_the_demonstration_has_a_run_of_every_network() -> None:
    folders = ("demo", "demo_koala", "cascade_kd", "step_distil")
    demo = {_kind(path) for path in RUNS if path.parent.name in folders}
    assert demo == set(command.KINDS)


@EVERY_RUN
def test_a_run_loads_as_its_name_says_and_starts_what_it_names(
    path: Path, started: list[tuple[str, object, bool]]
) -> None:
    kind = _kind(path)
    assert command.main([kind, "--config", str(path), "--resume", "--run.max_steps", "7"]) == 0
    [(begun, config, resume)] = started
    assert (begun, resume) == (kind, True)
    kind = kind.replace("unet_kd", "unet")  # the same run with a teacher
    assert type(config).__name__.lower() == kind.replace("_", "") + "run"  # "AutoencoderKLRun"
    assert config.run.max_steps == 7  # type: ignore[attr-defined]
    if path.parent.name != "recipes":
        assert Path(config.run.out).name.startswith(kind)  # type: ignore[attr-defined]


@EVERY_RUN
def test_a_run_opens_with_what_it_is_for_what_it_needs_and_what_comes_out(path: Path) -> None:
    header = _header(path)
    for word in ("Purpose", "Hardware", "Size", "Result"):
        assert re.search(rf"\b{word}: \S.{{5,}}", header), f"{path}: the header lacks {word}:"


@EVERY_RUN
def test_a_run_builds_networks_of_the_size_that_its_header_says(
    path: Path, started: list[tuple[str, object, bool]]
) -> None:
    command.main([_kind(path), "--config", str(path)])
    config = started[0][1]
    said = [float(number) for number in re.findall(r"([\d.]+) M\b", _header(path))]
    assert said, f"{path}: the header names no size"
    found = [
        sum(parameter.numel() for parameter in network.parameters()) / 1e6
        for network in _networks(_kind(path), config)
    ]
    assert [round(size, 1) for size in found] == said


def _networks(kind: str, config: object) -> list[nn.Module]:
    with on_meta():
        if kind == "clip":
            return [config.model.build(_Vocabulary(config.model.vocab_size))]  # type: ignore[attr-defined]
        if kind == "stage_b":
            compressor = config.compressor  # type: ignore[attr-defined]
            joint = [] if compressor is None else [SemanticCompressor(compressor)]
            return [_of(_sizes(config)), *joint]
        if kind == "compressor":
            return [SemanticCompressor(config.model), Previewer(config.previewer)]  # type: ignore[attr-defined]
        if kind == "step_distil":
            return [_of(_student_sizes(config))]
        return [_of(_sizes(config))]


def _student_sizes(config: object) -> object:
    """The sizes of a student of step distillation: its teacher's, and what is added to them."""
    name = config.teacher  # type: ignore[attr-defined]
    theirs = _INIT_FROM.get(name)
    if theirs is None:
        theirs = find_network(ROOT / name, config.stage).published.config  # type: ignore[attr-defined]
    told = config.guidance.is_told  # type: ignore[attr-defined]
    return student_config(theirs, told_guidance=told, time_unit=config.time_unit)  # type: ignore[attr-defined]


def _sizes(config: object) -> object:
    """The sizes of a run's network; of one without a model section, those of its init_from."""
    if config.model is None and getattr(config, "model_v2", None) is None:  # type: ignore[attr-defined]
        name = config.init_from  # type: ignore[attr-defined]
        if name.startswith("runs/demo_koala/students/"):
            teacher = load_yaml(UNetRun, ROOT / "configs/demo_koala/unet.yaml").sizes
            recipe = read_recipe(f"{ROOT}/configs/distill/demo_{Path(name).parent.name}.yaml")
            return plan_student(teacher, recipe.recipe).student
        return _INIT_FROM[name]
    return getattr(config, "sizes", config.model)  # type: ignore[attr-defined]


_STUDENTS = ("bk_base", "bk_small", "bk_tiny", "sd_small", "sd_tiny", "ssd_1b", "vega")
_INIT_FROM = {
    "stabilityai/stable-cascade:lite": StageCConfig.lite(),
    "runs/published/stage_c_lite_v/stage_c.safetensors": StageCConfig.lite(),
    "stabilityai/stable-diffusion-xl-base-1.0": UNetConfig.sdxl(),
    "nota-ai/bk-sdm-small": UNetConfig.bk_small(),
    "segmind/tiny-sd": UNetConfig.sd_tiny(),
    **{
        f"runs/published/{name}/student.safetensors": getattr(UNetConfig, name)()
        for name in (*_STUDENTS, "koala_700m", "koala_1b")
    },
}


def _of(sizes: object) -> nn.Module:
    """The network that a run builds of its sizes."""
    networks = {
        StageBV2Config: StageBV2,
        StageCV2Config: StageCV2,
        StageBConfig: StageB,
        StageCConfig: StageC,
        StageAConfig: StageA,
        StageAFastConfig: StageAFast,
        PreviewerConfig: Previewer,
        AutoencoderKLConfig: AutoencoderKL,
        UNetConfig: UNet,
    }
    return networks[type(sizes)](sizes)  # type: ignore[index, abstract]


class _Vocabulary:
    """As much of a tokenizer as a text tower's size depends on."""

    bos_token_id, eos_token_id, pad_token_id = 0, 1, 2

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


@pytest.mark.parametrize(
    "path", [path for path in RUNS if path.name.startswith("unet_kd")], ids=lambda path: path.stem
)
def test_a_distillation_imitates_as_many_places_as_published(
    path: Path, started: list[tuple[str, object, bool]]
) -> None:
    """Facts 2: eight block outputs, six of Tiny, nine of Segmind's; KOALA's 21 and 30 and two."""
    if path.parent.name != "published_unet":
        pytest.skip("not a published one")
    command.main(["unet_kd", "--config", str(path)])
    recipe = path.stem.removeprefix("unet_kd_")
    teacher = UNetConfig.sdxl() if started[0][1].text_2 else UNetConfig.sd15()  # type: ignore[attr-defined]
    pairs = site_pairs(
        started[0][1].distill.features,  # type: ignore[attr-defined]
        plan_student(teacher, PUBLISHED[recipe]),
    )
    counts = {"bk_base": 8, "bk_small": 8, "bk_tiny": 6, "sd_small": 9, "sd_tiny": 6}
    counts |= {"koala_700m": 21 + 2, "koala_1b": 30 + 2, "ssd_1b": 15 + 10 + 1, "vega": 15 + 10 + 1}
    assert len(pairs) == counts[recipe]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optim.lrr", "1"], "optim.lrr: unknown key; did you mean 'lr'?"),
        (["--run.max_steps", "many"], "run.max_steps: expected int, got 'many'"),
        (["--run.max_steps", "0"], "run: max_steps is 0"),
        (
            ["--optim.name", "adam"],
            "optim.name: 'adam' is not one of adamw, adamw8bit, muon; did you mean",
        ),
        (["--run.max_steps"], "--run.max_steps: a value is missing"),
    ],
)
def test_a_slip_on_the_command_line_starts_nothing_and_is_one_line(
    arguments: list[str],
    message: str,
    started: list[tuple[str, object, bool]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["stage_a", "--config", str(ROOT / "configs/demo/stage_a.yaml"), *arguments]
    assert run_main(lambda: command.main(argv)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert started == []


def test_a_run_of_one_network_is_refused_by_another(
    started: list[tuple[str, object, bool]], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["stage_c", "--config", str(ROOT / "configs/demo/stage_a.yaml")]
    assert run_main(lambda: command.main(argv)) == 2
    assert "unknown key" in capsys.readouterr().err
    assert started == []


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_laid_over_a_run_under_the_command_line(
    path: Path, started: list[tuple[str, object, bool]], caplog: pytest.LogCaptureFixture
) -> None:
    run = ROOT / "configs" / "demo" / "stage_c.yaml"
    arguments = ["stage_c", "--config", str(run), "--preset", path.stem, "--optim.lr", "1"]
    with caplog.at_level("INFO"):
        assert command.main([*arguments, "--run.num_nodes", "2"]) == 0
    [(_, config, _)] = started
    preset = yaml.safe_load(path.read_text())
    for section, keys in preset.items():
        assert {key: getattr(getattr(config, section), key) for key in keys} == keys
    assert (config.optim.lr, config.run.num_nodes) == (1.0, 2)  # type: ignore[attr-defined]
    assert config.run.max_steps == 2000, "what the preset does not name stays"  # type: ignore[attr-defined]
    batch = preset["data"]["batch_size"]
    assert f"data.batch_size is {batch} instead of 128" in caplog.text
    devices = preset["run"].get("devices", 1)
    assert devices * preset["run"]["accumulate"] * batch == 256, "all presets make the same step"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: {dropout: 0.1}", "model: a preset has the sections run, data and optim"),
        ("run: {acumulate: 2}", "run.acumulate: unknown key; did you mean 'accumulate'?"),
        ("run: 3", "run: a preset has the sections"),
    ],
)
def test_a_preset_that_can_t_be_is_refused_in_one_line(
    content: str,
    message: str,
    tmp_path: Path,
    started: list[tuple[str, object, bool]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "preset.yaml").write_text(content)
    run = ROOT / "configs" / "demo" / "stage_c.yaml"
    arguments = ["--config", str(run), "--preset", str(tmp_path / "preset.yaml")]
    assert run_main(lambda: command.main(["stage_c", *arguments])) == 2
    assert started == []
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_script_trains_what_is_there_under_a_kind_that_is_known(tmp_path: Path) -> None:
    """Its last steps come after hours: every name must lead to a command that starts."""
    script = (ROOT / "configs/demo/make.sh").read_text()
    names = re.findall(r"^train (\w+)$", script, re.MULTILINE)
    assert len(names) >= 6
    function = re.search(r"^train\(\) \{.*?^\}", script, re.MULTILINE | re.DOTALL)
    assert function is not None
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)
    calls = "\n".join(f"train {name} || true" for name in names)
    said = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"{function[0]}\n{calls}"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name, line in zip(names, said, strict=True):
        config = ROOT / "configs/demo" / f"{name}.yaml"
        assert config.is_file()
        assert line == f"-m train {_kind(config)} --config configs/demo/{name}.yaml --resume"


@pytest.mark.parametrize("path", PROTOCOLS, ids=lambda path: path.stem)
def test_protocols_parse_and_say_what_they_are(path: Path) -> None:
    protocol = load_protocol(path)
    assert protocol.name == path.stem
    header = _header(path)
    for word in ("Purpose:", "Hardware:", "Size:", "Result:"):
        assert word in header, word
    assert "FILL" not in header


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_studys_trainings_and_models_and_protocol_parse(
    path: Path, started: list[tuple[str, object, bool]], tmp_path: Path
) -> None:
    swept = "arm" in read_yaml(path)
    study = load_compression(path).study if swept else load_yaml(StudyConfig, path)
    assert study.name == path.stem
    for word in ("Purpose:", "Hardware:", "Size:", "Result:"):
        assert word in _header(path), word
    assert load_protocol(study.judge.protocol)
    places = Places(tmp_path / "here", tmp_path / "shared", 0)
    for arm in study.arms:
        for step in arm.steps:
            assert step.config is None or Path(step.config).is_file()
            if step.train is not None:
                words = [word for k, v in step.set.items() for word in (f"--{k}", places.fill(v))]
                assert command.main([step.train, "--config", str(step.config), *words]) == 0
                assert started.pop()[0] == step.train
        cls = {
            "train.assemble": AssembleConfig,
            "train.assemble_unet": AssembleUNetConfig,
            "train.assemble_latent": AssembleLatentConfig,
        }
        options = {k: places.fill(v, tmp_path / "weights") for k, v in arm.model.set.items()}
        load_yaml(
            cls[arm.model.command], arm.model.config, [f"{k}={v}" for k, v in options.items()]
        )
        for weights in arm.given:
            # A teacher and what a run makes first are not shipped; the study asks for them itself.
            made = weights.startswith("runs/") or is_hub_name(weights)
            assert made or Path(weights).is_file(), weights


@pytest.mark.parametrize("path", TEACHERS, ids=lambda path: path.stem)
def test_a_teachers_file_says_what_its_pictures_cost(path: Path) -> None:
    """Operations are counted on the published sizes; hours are those of the device it names."""
    values = {"prompts": "x", "out": "x", **read_yaml(path)}
    config = from_dict(GenerateConfig, values, str(path))
    header = " ".join(_header(path).split())
    for word in ("Purpose", "Hardware", "Size", "Result", "Cost", "Licence"):
        assert re.search(rf"\b{word}: \S.{{5,}}", header), f"{path}: the header lacks {word}:"
    side = (config.sides[0] or 0) // 8
    with on_meta():
        unet, autoencoder = UNet(UNetConfig.sdxl()), AutoencoderKL(AutoencoderKLConfig())
    assert f"{sum(p.numel() for p in unet.parameters()) / 1e6:.1f} M parameters" in header
    calls = (config.steps or 0) * (1 if config.guidance == 1 else 2)
    assert calls > 0

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(1, *shape, device="meta")

    with torch.inference_mode(), FlopCounter(take_apart=True) as calling:
        told = unet.prepare(UNetCondition(empty(77, 2048), empty(1280), empty(6)))
        before = calling.total
        unet(empty(4, side, side), torch.empty(1, device="meta"), told)
    with torch.inference_mode(), FlopCounter(take_apart=True) as decoding:
        autoencoder.decode(empty(4, side, side))
    total = calls * (calling.total - before) + decoding.total
    assert f"Cost: {total / 1e12:.1f} TFLOP a picture" in header
    hours = float(re.findall(r"([\d.]+) hours a million at 395 TFLOP/s", header)[0])
    assert hours == pytest.approx(total * 1e6 / 395e12 / 3600, rel=0.01)


@pytest.mark.parametrize("path", TEACHERS, ids=lambda path: path.stem)
def test_a_teachers_file_makes_shards_of_tiny_random_weights(path: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "sdxl")
    (tmp_path / "prompts.txt").write_text("red apple\nblue fish\n")
    words = ["--config", str(path), "--teacher", str(model), "--size", "16", "--device", "cpu"]
    words += ["--prompts", f"{tmp_path}/prompts.txt", "--out", f"{tmp_path}/out"]
    if read_yaml(path).get("unet"):
        words += ["--unet", str(model / "unet")]
    assert distill.main(["generate", *words]) == 0
    with tarfile.open(tmp_path / "out" / "teacher-000000.tar") as tar:
        names = tar.getnames()
        made_by = json.load(tar.extractfile("teacher-00000001.json"))["made_by"]  # type: ignore[arg-type]
    assert "teacher-00000001.autoencoder_mean.npy" in names and len(names) == 8
    wanted = from_dict(GenerateConfig, {"prompts": "x", "out": "x", **read_yaml(path)}, "")
    for name in ("steps", "guidance", "sampler", "spacing"):
        assert made_by["settings"]["unet"][name] == getattr(wanted, name)
