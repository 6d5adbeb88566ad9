"""What is decided for devices, of which only the names and figures are here."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dit_jax import config as configs
from dit_jax.parallel import chips, layout
from dit_jax.parallel.chips import GIB

GPUS = {
    "NVIDIA H100 80GB HBM3": "9.0",
    "NVIDIA L4": "8.9",
    "NVIDIA A100-SXM4-40GB": "8.0",
    "NVIDIA RTX A6000": "8.6",  # of which there is no data sheet here
    "Tesla T4": "7.5",
    "AMD Instinct MI210": "gfx90a",
}


def gpu(kind="NVIDIA H100 80GB HBM3", memory=None):
    stats = None if memory is None else {"bytes_limit": memory, "peak_bytes_in_use": memory // 2}
    return SimpleNamespace(
        platform="gpu", device_kind=kind, compute_capability=GPUS.get(kind, "8.9"), memory_stats=lambda: stats
    )


def cpu():
    return SimpleNamespace(platform="cpu", device_kind="cpu", memory_stats=lambda: None)


def tpu(kind="TPU v3"):
    return SimpleNamespace(platform="tpu", device_kind=kind, memory_stats=lambda: None)


def resolved(devices, model="DiT-XL/2", **changes):
    config = configs.paper(model)
    config.update_from_flattened_dict({"data.source": "synthetic", **changes})
    return layout.resolve_auto(configs.resolve(config), devices)


def test_bfloat16_where_the_chip_has_it():
    names = {kind: layout.compute_dtype([gpu(kind)]).name for kind in GPUS}
    assert names == dict.fromkeys(list(GPUS)[:4], "bfloat16") | dict.fromkeys(list(GPUS)[4:], "float32")
    assert layout.compute_dtype([cpu()]).name == "float32" and layout.compute_dtype([tpu()]).name == "bfloat16"
    assert resolved([gpu("Tesla T4", 15 * GIB)], **{"model.dtype": "bfloat16"})["model"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "devices, batch_size, sizes",
    [
        ([gpu()] * 8, 256, (1, 8, 1)),
        ([gpu()] * 8, 16, (1, 4, 2)),  # fewer than 4 examples a device
        ([gpu()] * 6, 24, (3, 2, 1)),
        ([gpu()], 256, (1, 1, 1)),
        ([tpu()] * 8, 256, (1, 8, 1)),
        ([cpu()] * 8, 256, (-1, 1, 1)),
    ],
)
def test_gpus_have_the_mesh_of_a_slice(devices, batch_size, sizes):
    assert tuple(resolved(devices, batch_size=batch_size)["mesh"].values()) == sizes
    given = {"mesh.data": 1, "mesh.fsdp": 1, "mesh.tensor": len(devices)}
    assert resolved(devices, batch_size=batch_size, **given)["mesh"]["tensor"] == len(devices)


def test_memory_is_what_the_device_says():
    kind, sheet = "NVIDIA GeForce RTX 4090", chips.GPUS["NVIDIA GeForce RTX 4090"].hbm
    assert layout.memory_of([gpu(kind, 20 * GIB)] * 2) == 40 * GIB
    assert layout.memory_of([gpu(kind)]) == sheet and layout.memory_of([gpu("Tesla T4")]) == np.inf
    with pytest.raises(layout.UserError, match="batch_size=1: needs at least 30 GiB .* the devices have 20 GiB"):
        layout.check_memory({"batch_size=1": 30 * GIB}, [gpu(kind, 20 * GIB)])


def test_a_gpu_recomputes_what_it_cannot_hold():
    def remat(memory, model="DiT-XL/2", **changes):
        return resolved([gpu("NVIDIA L4", memory * GIB)], model, **changes)["model"]["remat"]

    assert [remat(memory) for memory in (130, 42, 24)] == ["none", "dots", "full"]
    assert remat(18, "DiT-S/2", batch_size=64) == "none"
    assert resolved([cpu()])["model"]["remat"] == "dots"
    assert [resolved([d])["model"]["scan"] for d in (cpu(), gpu(), tpu())] == [True, False, False]


def test_weights_lie_whole_where_they_fit():
    args = configs.dit_args(resolved([gpu()]))
    weights = int(1.4 * GIB)

    def fit(device, held, images=32, count=8):
        return layout.whole_weights_fit(args, [device] * count, images, weights, int(held * GIB))

    v5e = tpu("TPU v5 lite")
    assert fit(v5e, 1.3) and fit(v5e, 10.2, count=1) and fit(gpu(memory=60 * GIB), 11, count=1)
    assert not fit(v5e, 13) and not fit(v5e, 10.2, images=256, count=1) and not fit(gpu(memory=12 * GIB), 11)
    assert not fit(cpu(), 0)


def test_figures_of_a_gpu(monkeypatch):
    """MFU is of the data sheet's bfloat16 rate; the peak is of the fullest device."""
    monkeypatch.setattr(jax, "devices", lambda: [gpu(memory=60 * GIB)])
    assert chips.peak_flops(np.float32) == (989e12, "NVIDIA H100 80GB HBM3 data sheet, bfloat16")
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu(memory=40 * GIB), gpu(memory=60 * GIB)])
    assert chips.peak_memory() == 30 * GIB
    monkeypatch.setattr(jax, "local_devices", lambda: [cpu()])
    assert chips.peak_memory() is None
