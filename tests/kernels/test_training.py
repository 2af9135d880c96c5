"""The operators inside autocast and in data-parallel training of two processes."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor, nn

from kernels.common.rows import CHUNK
from kernels.ops.attention_stats import attention_stats
from kernels.ops.binary_kd_loss import binary_kd_loss
from kernels.ops.distribution_iou_loss import distribution_iou_kd_loss, distribution_iou_loss
from kernels.ops.feature_distance import feature_distance, feature_distance_and_means
from kernels.ops.iou_loss import iou_loss
from kernels.ops.mc_dropout import Dropout, mc_dropout
from kernels.ops.quality_focal_loss import quality_focal_loss


class Losses(nn.Module):
    """A convolution, and every operator on what comes out of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 8, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.convolution(images)  # [B, 8, 4, 4]
        B = len(x)
        teacher = images.mean(1, keepdim=True).expand(-1, 8, -1, -1).to(x.dtype).contiguous()
        weight, index = torch.ones(B, 16), torch.arange(B)
        drop = Dropout((0.1, 0.2), seed=1)
        out, var = mc_dropout(x, drop)
        assert var is not None
        spatial, channel = attention_stats(x, dropout=drop)
        logits, taught = x.flatten(2), teacher.flatten(2)
        boxes = torch.cat((logits[:, :2, 0], logits[:, :2, 0] + logits[:, 2:4, 0].abs() + 1), 1)
        terms = [
            out.float().square().mean() + var.float().mean() + spatial.square().mean() + channel.square().mean(),
            feature_distance(x, teacher, torch.ones(B, 4, 4), torch.ones(B, 8), dropout=drop) / 128,
            binary_kd_loss(logits, taught, weight)[0],
            quality_focal_loss(logits, index, index % 8, torch.full((B,), 0.5), weight),
            distribution_iou_kd_loss(logits, taught, weight),
            iou_loss(boxes, boxes.detach() + 0.5),
        ]
        assert all(term.dtype == torch.float32 for term in terms)
        return torch.stack(terms).sum() / B


def images() -> Tensor:
    return torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def test_autocast() -> None:
    model = Losses()
    wanted = model(images())
    wanted.backward()
    gradient = model.convolution.weight.grad
    assert gradient is not None
    expected = gradient.clone()
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(images())
    loss.backward()
    found = model.convolution.weight.grad
    assert found is not None and found.dtype == torch.float32
    torch.testing.assert_close(loss, wanted, rtol=2e-2, atol=0)
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("side", [4, 96])  # 96: larger than what eager code works on at a time
def test_autocast_does_not_reach_into_the_operators(side: int, last: bool) -> None:
    """Around forward and backward: inside, everything is float32."""
    g = torch.Generator().manual_seed(0)
    layout = torch.channels_last if last else torch.contiguous_format
    x, t = (torch.randn(2, 16, side, side, generator=g).contiguous(memory_format=layout) for _ in range(2))
    assert (x.numel() > CHUNK) == (side == 96)
    spatial, channel = torch.rand(2, 2, side, side, generator=g), torch.rand(2, 16, generator=g)
    weight, index = torch.rand(2, side * side, generator=g), torch.tensor([1, side * side + 3])
    corners = torch.rand(5, 4, generator=g).cumsum(1)
    drop = Dropout((0.1, 0.2), seed=1)

    def operators(x: Tensor) -> list[Tensor]:
        logits, taught = x.flatten(2), t.flatten(2)
        sides = x[0].flatten(1)[:, :5].t().reshape(5, 4, 4)
        boxes = corners + sides[..., 0]
        return [
            *feature_distance_and_means(x, t, spatial, channel, dropout=drop),
            *(y for y in mc_dropout(x, drop) if y is not None),
            *attention_stats(x, dropout=drop),
            binary_kd_loss(logits, taught, weight)[0],
            quality_focal_loss(logits, index, index % 8, torch.tensor([0.5, 0.7]), weight),
            quality_focal_loss(logits, index, index % 8, torch.tensor([0.5, 0.7]), weight, beta=1.5),
            distribution_iou_kd_loss(logits, taught, weight),
            distribution_iou_loss(sides, corners[:, :2], corners, weight[0, :5])[0],
            iou_loss(boxes, corners, weight[0, :5]),
        ]

    found = []
    for enabled in (False, True):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            results = operators(leaf)
            gradients = [torch.autograd.grad(y, leaf, torch.ones_like(y), retain_graph=True)[0] for y in results]
        found.append(([y.detach() for y in results], gradients))
    for plain, cast in zip(*found, strict=True):
        assert all(y.dtype == torch.float32 for y in cast)
        torch.testing.assert_close(cast, plain, rtol=1e-6, atol=1e-7)


def test_two_processes_have_the_mean_of_their_gradients() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_process, args=(port,), nprocs=2)


def _process(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    parts = images().split(2)
    gradients = []
    for part in parts:
        alone = Losses()
        alone(part).backward()
        gradients.append(alone.convolution.weight.grad)
    assert gradients[0] is not None and gradients[1] is not None
    together = nn.parallel.DistributedDataParallel(Losses())
    together(parts[rank]).backward()
    found = together.module.convolution.weight.grad
    torch.testing.assert_close(found, (gradients[0] + gradients[1]) / 2)
    torch.distributed.destroy_process_group()
