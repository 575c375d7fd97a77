import http.server
import json
import os
import platform
import socket
import subprocess
import sys
import threading
from unittest.mock import Mock

import flax
import jax
import numpy as np
import pytest
import runs

from alignax import distributed

SETTINGS = (*distributed.EXPLICIT, *distributed.SLURM, "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
SETTINGS += ("TPU_SKIP_MDS_QUERY", "MEGASCALE_COORDINATOR_ADDRESS", "GCE_METADATA_IP", "XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
REQUEST = distributed._metadata
SLURM_STEP = {name: "7" for name in distributed.SLURM}


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call of `jax.distributed.initialize`; a clean environment in which a metadata request fails."""
    made = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: made.append(arguments))
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(distributed, "_LINK", None)
    for opens in ("meet", "open_link"):
        monkeypatch.setattr(distributed, opens, lambda *_: Mock(gather=lambda text: [text]))
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(distributed, "_metadata", lambda key: pytest.fail(f"asked the metadata server for {key}"))
    before = jax.config.values["jax_platforms"]
    yield made
    jax.config.update("jax_platforms", before)


@pytest.fixture
def metadata(monkeypatch, calls):
    """A metadata server on this machine, with the attributes that the test puts into the dict."""
    attributes, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            key = self.path.rpartition("/")[2]
            asked.append((key, self.headers["Metadata-Flavor"]))
            value = attributes.get(key, 404)
            self.send_response(value if isinstance(value, int) else 200)
            self.end_headers()
            self.wfile.write(b"" if isinstance(value, int) else value.encode())

        def log_message(self, *_):
            pass

    monkeypatch.setattr(distributed, "_metadata", REQUEST)
    monkeypatch.setenv("no_proxy", "*")
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        jax.config.update("jax_platforms", "tpu,cpu")
        yield attributes, asked
        server.shutdown()


def setenv(monkeypatch, values):
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_explicit_variables_win(monkeypatch, calls):
    setenv(monkeypatch, SLURM_STEP)
    setenv(monkeypatch, {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "0"})
    jax.config.update("jax_cpu_collectives_implementation", None)
    distributed.initialize()
    (arguments,) = calls
    assert arguments == dict(coordinator_address="10.0.0.1:1234", num_processes=4, process_id=0, cluster_detection_method="deactivate")
    assert jax.config.values["jax_cpu_collectives_implementation"] == "gloo"


@pytest.mark.parametrize("missing", distributed.EXPLICIT)
def test_a_missing_variable_is_named(monkeypatch, calls, missing):
    setenv(monkeypatch, {name: "1" for name in distributed.EXPLICIT if name != missing})
    with pytest.raises(ValueError, match=rf"^{missing} not set, but "):
        distributed.initialize()
    monkeypatch.setenv(missing, "")  # empty is unset
    with pytest.raises(ValueError, match=rf"^{missing} not set, but "):
        distributed.initialize()
    assert not calls


@pytest.mark.parametrize("value", ["two", "-1", "1.0"])
def test_a_count_that_is_no_number_is_named(monkeypatch, calls, value):
    setenv(monkeypatch, {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": value})
    with pytest.raises(ValueError, match=f"JAX_PROCESS_ID='{value}' must be whole numbers"):
        distributed.initialize()


@pytest.mark.parametrize(("address", "index"), [("host", "0"), ("host:port", "0"), ("host:1", "2")])
def test_an_address_without_a_port_and_a_number_too_high_are_refused(monkeypatch, calls, address, index):
    setenv(monkeypatch, {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": index})
    with pytest.raises(
        ValueError, match=f"JAX_PROCESS_ID={index} must be below JAX_NUM_PROCESSES=2, and JAX_COORDINATOR_ADDRESS='{address}' HOST"
    ):
        distributed.initialize()
    assert not calls


def test_a_slurm_step_of_several_tasks(monkeypatch, calls):
    setenv(monkeypatch, SLURM_STEP)
    distributed.initialize()
    assert calls == [dict(cluster_detection_method="slurm")]


@pytest.mark.parametrize("change", [{"SLURM_NTASKS": "1"}, {"SLURM_STEP_NODELIST": None}])
def test_one_slurm_task_or_no_step_is_a_single_process(monkeypatch, calls, change):
    setenv(monkeypatch, {name: value for name, value in (SLURM_STEP | change).items() if value})
    distributed.initialize()
    assert not calls


@pytest.mark.parametrize("platforms", [None, "", "cpu", "cuda,cpu"])
def test_no_metadata_request_without_tpu(monkeypatch, calls, platforms):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")  # set by hand on machines without TPUs, to compile for them
    jax.config.update("jax_platforms", platforms)
    distributed.initialize()
    assert not calls


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_PROCESS_ADDRESSES": "a:8476,b:8476", "TPU_WORKER_HOSTNAMES": "a"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_COORDINATOR_ADDRESS": "a"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_SKIP_MDS_QUERY": "1"}, False),
    ],
)
def test_tpu_hosts_from_the_environment(monkeypatch, calls, environment, several):
    jax.config.update("jax_platforms", "tpu,cpu")
    setenv(monkeypatch, environment)
    distributed.initialize()
    assert calls == ([{}] if several else [])


@pytest.mark.parametrize(
    ("given", "several"),
    [
        ({"worker-network-endpoints": "unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3"}, True),
        ({"worker-network-endpoints": "host-0", "tpu-env": "ZONE: 'z'\nMEGASCALE_COORDINATOR_ADDRESS: '10.0.0.2'\n"}, True),
        ({"worker-network-endpoints": "host-0", "tpu-env": "ZONE: 'z'\n"}, False),
        ({}, False),
    ],
)
def test_tpu_hosts_from_the_metadata_server(metadata, calls, given, several):
    attributes, asked = metadata
    attributes.update(given)
    distributed.initialize()
    assert calls == ([{}] if several else [])
    assert asked[0] == ("worker-network-endpoints", "Google")


def test_a_metadata_server_that_fails_is_an_error_with_the_remedy(metadata, monkeypatch, calls):
    metadata[0]["worker-network-endpoints"] = 503
    with pytest.raises(ValueError, match="answered 503.*set JAX_COORDINATOR_ADDRESS"):
        distributed.initialize()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(ValueError, match="did not answer.*TPU_SKIP_MDS_QUERY=1"):
            distributed.initialize()
    assert not calls


def test_a_second_call_does_nothing(monkeypatch, calls):
    setenv(monkeypatch, SLURM_STEP)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    distributed.initialize()
    assert not calls


def test_limits_are_numbers_of_seconds(monkeypatch, calls):
    assert distributed.limits() == [280, 40, 3600]
    setenv(monkeypatch, {"ALIGNAX_LOST_SECONDS": "90.5", "ALIGNAX_START_SECONDS": ""})
    assert distributed.limits() == [280, 90.5, 3600]
    for wrong in ("soon", "0", "-1", "inf", "nan"):
        monkeypatch.setenv("ALIGNAX_WAIT_SECONDS", wrong)
        with pytest.raises(ValueError, match=f"ALIGNAX_WAIT_SECONDS='{wrong}' must be a number of seconds above 0"):
            distributed.limits()


def test_long_limits_are_told_to_jax_whose_own_would_come_first(monkeypatch, calls):
    setenv(monkeypatch, SLURM_STEP | {"ALIGNAX_LOST_SECONDS": "90.5", "ALIGNAX_START_SECONDS": "600"})
    distributed.initialize()
    assert calls == [dict(cluster_detection_method="slurm", initialization_timeout=620, heartbeat_timeout_seconds=181)]


def of_four(monkeypatch, *texts):
    """This process as process 0 of 4; the texts of all, for each call of `gather`."""
    answers = iter(texts)
    own = Mock(index=0, hosts=["a", "b", "c", "d"], gather=lambda text: [x if x is not None else text for x in next(answers)])
    monkeypatch.setattr(distributed, "_LINK", own)


def test_the_processes_that_differ_are_named_with_their_hosts(monkeypatch):
    mine = {"config": "seed = 0", "installation": "python 3.11.7\njax 0.10.2"}
    other = mine | {"installation": "python 3.11.7\njax 0.11.2"}
    said = [json.dumps({name: distributed.digest(text) for name, text in given.items()}) for given in (mine, other)]
    of_four(monkeypatch, [said[0], said[1], said[0], said[1]], [None, other["installation"], None, other["installation"]])
    line = r"processes 1, 3 were given another installation than process 0 \('jax 0.11.2' on b, and 'jax 0.10.2' on a\); start all"
    with pytest.raises(ValueError, match=line):
        distributed.check_alike(mine)
    of_four(monkeypatch, [said[0]] * 4)
    distributed.check_alike(mine)


def test_an_error_of_another_process_is_told_with_its_host(monkeypatch):
    of_four(monkeypatch, [None, "", "no such file", "no such file"])
    with pytest.raises(ValueError, match=r"process 2 could not go on: no such file \(on c\)"), distributed.together():
        pass
    of_four(monkeypatch, [None, "", "no such file", ""])
    with pytest.raises(KeyError, match="mine"), distributed.together():
        raise KeyError("mine")


def test_the_versions_are_those_of_what_computes():
    lines = distributed.versions().splitlines()
    assert lines[0] == f"python {platform.python_version()}"
    assert {f"jax {jax.__version__}", f"flax {flax.__version__}", f"numpy {np.__version__}"} < set(lines)


def start(code, *arguments, **environment):
    """A Python process that is strict about warnings and has none of this machine's settings."""
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS and "proxy" not in name.lower()}
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    return subprocess.Popen(
        command, env=clean | {"JAX_PLATFORMS": "cpu"} | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(processes, timeout):
    """The exit codes and outputs; nothing is left running, whatever happens."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()
    return [process.returncode for process in processes], "\n".join(outputs)


ALONE = """
from alignax import distributed
distributed.initialize()
import jax
jax.config.update("jax_num_cpu_devices", 3)  # refused once a device was touched
assert not jax.distributed.is_initialized() and jax.device_count() == 3 and distributed.is_main()
"""


def test_alone_no_device_is_touched():
    codes, output = finish([start(ALONE)], timeout=120)
    assert codes == [0], output


TOGETHER = """
import json, sys
from alignax import distributed
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
jax.config.update("jax_num_cpu_devices", 4)
distributed.initialize()
mesh = Mesh(np.array(jax.devices()), ("data",))
rows = NamedSharding(mesh, P("data"))
values = np.arange(48, dtype=np.float32).reshape(16, 3)
x = jax.make_array_from_callback(values.shape, rows, lambda index: values[index])  # [16_data, 3]
total = jax.jit(lambda x: (x**2).sum(), out_shardings=NamedSharding(mesh, P()))(x)
facts = dict(index=jax.process_index(), processes=jax.process_count(), devices=jax.device_count(),
             local=jax.local_device_count(), rows=sum(shard.data.shape[0] for shard in x.addressable_shards),
             main=distributed.is_main(), total=float(total), hosts=distributed.link().hosts,
             told=distributed.from_main(f"by {jax.process_index()}"))
json.dump(facts, open(sys.argv[1], "w"))
"""


@pytest.mark.parametrize("meets", runs.slow_but((True, False), True), ids=["they meet before jax starts", "jax alone knows the address"])
def test_two_processes_of_four_devices_sum_together(meets, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    reports = [tmp_path / f"{index}.json" for index in range(2)]
    bound = {} if meets else {"JAX_COORDINATOR_BIND_ADDRESS": address}
    processes = [
        start(TOGETHER, str(report), JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(index), **bound)
        for index, report in enumerate(reports)
    ]
    codes, output = finish(processes, timeout=180)
    assert codes == [0, 0], output
    for index, report in enumerate(reports):
        assert json.loads(report.read_text()) == dict(
            index=index, processes=2, devices=8, local=4, rows=8, main=index == 0, total=float(sum(n * n for n in range(48))),
            hosts=[socket.gethostname()] * 2, told="by 0",
        )  # fmt: skip
