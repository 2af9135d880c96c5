"""Backbones against torchvision's own models, and every way their weights can be wrong."""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from compress.detectors.backbones import BACKBONES, Backbone, build_backbone
from deploy.core.errors import UserError

SEED_IMAGES = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 4 - 2


def whole_model(name: str) -> nn.Module:
    """torchvision's classifier with running statistics that are not the trivial 0 and 1."""
    torch.manual_seed(1)
    model: nn.Module = getattr(torchvision.models, name)(weights=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


def last_map_of_each_stride(model: nn.Module, images: Tensor) -> dict[int, Tensor]:
    """{stride: the last top-level map of that stride}, recorded by hooks while the classifier runs."""
    maps: dict[int, Tensor] = {}

    def record(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        maps[images.shape[-1] // output.shape[-1]] = output

    blocks = model.features if hasattr(model, "features") else [getattr(model, f"layer{i}") for i in (1, 2, 3, 4)]
    hooks = [block.register_forward_hook(record) for block in blocks]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return maps


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v3_small", "mobilenet_v3_large"])
def test_maps_equal_torchvision(name: str, tmp_path: Path) -> None:
    model = whole_model(name)
    if name == "resnet18":
        path = tmp_path / "weights.safetensors"
        save_file(model.state_dict(), path)
    else:
        path = tmp_path / "weights.pth"
        torch.save(model.state_dict(), path)
    backbone = build_backbone(name, weights=path).eval()
    with torch.no_grad():
        maps = backbone.all_maps(SEED_IMAGES)
    expected = last_map_of_each_stride(model, SEED_IMAGES)
    for stride, ours in zip((4, 8, 16, 32), maps, strict=True):
        torch.testing.assert_close(ours, expected[stride], rtol=0, atol=0)


@pytest.mark.parametrize("name", BACKBONES)
def test_shapes_and_channels(name: str) -> None:
    backbone = build_backbone(name, weights="none").eval()
    with torch.no_grad():
        maps = backbone(SEED_IMAGES)
    assert [tuple(x.shape) for x in maps] == [
        (2, channels, 64 // stride, 96 // stride)
        for channels, stride in zip(backbone.out_channels, (8, 16, 32), strict=True)
    ]


def test_parameter_names_are_torchvisions() -> None:
    ours = set(build_backbone("resnet101", weights="none").state_dict())
    theirs = set(torchvision.models.resnet101(weights=None).state_dict())
    assert theirs - ours == {"fc.weight", "fc.bias"}
    assert ours <= theirs


def test_nano_is_nano() -> None:
    backbone = build_backbone("nano", weights="none")
    assert 200_000 <= sum(p.numel() for p in backbone.parameters()) <= 400_000


# Training mode


@pytest.mark.parametrize(
    ("name", "frozen_stages"),
    [("nano", -1), ("nano", 0), ("nano", 1), ("nano", 4), ("resnet18", 1), ("mobilenet_v3_small", 1)],
)
def test_frozen_stages_get_no_gradient_and_keep_their_statistics(name: str, frozen_stages: int) -> None:
    backbone = build_backbone(name, weights="none", frozen_stages=frozen_stages, norm_eval=False).train()
    before = {key: value.clone() for key, value in backbone.named_buffers()}
    loss = sum(x.square().mean() for x in backbone(SEED_IMAGES))
    if frozen_stages < 4:
        loss.backward()
    for number, modules in enumerate(backbone.stages()):
        frozen = number <= frozen_stages
        for module in modules:
            assert all((p.grad is None) == frozen for p in module.parameters())
    for key, value in backbone.named_buffers():
        assert torch.equal(value, before[key]) == _is_frozen(backbone, key, frozen_stages), key


def _is_frozen(backbone: Backbone, buffer: str, frozen_stages: int) -> bool:
    owner = backbone.get_submodule(buffer.rpartition(".")[0])
    frozen = [module for modules in backbone.stages()[: frozen_stages + 1] for module in modules]
    return any(owner is child for module in frozen for child in module.modules())


def test_norm_eval_keeps_all_statistics_in_training() -> None:
    backbone = build_backbone("resnet18", weights="none", frozen_stages=1, norm_eval=True).train()
    before = {key: value.clone() for key, value in backbone.named_buffers()}
    backbone(SEED_IMAGES)
    assert all(torch.equal(value, before[key]) for key, value in backbone.named_buffers())
    assert backbone.training and backbone.layer2.training
    assert backbone.layer2[0].bn1.weight.requires_grad
    assert not backbone.layer1[0].bn1.weight.requires_grad


def test_nano_learns() -> None:
    """Twenty steps on one batch lower a simple loss a lot: gradients reach every stage."""
    torch.manual_seed(0)
    backbone = build_backbone("nano", weights="none", frozen_stages=-1, norm_eval=False).train()
    wanted = torch.tensor([0.0, 0.5, 1.0, 1.5])
    images = torch.randn(4, 3, 64, 64) * 0.3 + wanted[:, None, None, None]
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = sum((x.mean(dim=(1, 2, 3)) - wanted).square().mean() for x in backbone(images))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in backbone.parameters())


# Weights from ImageNet


def test_imagenet_offline_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*_args: object, **_kwargs: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(UserError, match="weights: none") as error:
        build_backbone("resnet18", weights="imagenet")
    assert "https://download.pytorch.org/models/resnet18-f37072fd.pth" in str(error.value)
    assert "\n" not in str(error.value)


def test_imagenet_comes_from_torchs_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = whole_model("resnet18")
    cached = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    cached.parent.mkdir(parents=True)
    torch.save(model.state_dict(), cached)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    backbone = build_backbone("resnet18", weights="imagenet")
    torch.testing.assert_close(backbone.state_dict()["layer4.1.bn2.weight"], model.layer4[1].bn2.weight.data)


def test_nano_has_no_imagenet_weights() -> None:
    with pytest.raises(UserError, match="nano has no ImageNet weights; set weights: none"):
        build_backbone("nano", weights="imagenet")


# Weights from a file


def _without(state: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name != key}


def test_missing_unexpected_and_misshapen_keys_are_listed_together(tmp_path: Path) -> None:
    state = _without(whole_model("resnet18").state_dict(), "layer3.0.conv1.weight")
    state["layer5.0.weight"] = torch.zeros(1)
    state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(UserError) as error:
        build_backbone("resnet18", weights=tmp_path / "odd.pth")
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'odd.pth'}: ")
    assert "missing 1 key(s): layer3.0.conv1.weight;" in message
    assert "unexpected 1 key(s): layer5.0.weight;" in message
    assert "conv1.weight (64, 1, 7, 7) instead of (64, 3, 7, 7)" in message


def test_another_depth_does_not_fit(tmp_path: Path) -> None:
    torch.save(whole_model("resnet34").state_dict(), tmp_path / "r34.pth")
    with pytest.raises(UserError, match=r"unexpected \d+ key\(s\): layer1.2.conv1.weight, .* and \d+ more"):
        build_backbone("resnet18", weights=tmp_path / "r34.pth")


def test_batch_counters_may_be_missing(tmp_path: Path) -> None:
    state = whole_model("resnet18").state_dict()
    torch.save({key: value for key, value in state.items() if "num_batches" not in key}, tmp_path / "old.pth")
    backbone = build_backbone("resnet18", weights=tmp_path / "old.pth")
    torch.testing.assert_close(backbone.state_dict()["conv1.weight"], state["conv1.weight"])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", b"PK\x03\x04" + bytes(100)])
def test_garbage_files(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"garbage{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a readable") as error:
        build_backbone("resnet18", weights=path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_files(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"cut{suffix}"
    state = build_backbone("nano", weights="none").state_dict()
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="not a readable") as error:
        build_backbone("nano", weights=path)
    assert "\n" not in str(error.value)


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise AssertionError('the file ran code')",)


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "meta": Harmful()}, tmp_path / "harm.pth")
    with pytest.raises(UserError, match="not loaded because they could run code"):
        build_backbone("resnet18", weights=tmp_path / "harm.pth")


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, torch.zeros(2), {"state_dict": {}}])
def test_files_without_a_state_dict(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(UserError, match="no state dict in this file"):
        build_backbone("resnet18", weights=tmp_path / "odd.pth")


def test_no_such_file_name_or_stage(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        build_backbone("resnet18", weights=tmp_path / "none.pth")
    with pytest.raises(UserError, match="'resnet19' is unknown; use one of resnet18"):
        build_backbone("resnet19", weights="none")
    with pytest.raises(UserError, match="frozen_stages is 5"):
        build_backbone("resnet18", weights="none", frozen_stages=5)
