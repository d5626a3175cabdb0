"""The authors' recipe: networks in their naming, settings of their commands, and trainings of generated samples."""

import argparse
import math
import os
import pickle
import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest

pytest.importorskip("rich")

import numpy as np
import torch
from torch.nn import functional

import asgl_cuda
from benchmarks.learning.recipe import __main__ as program
from benchmarks.learning.recipe import data
from benchmarks.learning.recipe.networks import neurons_of
from benchmarks.learning.recipe.presets import BASELINES, PRESETS, scheduled_width
from benchmarks.learning.recipe.training import Options, Training, checkpoint_of, loss_of, settings_in

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- the authors' networks in plain PyTorch, of the state dicts in their naming ----


class Loop:
    """Computes by the values of a state dict, in evaluation, and notes their names."""

    def __init__(self, state, settings):
        self.state, self.settings, self.used = state, settings, set()

    def __getitem__(self, name):
        self.used.add(name)
        return self.state[name]

    def conv(self, x, conv, norm, stride=1):
        weight = self[f"{conv}.layer.weight"]
        c = functional.conv2d(x.flatten(0, 1), weight, None, stride, weight.shape[-1] // 2)
        values = (self[f"{norm}.layer.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
        return functional.batch_norm(c, *values).unflatten(0, x.shape[:2])

    def neurons(self, x, name):
        decay, v, out = self[f"{name}.cell.decay"].sigmoid() if self.settings.learn_decay else 0.5, 0, []
        for current in x:
            v = decay * v + current
            spike = (v >= self.settings.threshold).to(x)
            v = v * (1 - spike)
            out.append(self.settings.threshold * spike)
        return torch.stack(out)

    def block(self, x, name, stride):
        hidden = self.neurons(self.conv(x, f"{name}.conv1", f"{name}.bn1", stride), f"{name}.spike1")
        same = f"{name}.shortcut.0.layer.weight" not in self.state
        other = x if same else self.conv(x, f"{name}.shortcut.0", f"{name}.shortcut.1", stride)
        return self.neurons(self.conv(hidden, f"{name}.conv2", f"{name}.bn2") + other, f"{name}.spike2")

    def resnet19(self, x):
        x = self.neurons(self.conv(x, "conv0.0", "conv0.1"), "conv0.2")
        for stage, depth in ((1, 3), (2, 3), (3, 2)):
            for place in range(depth):
                x = self.block(x, f"layer{stage}.{place}", 2 if stage > 1 and place == 0 else 1)
        x = self.neurons(x.mean((-2, -1)) @ self["classifier.0.layer.weight"].T, "classifier.1")
        return x @ self["classifier.2.layer.weight"].T

    def vgg(self, x, plan):
        place = 0
        for each in plan.split():
            if each == "conv":
                x = self.neurons(self.conv(x, f"feature.{place}", f"feature.{place + 1}"), f"feature.{place + 2}")
            else:
                pool = functional.avg_pool2d if each == "A" else functional.adaptive_avg_pool2d
                x = pool(x.flatten(0, 1), 2 if each == "A" else 1).unflatten(0, x.shape[:2])
            place += 3 if each == "conv" else 1
        return x.flatten(2) @ self["classifier.0.layer.weight"].T


# An eighth of the channels, but all hidden neurons.
STAND_INS = {
    "cifar10-resnet19": Loop.resnet19,
    "cifar10-vgg13": partial(Loop.vgg, plan="conv conv A conv conv A conv conv A conv conv conv A conv AA"),
    "dvs-cifar10-vggsnn2": partial(Loop.vgg, plan="conv conv A conv conv A conv conv A conv conv A"),
}


def small(name, **changes):
    return replace(PRESETS[name], channels=0.125, **changes)


@pytest.mark.parametrize("name", STAND_INS)
def test_checkpoint_in_the_authors_naming(name, tmp_path):
    settings, widths, state = small(name, steps=3), [], {}
    ours = Training(settings, data.samples_of(settings, None, 8), Options(CPU))
    ours.network.double()
    for key, value in ours.network.state_dict().items():
        value = value.clone()
        key = key.replace("logit_decay", "cell.decay").replace("alpha", "cell.spike_fn.inv_sg.alpha")
        if key.endswith("alpha"):
            value.add_(torch.rand(1, dtype=value.dtype))
            widths.append(float((-value).exp() if settings.surrogate == "rectangle" else 1 / value))
        elif value.is_floating_point() and value.dim() <= 1:
            value.uniform_(0.5, 1.5)
        elif key.startswith("classifier"):
            value.mul_(20)  # the hidden neurons of ResNet-19 have no normalisation, and would be silent
        state[key] = value.reshape(()) if key.endswith("decay") else value
    file = tmp_path / "theirs.pth"
    config = argparse.Namespace(T=3, thresh=settings.threshold, decay=0.5, p=1, cmd=["python main.py"])
    torch.save({"best_acc": torch.tensor(0.5), "best_net": state, "config": config}, file)
    saved, dvs = checkpoint_of(file, CPU), "dvs" in name
    other = replace(settings, steps=9, threshold=0.1, decay=0.3, learn_decay=not settings.learn_decay)
    assert settings_in(saved, other) == replace(settings, frames="la" if dvs else "separate")
    ours.load_network(saved)
    ours.network.eval()
    x_seq = torch.randn(3, 2, *((2, 48, 48) if dvs else (3, 32, 32))).double()
    loop = Loop(state, settings)
    with torch.no_grad():
        found, expected = ours.network(x_seq), STAND_INS[name](loop, x_seq)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected)
    assert {key for key in state if not key.endswith(("alpha", "tracked"))} == loop.used
    loaded = [float(layer.width.detach()) for _, layer in asgl_cuda.asgl_layers(ours.network)]
    torch.testing.assert_close(loaded, widths, rtol=1e-6, atol=0)


@pytest.mark.parametrize("surrogate", ["sigmoid", "rectangle"])
def test_gradients_of_the_authors_parameter(surrogate):
    """Against the width as a function of `alpha`, all elements analog."""
    settings = small("cifar10-vgg13", width=2.0, surrogate=surrogate, analog_prob=1.0)
    neurons = neurons_of(settings).double()
    assert float(neurons.width.detach()) == pytest.approx(2)
    x_seq = torch.randn(4, 3, 5, dtype=torch.float64)
    neurons(x_seq).square().sum().backward()
    alpha = neurons.alpha.detach().clone().requires_grad_()
    width = (-alpha).exp() if surrogate == "rectangle" else 1 / alpha
    out = asgl_cuda.lif(x_seq, decay=0.5, width=width, surrogate=surrogate, analog_prob=1.0, backend="reference")
    out.square().sum().backward()
    torch.testing.assert_close(neurons.alpha.grad, alpha.grad)
    if surrogate == "sigmoid":
        with torch.no_grad():
            neurons.alpha.fill_(-0.1)
        neurons.zero_grad()
        neurons(x_seq).square().sum().backward()
        assert neurons.alpha.grad.isfinite().all()
        assert neurons.alpha.grad != 0


# ---- settings ----


def test_loss():
    scores, labels = torch.randn(3, 4, 5), torch.randint(5, (4,))
    by_step = sum(functional.cross_entropy(step, labels) for step in scores) / 3
    expected = 0.999 * by_step + 0.001 * functional.mse_loss(scores, torch.ones(3, 4, 5))
    torch.testing.assert_close(loss_of(scores, labels, "tet"), expected)
    torch.testing.assert_close(loss_of(scores, labels, "mean"), functional.cross_entropy(scores.mean(0), labels))
    assert loss_of(scores.bfloat16(), labels, "tet").dtype == torch.float32


# ---- trainings ----


def widths_of(network):
    return [torch.as_tensor(layer.width).detach() for _, layer in asgl_cuda.asgl_layers(network)]


def test_learns():
    """Weight decay is of weights alone; the cosine leaves widths and decays their rate."""
    settings = small("cifar10-vgg13", width=0.5, epochs=6, batch=16, rate=0.05)
    training = Training(settings, data.samples_of(settings, None, 320), Options(CPU))
    names = {id(each): name for name, each in training.network.named_parameters()}
    (weights, norms), (neurons,) = (each.param_groups for each in training.optimizers)
    assert (weights["weight_decay"], norms["weight_decay"], neurons["weight_decay"]) == (5e-4, 0, 0)
    assert all(names[id(each)].endswith("layer.weight") and each.dim() > 1 for each in weights["params"])
    assert {names[id(each)].rsplit(".")[-1] for each in neurons["params"]} == {"alpha", "logit_decay"}
    losses = [training.train_epoch() for _ in range(settings.epochs - 1)]
    assert weights["lr"] == norms["lr"] == pytest.approx(0.05 * (1 + math.cos(math.pi * 5 / 6)) / 2)
    assert neurons["lr"] == 3e-4
    assert training.train_epoch() < 0.8 * losses[0]
    assert training.accuracy() > 35  # chance is 10
    assert all(float(width) != 0.5 for width in widths_of(training.network))


def tiny(name, baseline=None, options=None, samples=None, **changes):
    """A training after its first epoch, on 16 samples."""
    settings = {"epochs": 2, "batch": 8, "channels": 1 / 16, "steps": 2, **BASELINES.get(baseline, {}), **changes}
    settings = replace(PRESETS[name], **settings)
    training = Training(settings, samples or data.samples_of(settings, None, 16), options or Options(CPU))
    training.losses = [training.train_epoch()]
    return training


@pytest.mark.parametrize("baseline", BASELINES)
def test_baselines(baseline):
    training = tiny("cifar10-resnet19", baseline, width=0.5)
    layers = [layer for _, layer in asgl_cuda.asgl_layers(training.network)]
    assert {layer.analog_prob for layer in layers} == ({0.2} if baseline == "per-step" else {0.0})
    training.train_epoch()
    widths = widths_of(training.network)
    factors = [scheduled_width(replace(training.settings, epochs=11, width=2.0), epoch) / 2 for epoch in range(11)]
    assert factors == pytest.approx([0.1 ** (epoch / 10) for epoch in range(11)])
    if baseline in ("fixed", "schedule"):
        torch.testing.assert_close(torch.stack(widths), torch.full((18,), 0.5 if baseline == "fixed" else 0.05))
    elif baseline == "no-noise":
        assert all(width != 0.5 for width in widths)
    else:
        assert all(width.shape == (2,) and width[0] != width[1] for width in widths)


def test_recomputed_spikes_change_nothing(monkeypatch):
    contexts, context = [], asgl_cuda.recompute_spikes
    monkeypatch.setattr(asgl_cuda, "recompute_spikes", lambda: contexts.append(1) or context())
    plain, recomputed = (tiny("cifar10-vgg13", options=Options(CPU, recompute=each)) for each in (False, True))
    assert len(contexts) == 2
    assert plain.losses == recomputed.losses
    for one, other in zip(plain.network.parameters(), recomputed.network.parameters(), strict=True):
        assert torch.equal(one, other)


def test_bfloat16_and_compiled(monkeypatch):
    plain, half = (tiny("cifar10-vgg13", options=Options(CPU, amp=each)) for each in (False, True))
    assert half.losses != plain.losses
    assert half.losses == pytest.approx(plain.losses, rel=0.2)
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    again = tiny("cifar10-vgg13", options=Options(CPU, compiled=True))
    assert compiled == [again.network]
    assert again.losses == plain.losses


# ---- the program ----


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["recipe", *map(str, arguments)])
    monkeypatch.delenv("RANK", raising=False)
    return program.main()


QUICK = ("--channels", "0.0625", "--workers", 0, "--epochs", 2, "--batch", 8, "--steps", 2, "--device", "cpu")


@pytest.fixture
def frames(tmp_path):
    """A folder of frames as the authors' program reads them."""
    for part, count in (("train", 16), ("test", 4)):
        (tmp_path / "frames" / part).mkdir(parents=True)
        for number in range(count):
            content = torch.poisson(torch.full((2, 2, 64, 64), 0.2 + 0.1 * (number % 2)))
            torch.save((content, torch.tensor([number % 2])), tmp_path / "frames" / part / f"{number}.pt")
    return tmp_path / "frames"


def bits_of(saved):
    if isinstance(saved, torch.Tensor):
        return saved.numpy().tobytes()
    if isinstance(saved, dict):
        return {key: bits_of(value) for key, value in saved.items()}
    return [bits_of(value) for value in saved] if isinstance(saved, list) else saved


def test_resumed_with_the_same_bits(frames, tmp_path, monkeypatch, capsys):
    """Interrupted in the second epoch; augmentation, noise, shuffling and optimizers go on as they would have."""
    common = ("dvs-cifar10-vggsnn2", *QUICK, "--data-root", frames, "--workers", 2, "--out")
    assert call(monkeypatch, *common, tmp_path / "whole") == 0
    train_epoch = Training.train_epoch

    def interrupted(self, *arguments):
        if self.epoch == 1:
            train_epoch(self, *arguments)  # its result is lost
            raise KeyboardInterrupt
        return train_epoch(self, *arguments)

    monkeypatch.setattr(Training, "train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt, match=f"--resume goes on from {tmp_path / 'parts' / 'last.pt'}"):
        call(monkeypatch, *common, tmp_path / "parts")
    monkeypatch.setattr(Training, "train_epoch", train_epoch)
    with pytest.raises(SystemExit):
        call(monkeypatch, *common, tmp_path / "parts")
    assert "--resume goes on from it" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"is of other settings: expected \{'rate': 0\.2\}, found \{'rate': 0\.1\}$"):
        call(monkeypatch, *common, tmp_path / "parts", "--resume", "--rate", 0.2)
    assert call(monkeypatch, *common, tmp_path / "parts", "--resume") == 0
    whole, parts = (torch.load(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert bits_of(parts) == bits_of(whole)
    assert whole["epoch"] == 2
    assert "epoch 2/2: loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--epochs -1", "--epochs must be at least 1, got -1"),
        ("--width nan", "--width must be from 1e-06 to 1e+06, got nan"),
        ("--decay 1", "--decay must be from 1e-06 to 0.999999, got 1.0"),
        ("--no-learn-decay --decay 2", "--decay must be from 0 to 1, got 2.0"),
        ("--frames la", "--frames la is of dvs-cifar10, whose frames have two channels, not of cifar10"),
        ("--synthetic 0", "argument --synthetic: must be at least 2, got 0"),
        ("--data-root nothing", "argument --data-root: not allowed with argument --synthetic"),
        ("--resume --evaluate last.pt", "argument --evaluate: not allowed with argument --resume"),
        ("--device meta", "--device must be cpu, cuda, or cuda:1 and so on, got meta"),
        ("--out FILE", "--out FILE: File exists"),
        ("--out FILE/folder", "--out FILE/folder: Not a directory"),
        ("--out guarded", "--out guarded cannot be written to"),
    ],
)
def test_arguments_that_make_no_training(monkeypatch, capsys, tmp_path, arguments, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("")
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != "guarded" or mode != os.W_OK)
    common = ("cifar10-vgg13", *QUICK, "--synthetic", 4, *arguments.split())
    with pytest.raises(SystemExit):
        call(monkeypatch, *common)
    assert expected in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.rglob("last.pt"))


def test_evaluated_by_the_settings_of_the_checkpoint(tmp_path, monkeypatch, capsys):
    training = tiny("cifar10-vgg13", "per-step", steps=3, threshold=0.7)
    training.save(tmp_path / "last.pt")
    saved = torch.load(tmp_path / "last.pt")
    del saved["settings"]["frames"]  # of a time when there was one way
    torch.save(saved, tmp_path / "last.pt")
    found, evaluate = [], ("cifar10-vgg13", "--synthetic", 16, "--workers", 0, "--evaluate", tmp_path / "last.pt")
    monkeypatch.setattr(Training, "accuracy", lambda self: found.append(self) or 12.5)
    assert call(monkeypatch, *evaluate) == 0
    assert "test accuracy 12.50 %" in capsys.readouterr().out
    assert call(monkeypatch, *evaluate, "--threshold", 0.9) == 0
    assert [each.settings for each in found] == [training.settings, replace(training.settings, threshold=0.9)]
    for ours, theirs in zip(found[0].network.parameters(), training.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for settings, expected in (
        ({**saved["settings"], "batch": 0}, "has settings that are none here: ValueError: --batch must be at least 1"),
        ({**saved["settings"], "colour": 1}, "has settings that are none here: TypeError: .* argument 'colour'"),
        ({**saved["settings"], "data": "cifar100"}, "is of cifar100-vgg13, not of cifar10-vgg13"),
        ({**saved["settings"], "channels": 0.125}, "does not fit vgg13: RuntimeError: .* size mismatch for feature.0"),
    ):
        torch.save({**saved, "settings": settings}, tmp_path / "last.pt")
        with pytest.raises(SystemExit, match=f"^the checkpoint {expected}"):
            call(monkeypatch, *evaluate)


def test_checkpoints_that_cannot_be_read(tmp_path, monkeypatch):
    training = tiny("cifar10-vgg13")
    file = tmp_path / "out" / "last.pt"
    file.parent.mkdir()
    common = ("cifar10-vgg13", *QUICK, "--synthetic", 16, "--out", file.parent)
    with pytest.raises(SystemExit, match=f"^{file} is no checkpoint that can be read: FileNotFoundError: .*$"):
        call(monkeypatch, *common, "--evaluate", file)
    training.save(file)
    content = file.read_bytes()
    for damaged in (b"", b"hello", content[: len(content) // 2], content[:-10]):
        file.write_bytes(damaged)
        for option in (("--evaluate", file), ("--resume",)):
            with pytest.raises(SystemExit, match=f"^{file} is no checkpoint that can be read: .*$"):
                call(monkeypatch, *common, *option)
    for other in ([1], {"state_dict": {}}):
        torch.save(other, file)
        with pytest.raises(
            SystemExit, match=f"^{file} must be a checkpoint of this program or of the authors', and is neither$"
        ):
            call(monkeypatch, *common, "--evaluate", file)
    torch.save({"best_net": training.network.state_dict()}, file)
    with pytest.raises(SystemExit, match=f"^{file} is of the authors' program, --resume goes on from this program's$"):
        call(monkeypatch, *common, "--resume")


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="no gloo")
def test_two_processes(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    command = [sys.executable, "-m", "benchmarks.learning.recipe", "cifar10-vgg13", *map(str, QUICK), "--epochs", "1"]
    command += ["--synthetic", "18", "--batch", "4", "--out", str(tmp_path)]
    about = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    environments = [{**os.environ, **about, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    processes = [
        subprocess.Popen(command, env=each, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for each in environments
    ]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert "epoch 1/1: loss" in outputs[0], outputs
    assert "epoch" not in outputs[1]
    saved = torch.load(tmp_path / "last.pt")
    assert saved["network"]["feature.1.layer.num_batches_tracked"] == 5  # 9 samples in batches of 2


# ---- data ----


def test_cifar(tmp_path, monkeypatch):
    """Files in the format of CIFAR-100, with other checksums."""
    datasets = pytest.importorskip("torchvision.datasets")
    settings = small("cifar100-resnet18", batch=4, epochs=1)
    with pytest.raises(SystemExit, match=r"must have cifar-100-python, as torchvision leaves it: .*CIFAR100\("):
        data.samples_of(settings, tmp_path, None)
    monkeypatch.setattr(datasets.CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *_: True)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for name in ("train", "test"):
        content = {"data": draw.integers(0, 256, (8, 3072), dtype=np.uint8), "fine_labels": [*range(92, 100)]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}))
    train, test = data.samples_of(settings, tmp_path, None)
    assert test[3][0].shape == train[3][0].shape == (3, 32, 32)
    assert test[3][1] == train[3][1] == 95
    assert torch.equal(test[3][0], test[3][0])
    assert not torch.equal(train[3][0], train[3][0])
    black = -torch.tensor(data._STATISTICS["cifar100"][0]) / torch.tensor(data._STATISTICS["cifar100"][1])
    cut = (train[3][0] - black[:, None, None]).abs().amax(0) < 1e-6
    assert cut.sum() >= 64
    assert not train[3][0].eq(0).all(0).any(), "cut out before the normalisation"
    training = Training(settings, (train, test), Options(CPU))
    assert math.isfinite(training.train_epoch())


def test_frames(frames, tmp_path):
    settings = small("dvs-cifar10-vggsnn2", steps=2)
    train, test = data.samples_of(settings, frames, None)
    assert (len(train), len(test)) == (16, 4)
    content, label = test[1]
    assert (content.shape, label) == ((2, 2, 48, 48), 1)
    stored = torch.load(frames / "test" / "1.pt")[0].gt(0).float()
    assert content.mean() == pytest.approx(float(stored.mean()), rel=0.05), "several events count once"
    assert torch.equal(content, test[1][0])
    assert not torch.equal(train[1][0], train[1][0])
    for part in ("train", "test"):
        (tmp_path / "jelly" / part).mkdir(parents=True)
        (tmp_path / "jelly" / part / "a file.txt").write_text("no class")
        for name in ("cat", "airplane"):
            (tmp_path / "jelly" / part / name).mkdir(parents=True)
            np.savez(tmp_path / "jelly" / part / name / f"{name}_7.npz", frames=np.ones((2, 2, 128, 128)))
    _, jelly = data.samples_of(settings, tmp_path / "jelly", None)
    assert [jelly[index][1] for index in range(2)] == [0, 1]
    torch.testing.assert_close(jelly[0][0], torch.ones(2, 2, 48, 48))
    first = frames / "train" / "0.pt"
    with pytest.raises(SystemExit, match=rf"^{first}: expected frames \[10, 2, H, W\], found \[2, 2, 64, 64\]$"):
        data.samples_of(PRESETS["dvs-cifar10-vggsnn2"], frames, None)
    torch.save((torch.zeros(2, 2, 64, 64), torch.tensor([10])), frames / "train" / "3.pt")
    with pytest.raises(ValueError, match=r"3\.pt: expected a label from 0 to 9, found 10$"):
        list(train)
    first.write_bytes(first.read_bytes()[:500])
    with pytest.raises(SystemExit, match=rf"^{first} has no frames with a label that can be read: .*$"):
        data.samples_of(settings, frames, None)
    with pytest.raises(SystemExit, match=r"must have frames of DVS-CIFAR10: \.pt files .*CIFAR10DVSTEBNSplit"):
        data.samples_of(settings, tmp_path / "nothing", None)
    with pytest.raises(SystemExit, match="--data-root must name the folder of the data, or --synthetic"):
        data.samples_of(settings, None, None)


def test_frames_as_the_authors_resize_them(frames):
    """By torchvision's transforms of each step, which take two channels for grey and alpha."""
    transforms = pytest.importorskip("torchvision.transforms")
    events = torch.rand(3, 2, 128, 128).lt(0.06).float()
    chain = transforms.Compose([transforms.ToPILImage(), transforms.Resize((48, 48)), transforms.ToTensor()])
    assert torch.equal(data.resized_as_la(events), torch.stack([chain(step) for step in events]))
    settings = small("dvs-cifar10-vggsnn2", steps=2, frames="la")
    _, test = data.samples_of(settings, frames, None)
    stored = torch.load(frames / "test" / "1.pt")[0].gt(0).float()
    assert torch.equal(test[1][0], torch.stack([chain(step) for step in stored]))
