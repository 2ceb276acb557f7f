"""The loader's way to the GPU: copies ahead on a stream of their own, out of buffers that are used again."""

from __future__ import annotations

import pytest
import torch

from blip3o_ds.data.format.schema import DatasetSpec
from blip3o_ds.data.format.writer import DatasetWriter
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.reading.loader import EmbeddingLoader
from blip3o_ds.data.reading.order import GlobalOrder
from blip3o_kernels import dequantize_fp8
from blip3o_kernels.registry import REFERENCE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SPEC = DatasetSpec.pair(64, "patch_only", 1024, 256, "bf16", "made-up-eva", "made-up-clip")


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp8-e4m3"])
def test_batches_on_the_gpu_are_the_samples_and_stay_so_while_it_is_busy(tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    with DatasetWriter(tmp_path, SPEC.stored_as(dtype), 16) as writer:
        for i in range(100):
            eva, clip = (torch.randn(64, dim, generator=generator) for dim in (1024, 256))
            writer.write(f"sample{i:03d}", {"eva": eva, "clip": clip}, {})
    dataset = EmbeddingDataset(tmp_path)
    order = GlobalOrder(dataset.shard_sizes, 0, 2)
    busy = torch.randn(2048, 2048, device="cuda")
    kept = []
    with EmbeddingLoader(
        dataset, order, micro_batch_size=4, gradient_accumulation_steps=2, rank=0, world_size=1, device="cuda"
    ) as loader:
        for _ in range(25):
            for batch in loader.next_step():
                for _ in range(20):
                    busy = torch.tanh(busy @ busy)  # the GPU lags behind the loader
                kept.append((batch.positions.tolist(), batch.decode()))
    for positions, batch in kept:
        assert batch["eva"].is_cuda
        for row, position in enumerate(positions):
            sample = dataset.read(*order.locate(position))
            assert torch.equal(batch["eva"][row].cpu(), sample["eva"])
            assert torch.equal(batch["clip"][row].cpu(), sample["clip"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 257, 4096), (3, 1024), (5, 40), (1, 1, 9000)])
def test_the_fused_expansion_gives_the_bits_of_the_reference(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    stored = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    scale = torch.randn(shape[:-1], generator=generator).exp()
    expected = REFERENCE.dequantize_fp8(stored, scale, dtype)
    found = dequantize_fp8(stored.cuda(), scale.cuda(), dtype).cpu()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
