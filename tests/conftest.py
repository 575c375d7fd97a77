"""8 simulated CPU devices, implicit rank promotion raises, warnings are errors, no network."""

import importlib.util
import os
import signal
import socket
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Most of a test is compilation; unoptimised programs compile in half the time and compute the same.
# Of the laboratory's claims most is training, and `make test-slow` has those optimised.
QUICK = "--xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0"
# A process whose devices wait 40 s for one another in a collective is ended by XLA, and on a loaded machine eight of them on two cores do.
PATIENT = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
# As `alignax.mesh.order_collectives` says; here before jax is imported.
ORDERED = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
if not os.environ.get("OPTIMISED"):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {PATIENT} {ORDERED} --xla_force_host_platform_device_count=8"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # the user's cache is left alone; see `runs.environment`
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"}

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real models and preference pairs, where there are any."""
    for place in (os.environ.get("ALIGNAX_DATA"), REPO.parent / "shared" / "data"):
        if place and Path(place).is_dir():
            return Path(place)
    pytest.skip("no real data here: set ALIGNAX_DATA to its folder")


@pytest.fixture
def tpu_slice(monkeypatch):
    """Makes the mesh of a TPU slice that is not here: `tpu_slice("v5e:4x4", {"fsdp": 16})`."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install 'alignax[tpu]'")
    from alignax.run.plan import DESCRIBING, topology_mesh

    for name, value in DESCRIBING.items():
        monkeypatch.setitem(os.environ, name, value)
    return topology_mesh


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Refuses connections to other machines: they raise an error."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test opened a connection to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True, scope="module")
def memory():
    """Forgets the compiled programs of earlier files, if this process holds more than 4 GiB; jax alone never does."""
    yield
    pages = Path("/proc/self/statm")
    if pages.exists() and int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > 4 << 30:
        jax.clear_caches()


@pytest.fixture(autouse=True, scope="session")
def compile_cache(tmp_path_factory):
    """Commands that tests start on one device share their compiled programs."""
    os.environ["PYTEST_COMPILE_CACHE"] = str(tmp_path_factory.mktemp("compile_cache"))


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_is_heard():
    """Restores the default Ctrl-C: tests in the background ignore it, and so would the processes that they start."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
