import json
import os
from pathlib import Path

# Four fake devices (more can hang collectives on two cores), and one step in flight at a time.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import jax
import numpy as np
import pytest

jax.config.update("jax_cpu_enable_async_dispatch", False)

# Arrays computed with the published PyTorch code; another folder of the same kind may be named.
GOLDEN = Path(os.environ.get("DIT_JAX_GOLDEN", Path(__file__).parent / "golden"))


def nhwc(a):
    """Golden images are N, C, H, W (also behind further leading axes)."""
    return np.moveaxis(np.asarray(a), -3, -1)


@pytest.fixture(scope="session")
def golden():
    return lambda name: np.load(GOLDEN / "dit" / name)


@pytest.fixture(scope="session")
def network(golden):
    """network("a") -> (arguments of DiT, graphdef, params, the published arrays)."""
    from dit_jax import convert
    from dit_jax.models import dit

    def load(which):
        args = json.loads(str(golden(f"dit_{which}_forward.npz")["geometry"]))
        npz, pt = (GOLDEN / "dit" / f"dit_{which}{end}" for end in ("_weights.npz", ".pt"))
        if not npz.exists():
            pytest.importorskip("torch")
        flat = convert.read_weights(str(npz if npz.exists() else pt))
        return args, dit.abstract(**args)[0], convert.from_published(flat, args), flat

    return load
