"""Settings of every test: 8 simulated devices, no silent promotion, compiled programs cached between runs."""

import gc
import os
import sys
from importlib.metadata import version
from pathlib import Path

CACHE = Path(__file__).parent.parent / ".jax_cache"
MAPS, STATM = Path("/proc/self/maps"), Path("/proc/self/statm")

# Compiling takes far longer than running these programs. `XLA_FLAGS= make test` compiles them as everybody's.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if version("jaxlib").startswith("0.10."):  # later ones end the process at a flag that they no longer know
    QUICK += " --xla_cpu_use_fusion_emitters=false"
    QUICK += " --xla_cpu_parallel_codegen_split_count=1"  # dividing a program's code costs a fifth of compiling it
    # On a busy machine 8 devices wait for each other longer than the 40 s after which XLA ends the process.
    QUICK += " --xla_cpu_collective_call_terminate_timeout_seconds=600"
    QUICK += " --xla_cpu_collective_call_warn_stuck_timeout_seconds=300"

# Read when jax is imported, here and in the processes that tests start.
os.environ.setdefault("XLA_FLAGS", QUICK)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# XLA runs the devices in a pool of as many threads: two programs in flight would wait for each other's for ever.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"

import jax  # noqa: E402  (it reads the settings above)
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))  # the hook imports the checker by its name
import shapes  # noqa: E402

# Every annotation of the packages is checked at every call, shapes and dtypes included.
install_import_hook(["quantizers", "seq_models", "semid"], "shapes.checked")
pytest.raises = shapes.raises_unchecked


@pytest.fixture(scope="module")
def unchecked():
    """No checks: jaxtyping cannot compare the symbolic sizes of an exported program."""
    with shapes.unchecked():
        yield


# Of few tests that take long: begun first, lest a worker end with them alone.
HEAVY = ("test_resume", "test_documents", "test_tutorial", "test_demo", "test_tokenizer_facts")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in HEAVY)


def pytest_collection_finish():
    """Collect garbage rarely: compiling makes and drops so many objects that looking for circles was a tenth of it."""
    gc.collect()
    gc.freeze()  # modules and tests stay to the end
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="module", autouse=True)
def _programs_that_fit():
    """A compiled program holds memory, and memory maps, of which Linux gives a process 65,530: the suite would use
    them up."""
    yield
    if MAPS.exists() and (MAPS.read_bytes().count(b"\n") > 30_000 or _resident_bytes() > 3 * 2**30):
        jax.clear_caches()


def _resident_bytes() -> int:
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
