"""bdprune.screening.run: the scores of the detectors, without torch, in little memory, and never a verdict."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import bdprune
from bdprune.analysis import channel_lipschitz
from bdprune.analysis.statistics import layer_z_scores
from bdprune.detectors.lipschitz import LipschitzDetector
from bdprune.model import Model
from bdprune.model.architectures import build
from bdprune.record import ScreenResult
from bdprune.screening import THRESHOLD, screen, screen_many

ROOT = Path(__file__).resolve().parents[2]


def network(name: str, seed: int = 0) -> torch.nn.Module:
    """A small network whose norms have seen data."""
    torch.manual_seed(seed)
    found = build(name, 10, width=16)
    for module in found.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_var is not None and module.running_mean is not None
            module.running_var.uniform_(0.2, 3)
            module.running_mean.normal_()
            torch.nn.init.normal_(module.weight)
    return found.eval()


def write(path: Path, state: dict[str, torch.Tensor], form: str) -> Path:
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    return path


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("name", ["resnet18_cifar", "vgg11_bn_cifar", "plain_cnn"])
def test_scores_are_those_of_the_detector(tmp_path: Path, name: str, form: str) -> None:
    module = network(name)
    result = screen(write(tmp_path / "model", module.state_dict(), form))
    model = Model(network=module, arch=name, num_classes=10, input_shape=(3, 32, 32))
    expected = channel_lipschitz(model)
    z = layer_z_scores(expected)
    assert {one.layer for one in result.layers} == set(expected)
    for one in result.layers:
        assert one.max == pytest.approx(float(expected[one.layer][one.filter]), rel=1e-4)
        assert one.max_z == pytest.approx(float(z[one.layer].max()), rel=1e-4)
        assert one.filters == len(z[one.layer]) and one.filter == int(z[one.layer].argmax())
    assert result.artifact.sha256 is not None and len(result.heads) == 1 and result.heads[0].labels == 10
    assert THRESHOLD == LipschitzDetector().threshold == result.threshold


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", ["safetensors", "zip"])
def test_other_types_of_numbers(tmp_path: Path, dtype: torch.dtype, form: str) -> None:
    state = {
        name: one.to(dtype) if one.is_floating_point() else one
        for name, one in network("plain_cnn").state_dict().items()
    }
    wide = {name: one.double() if one.is_floating_point() else one for name, one in state.items()}
    found = screen(write(tmp_path / "narrow", state, form))
    for one, exact in zip(found.layers, screen(write(tmp_path / "wide", wide, form)).layers, strict=True):
        assert (one.layer, one.filter) == (exact.layer, exact.filter)
        assert one.max_z == pytest.approx(exact.max_z, rel=1e-5)


def test_an_outlying_filter_and_label_need_a_closer_look(tmp_path: Path) -> None:
    state = network("plain_cnn").state_dict()
    clean = screen(write(tmp_path / "clean.pth", state, "zip"))
    assert (clean.outcome, clean.reasons) == ("nothing found", ())
    state["features.12.weight"][17] *= 20
    state["classifier.weight"][4] += 1
    result = screen(write(tmp_path / "odd.pth", state, "zip"))
    assert result.outcome == "look closer" and result.error is None
    assert result.reasons[0].startswith("Filter 17 of features.12 lies ")
    assert result.reasons[1].startswith("Label 4 stands out in the ")
    assert "(threshold 6)." in result.reasons[0]
    assert result.peak is not None and (result.peak.layer, result.peak.filter) == ("features.12", 17)
    assert ScreenResult.from_json(result.to_json()) == result
    assert "clean" not in (result.to_json() + clean.to_json()).replace("clean.pth", "")


def test_several_sets_of_weights_are_told_apart(tmp_path: Path) -> None:
    plain, other = network("plain_cnn").state_dict(), network("plain_cnn", 1).state_dict()
    other["features.12.weight"][3] *= 100
    torch.save({"state_dict": plain, "ema": other, "more": [torch.ones(9, 9, 3, 3)] * 2}, tmp_path / "two.pth")
    result = screen(tmp_path / "two.pth")
    assert result.artifact.sets == ("state_dict", "ema") and result.unscreened == ("more[0]", "more[1]")
    assert [one.layer for one in result.heads] == ["state_dict/classifier", "ema/classifier"]
    assert result.peak is not None and (result.peak.layer, result.peak.filter) == ("ema/features.12", 3)
    assert len(result.layers) == 2 * sum(one.dim() == 4 for one in plain.values())


def test_masks_are_not_layers(tmp_path: Path) -> None:
    state = {"conv.weight_orig": torch.randn(9, 3, 3, 3), "conv.weight_mask": torch.ones(9, 3, 3, 3)}
    torch.save(state, tmp_path / "a.pth")
    assert [one.layer for one in screen(tmp_path / "a.pth").layers] == ["conv.weight_orig"]


def test_bad_files_are_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.pth").write_bytes(b"PK\x03\x04" + bytes(60))
    torch.save({"conv.weight": torch.full((4, 3, 3, 3), float("nan"))}, tmp_path / "b.pth")
    torch.save({"norm.weight": torch.ones(4, 3, 3), "x": torch.ones(3)}, tmp_path / "c.pth")
    found = list(screen_many([tmp_path / "a.pth", tmp_path / "b.pth", tmp_path / "c.pth", tmp_path / "d.pth"]))
    assert all(one.outcome == "error" and one.error and not one.layers and not one.reasons for one in found)
    messages = [one.error.message.replace(str(tmp_path), "") if one.error else "" for one in found]
    assert messages[0].startswith("Cannot load /a.pth: the zip archive is truncated or damaged")
    assert messages[1] == (
        "Cannot screen /b.pth: 4 of 4 filters of the tensor 'conv.weight' have values that are NaN or infinite."
    )
    assert messages[2] == "Cannot screen /c.pth: it has neither a convolution nor a linear layer."
    assert messages[3] == "Cannot load /d.pth: No such file or directory."
    assert [one.error.type if one.error else "" for one in found] == [
        "ArtifactError",
        "ArtifactError",
        "UnsupportedError",
        "ArtifactError",
    ]
    monkeypatch.setattr("bdprune.screening.run.open_stored", lambda path: 1 // 0)
    (broken,) = screen_many(["x"])
    assert broken.error and broken.error.message.startswith("Unexpected ZeroDivisionError")


def test_it_is_a_public_function() -> None:
    assert bdprune.screen is screen and bdprune.screen_many is screen_many and bdprune.ScreenResult is ScreenResult


BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "rich", "jinja2"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
"""
SCREEN = """
import bdprune
for path in sys.argv[1:]:
    print(bdprune.screen(path).outcome)
from bdprune.cli.main import main
code = main.main(["screen", *sys.argv[1:], "-f", "jsonl", "--no-progress"], standalone_mode=False)
assert code == 0 and "torch" not in sys.modules, code
"""


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    state = network("plain_cnn").state_dict()
    return [str(write(tmp_path / f"model.{form}", state, form)) for form in ("safetensors", "zip", "legacy")]


def test_it_runs_where_torch_cannot_be_imported(models: list[str]) -> None:
    command = [sys.executable, "-c", BLOCKED + SCREEN, *models]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:3] == ["nothing found"] * 3 and done.stdout.count('"kind":"screen"') == 3


@pytest.fixture
def isolated(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python code with bdprune and only the named packages, as after ``pip install --no-deps bdprune``."""

    def run(packages: Sequence[str], code: str, *args: str) -> subprocess.CompletedProcess[str]:
        site, installed = tmp_path / f"site{len(packages)}", Path(sysconfig.get_paths()["purelib"])
        site.mkdir(exist_ok=True)
        for name in (*packages, "numpy.libs"):
            if (installed / name).exists() and not (site / name).exists():
                (site / name).symlink_to(installed / name)
        if not (site / "bdprune").exists():
            (site / "bdprune").symlink_to(Path(bdprune.__file__).parent)
        start = f"import sys; sys.path.append({str(site)!r})\n"
        command = [sys.executable, "-I", "-S", "-c", start + code, *args]
        return subprocess.run(command, capture_output=True, text=True)

    return run


FOR_PYTHON = ("numpy", "safetensors", "msgspec")
FOR_COMMAND = (*FOR_PYTHON, "click", "jinja2", "markupsafe")


def test_it_runs_where_torch_is_not_installed(
    models: list[str], isolated: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = isolated(FOR_PYTHON, "import bdprune; print(bdprune.screen(sys.argv[1]).outcome)", models[0])
    assert (done.stdout, done.stderr) == ("nothing found\n", "")
    done = isolated(FOR_COMMAND, SCREEN, *models)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:3] == ["nothing found"] * 3


def test_other_commands_say_that_they_need_torch(
    models: list[str], isolated: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = isolated(FOR_COMMAND, "from bdprune.cli.main import main; main(['scan', *sys.argv[1:2]])", models[0])
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "bdprune: This needs torch, which is not installed.",
        "  Install torch. `bdprune screen` works without it.",
    ]


MEMORY = """
import resource, sys
import bdprune
bdprune.screen(sys.argv[1])
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
before = peak()
for path in sys.argv[2:]:
    assert bdprune.screen(path).outcome != "error"
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not report the peak of memory")
def test_the_peak_of_memory_is_at_most_the_largest_layer(models: list[str], tmp_path: Path) -> None:
    """ResNet-18 of width 64: the largest layer has 9.4 MB, the file 45 MB."""
    state = OrderedDict(build("resnet18_cifar", 10, width=64).state_dict())
    large = [str(write(tmp_path / f"large.{form}", state, form)) for form in ("safetensors", "zip", "legacy")]
    layer = max(one.numel() * 4 for one in state.values())
    command = [sys.executable, "-c", MEMORY, models[0], *large]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert layer == 512 * 512 * 9 * 4 and int(done.stdout) <= 1.2 * layer


def test_a_layer_in_another_memory_format_scores_the_same(tmp_path: Path) -> None:
    state = network("plain_cnn").state_dict()
    turned = {
        name: one.contiguous(memory_format=torch.channels_last) if one.dim() == 4 else one
        for name, one in state.items()
    }
    torch.save(state, tmp_path / "a.pth")
    torch.save(turned, tmp_path / "b.pth")
    one, other = screen(tmp_path / "a.pth"), screen(tmp_path / "b.pth")
    assert np.allclose([x.max_z for x in one.layers], [x.max_z for x in other.layers])


def test_a_file_that_changes_while_it_is_screened_is_an_error(tmp_path: Path) -> None:
    path, other = tmp_path / "m.pth", tmp_path / "other.pth"
    for seed, one in enumerate((path, other)):
        torch.manual_seed(seed)
        torch.save({"conv.weight": torch.randn(16, 3, 3, 3)}, one)

    def swap(sha256: str) -> None:
        other.replace(path)

    found = screen(path, recall=swap)
    assert (
        found.outcome == "error" and found.error is not None and "it changed while it was read" in found.error.message
    )
    assert not found.layers
