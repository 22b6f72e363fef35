"""Eight simulated devices, strict ranks, one compilation cache for all workers."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# XLA's pools on a CPU have as many threads as there are cores (it reads NPROC) or devices. With as
# many as devices, shards that wait for one another leave none for anything else: so there are more.
os.environ.setdefault("NPROC", "32")

import jax
import jaxlib
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# Most of the tests' time is compilation of programs that run once. Where slow tests are asked for,
# as .ci/run does for all of the core, programs are compiled as a user's are.
COMPILE_FAST = ["--xla_backend_optimization_level=0"]
if tuple(map(int, jaxlib.__version__.split(".")[:2])) < (0, 11):  # later there is one emitter alone
    COMPILE_FAST.append("--xla_cpu_use_fusion_emitters=false")

SHARED = Path(__file__).parent.parent.parent / "shared" / "data" / "tfds"


def pytest_configure(config):
    """XLA's flags, in time for its first use; what the environment says has the last word."""
    flags = [
        "--xla_force_host_platform_device_count=8",
        "--xla_cpu_parallel_codegen_split_count=1",  # small programs compile faster in one piece
        *(COMPILE_FAST if config.option.markexpr == "not slow" else []),
        os.environ.get("XLA_FLAGS", ""),
    ]
    os.environ["XLA_FLAGS"] = " ".join(flags)


@pytest.fixture
def strict_dtypes():
    """Strict dtype promotion, for what is around our own functions alone."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def x64():
    """64-bit types, for one test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(scope="session")
def prepared_data():
    """The folder of data sets prepared by tensorflow-datasets, where there is one."""
    folder = Path(os.environ.get("TFDS_DATA_DIR", SHARED))
    if not (folder / "mnist").is_dir():
        pytest.skip(f"no prepared data sets in {folder}; set TFDS_DATA_DIR")
    return folder
