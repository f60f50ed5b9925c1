"""Fused models within what people train them with."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from helpers import random
from test_fuse import Block, patterns, waits
from torch import nn

import gradfuse

WIDE = {"dtype": torch.float64}


def net():
    torch.manual_seed(0)
    bare = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    return nn.Sequential(Block(), bare, Block(), nn.Flatten(), nn.Linear(75, 2)).double()


def state(model):
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    gradients = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]
    return [*gradients, *(b.clone() for b in model.buffers())]


def train_two_ranks(rank, store):
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    model = net()
    both = (model, gradfuse.fuse(copy.deepcopy(model)))
    wrapped = [nn.parallel.DistributedDataParallel(m) for m in both]
    for seed in range(3):
        x = random(4, 3, 5, 5, seed=2 * seed + rank, **WIDE)
        for m in wrapped:
            m.zero_grad()
            m(x).square().sum().backward()
    torch.testing.assert_close(*map(state, both), rtol=1e-9, atol=1e-10)
    dist.barrier()
    # torch 2.13's reducer, as it is destroyed, holds the GIL for which gloo's thread waits.
    os._exit(0)


@waits
def test_data_parallel_ranks(tmp_path):
    torch.multiprocessing.spawn(train_two_ranks, (f"file://{tmp_path}/store",), nprocs=2)


@waits
def test_fully_shard(tmp_path):
    """It frees a block's parameters after its forward, while the block's output still waits."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        model = net()
        fused = gradfuse.fuse(copy.deepcopy(model), inplace=True)
        for block in (*fused[:3], fused):
            fsdp.fully_shard(block, mesh=mesh, reshard_after_forward=True)
        x = random(4, 3, 5, 5, **WIDE)
        for m in (model, fused):
            m(x).square().sum().backward()
        torch.testing.assert_close(state(fused), state(model), rtol=1e-9, atol=1e-10)
        assert patterns(fused) == {"bn+add+relu": 2, "bn": 1}
    finally:
        dist.destroy_process_group()


@waits
def test_averages_of_weights_and_scalers():
    model = net()
    both = (model, gradfuse.fuse(copy.deepcopy(model)))
    found = []
    for m in both:
        average = torch.optim.swa_utils.AveragedModel(m, use_buffers=True)
        optimizer = gradfuse.optim.SGD(m.parameters(), lr=0.1, clip=1.0)
        scaler = gradfuse.optim.GradScaler("cpu", init_scale=8.0)
        for seed in range(3):
            y = m[:2](random(4, 3, 5, 5, seed=seed, **WIDE))  # ends in a batch norm
            average.update_parameters(m)
            optimizer.zero_grad()
            scaler.scale(m[2:](y).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        found.append([*state(m), *(t.clone() for t in average.state_dict().values())])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


@waits
def test_timms_freezing():
    timm = pytest.importorskip("timm")
    from timm.utils.model import freeze_batch_norm_2d

    model = timm.create_model("resnetv2_50").double().eval()
    fused = gradfuse.fuse(copy.deepcopy(model))
    freeze_batch_norm_2d(fused)
    x = random(2, 3, 40, 40, **WIDE)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-9, atol=1e-9)


@waits
def test_extracted_features():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18().double()
    fused = gradfuse.fuse(copy.deepcopy(model))
    nodes = ["layer1.0.bn2", "layer2"]
    x = random(2, 3, 40, 40, **WIDE)
    with torch.no_grad():
        found = [extraction.create_feature_extractor(m, nodes)(x) for m in (fused, model)]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@waits
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def training_step(self, batch):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    model = Module()
    fused = gradfuse.fuse(copy.deepcopy(model))
    assert isinstance(fused, Module)
    data = torch.utils.data.DataLoader(random(8, 3, 5, 5, **WIDE), batch_size=4)
    for m in (model, fused):
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(m, data)
    assert patterns(fused) == {"bn+add+relu": 2, "bn": 1}
    torch.testing.assert_close(fused.state_dict(), model.state_dict(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("train", [True, False])
def test_exported_and_loaded(train, tmp_path):
    model = net().train(train)
    fused = gradfuse.fuse(copy.deepcopy(model))
    x = random(4, 3, 5, 5, **WIDE)
    torch.export.save(torch.export.export(fused, (x,)), tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    found = []
    for m in (loaded, gradfuse.fuse_graph(copy.deepcopy(loaded)), model):
        m(x).square().sum().backward()
        found.append([{n: p.grad for n, p in m.named_parameters()}, dict(m.named_buffers())])
    for got in found[:2]:
        torch.testing.assert_close(got, found[2], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx(dynamo, tmp_path):
    """The operators of the unfused model, with its values."""
    onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    x, operators = random(4, 3, 5, 5), []
    model = net().float().eval()
    for m in (model, gradfuse.fuse(copy.deepcopy(model))):
        torch.onnx.export(m, (x,), tmp_path / "model.onnx", dynamo=dynamo, verbose=False)
        graph = onnx.load(tmp_path / "model.onnx")
        operators.append([node.op_type for node in graph.graph.node])
        (name,) = (value.name for value in graph.graph.input)
        (y,) = ReferenceEvaluator(graph).run(None, {name: x.numpy()})
        torch.testing.assert_close(torch.tensor(y), model(x))
    assert operators[0] == operators[1]


def test_training_for_quantization():
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

    model = nn.Sequential(Block(), Block()).train()
    x, outputs, kinds = random(4, 3, 5, 5), [], []
    for m in (copy.deepcopy(model), gradfuse.fuse(copy.deepcopy(model))):
        prepared = prepare_qat_fx(m, get_default_qat_qconfig_mapping(), (x,))
        prepared(x).sum().backward()
        kinds.append([type(part) for part in prepared.modules()][1:])
        outputs.append(convert_fx(prepared.eval())(x))
    assert kinds[0] == kinds[1]
    torch.testing.assert_close(*outputs)
