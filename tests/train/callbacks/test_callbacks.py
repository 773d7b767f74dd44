from __future__ import annotations

import logging
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from cascade.checkpoints.files import load_network, read_metadata
from cascade.errors import UserError
from stages.previewer import Previewer, PreviewerConfig
from train.callbacks.ema import WeightAverage, exported_networks
from train.callbacks.export import Export
from train.callbacks.finite import SkipNonFinite
from train.callbacks.ledger import Ledger
from train.callbacks.progress import Progress
from train.callbacks.stop import Stop


class System:
    """What the callbacks see of a Lightning system."""

    num_optimizers = 1

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.device = torch.device("cpu")
        self.logged: dict[str, float] = {}

    def exported_networks(self) -> dict[str, nn.Module]:
        return {"previewer": self.network}

    def log(self, name: str, value: float, prog_bar: bool = False) -> None:
        self.logged[name] = value


class Trainer:
    """What the callbacks see of Lightning's trainer."""

    def __init__(self) -> None:
        self.global_step = 0
        self.world_size = 1
        self.is_global_zero = True
        self.should_stop = False
        self.precision = "32-true"
        self.accumulate_grad_batches = 1
        self.strategy = types.SimpleNamespace(reduce=lambda value, reduce_op: value)
        self.callback_metrics = {"loss": torch.tensor(1.0)}
        self.train_dataloader = None


def scalar(value: float = 0.0) -> nn.Module:
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, value)
    return network


def test_the_average_follows_the_warmed_up_decay():
    system, trainer, average = System(scalar(0.0)), Trainer(), WeightAverage(0.3)
    average.on_train_start(trainer, system)
    expected = 0.0
    for step, value in enumerate([1.0, -2.0, 5.0, 7.0, 3.0]):
        trainer.global_step += 1
        nn.init.constant_(system.network.weight, value)
        average.on_train_batch_end(trainer, system, None, None, step)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert average.averages["previewer"]["weight"].item() == pytest.approx(expected)
    assert system.network.weight.item() == 3.0


def test_the_average_moves_once_a_step_and_copies_counters():
    network = nn.BatchNorm1d(1)
    system, trainer, average = System(network), Trainer(), WeightAverage(0.9)
    average.on_train_start(trainer, system)
    network(torch.randn(4, 1))
    for _ in range(3):  # micro-batches of one step
        trainer.global_step = 1
        average.on_train_batch_end(trainer, system, None, None, 0)
    assert average.num_updates == 1
    assert average.averages["previewer"]["num_batches_tracked"] == 1


def test_a_restored_average_goes_on_and_a_new_one_starts_as_a_copy():
    system, trainer, average = System(scalar(2.0)), Trainer(), WeightAverage(0.5)
    average.on_train_start(trainer, system)
    assert average.averages["previewer"]["weight"].item() == 2.0
    state = {"num_updates": 90, "averages": {"previewer": {"weight": torch.full((1, 1), 8.0)}}}
    restored = WeightAverage(0.5)
    restored.load_state_dict(state)
    restored.on_train_start(trainer, system)
    trainer.global_step = 1
    restored.on_train_batch_end(trainer, system, None, None, 0)
    assert restored.averages["previewer"]["weight"].item() == 5.0
    assert restored.state_dict()["num_updates"] == 91


def test_a_system_without_an_exported_network_is_our_mistake():
    system = System(scalar())
    system.exported_networks = dict
    with pytest.raises(ValueError, match="names no network"):
        exported_networks(system)


@pytest.fixture
def exporting(tmp_path):
    system, trainer = System(Previewer(PreviewerConfig(channels=(4, 4)))), Trainer()
    average, ledger = WeightAverage(0.5), Ledger()
    average.on_train_start(trainer, system)
    ledger.load_state_dict({"samples": 70, "seconds": 12.4})
    export = Export(tmp_path, 5, torch.bfloat16, average, ledger)
    return export, trainer, system, tmp_path / "previewer.safetensors"


def test_an_export_carries_the_average_its_configuration_and_what_it_cost(exporting):
    export, trainer, system, path = exporting
    average = export.average.averages["previewer"]
    system.network.load_state_dict({k: v + 1 for k, v in average.items()})
    trainer.global_step = 4
    export.on_train_batch_end(trainer, system, None, None, 3)
    assert not path.exists()
    trainer.global_step = 10
    system.num_optimizers = 2
    export.on_train_batch_end(trainer, system, None, None, 4)
    network = load_network(path, expect=Previewer)
    assert network.config == system.network.config
    for key, value in network.state_dict().items():
        torch.testing.assert_close(value, average[key].to(value.dtype), rtol=0, atol=0)
    assert next(network.parameters()).dtype == torch.bfloat16
    metadata = read_metadata(path)
    assert metadata["weights"] == "ema"
    assert metadata["train_steps"] == "5"
    assert (metadata["train_samples"], metadata["train_seconds"]) == ("70", "12")


def test_an_export_is_written_once_a_step_and_by_the_first_rank_alone(exporting):
    export, trainer, system, path = exporting
    trainer.is_global_zero = False
    export.on_train_end(trainer, system)
    assert not path.exists()
    trainer.is_global_zero, trainer.global_step = True, trainer.global_step + 1
    export.on_train_end(trainer, system)
    path.unlink()
    export.on_train_end(trainer, system)
    assert not path.exists()


def test_weights_that_are_not_finite_leave_the_last_export(exporting):
    export, trainer, system, path = exporting
    export.on_train_end(trainer, system)
    before = path.read_bytes()
    trainer.global_step = 5
    next(iter(export.average.averages["previewer"].values())).fill_(float("nan"))
    with pytest.raises(UserError, match="previewer: its weights are not finite at step 5"):
        export.on_train_batch_end(trainer, system, None, None, 4)
    assert path.read_bytes() == before


def progress_of(every_steps: int, *, show: bool = False) -> Progress:
    finite = SkipNonFinite(Path("nowhere"), 1)
    return Progress(every_steps, 10, Stop(None), Ledger(), finite, show=show)


def test_progress_says_step_mean_loss_rates_and_time_left(monkeypatch, caplog):
    system, trainer = System(scalar()), Trainer()
    progress = progress_of(2, show=True)
    now_s = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    progress.on_train_start(trainer, system)
    ledger = progress.ledger
    monkeypatch.setattr(ledger, "peak_memory_bytes", lambda: 3 * 2**29)
    with caplog.at_level(logging.INFO):
        for step, loss in enumerate([1.0, 2.0, 9.0], start=1):
            ledger.clock.switch("data")
            now_s += 6.0
            ledger.clock.switch("step")
            now_s += 24.0
            ledger.flops += 0.5 * progress._peak * 30.0
            trainer.global_step = step
            trainer.callback_metrics = {"loss": torch.tensor(loss)}
            progress.on_train_batch_end(trainer, system, None, [0] * 6, step - 1)
    assert caplog.messages == [
        "step 2/10: loss 1.5000, 0.2 samples/s, data wait 20%, 1.5 GiB, MFU 50%, 4.0 min left"
    ]
    assert system.logged["mfu"] == pytest.approx(0.5)


def test_progress_leaves_out_the_loss_of_a_step_that_was_left_out(caplog):
    system, trainer = System(scalar()), Trainer()
    progress = progress_of(2, show=True)
    progress.on_train_start(trainer, system)
    with caplog.at_level(logging.INFO):
        for step, loss in enumerate([float("nan"), 2.0], start=1):
            progress.finite.just_skipped = step == 1
            trainer.global_step = step
            trainer.callback_metrics = {"loss": torch.tensor(loss)}
            progress.on_train_batch_end(trainer, system, None, [0] * 6, step - 1)
    assert "loss 2.0000" in caplog.text


def test_progress_ends_a_run_whose_loss_is_lost():
    system, trainer = System(scalar()), Trainer()
    progress = progress_of(1)
    trainer.global_step = 1
    trainer.callback_metrics = {"loss": torch.tensor(float("nan"))}
    with pytest.raises(UserError, match=r"the loss is nan at step 1; lower optim\.lr"):
        progress.on_train_batch_end(trainer, system, None, [0], 0)


def test_a_time_limit_ends_the_run_after_a_step(monkeypatch):
    clock = iter([0.0, 50.0, 61.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    system, trainer, stop = System(scalar()), Trainer(), Stop(1.0)
    stop.on_train_start(trainer, system)
    stop.on_train_batch_end(trainer, system, None, None, 0)
    assert not trainer.should_stop
    stop.on_train_batch_end(trainer, system, None, None, 1)
    assert trainer.should_stop
    stop.on_train_end(trainer, system)
    assert Stop(None).seconds_left() == float("inf")
