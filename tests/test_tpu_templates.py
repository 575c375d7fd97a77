"""The templates under tpu/ for GKE and SLURM: their fields, and their agreement with what alignax reads."""

import copy
import os
import re
import subprocess
import sys
import tomllib
from math import prod
from pathlib import Path

import jax
import pytest
import yaml
from fake_cloud import TPU

from alignax import distributed

ROOT = TPU.parent
# The fields of every object that the template uses, by the schema of jobset.x-k8s.io/v1alpha2 (the CRD of JobSet, August 2026), which
# holds those of Kubernetes' Job and Pod. `*` stands for any name, and a type for a value of that type.
KEYS = lambda names, **known: dict.fromkeys(names.split(), None) | known  # None: known, and not used here
OBJECT = {"name": str, "namespace": str, "labels": {"*": str}, "annotations": {"*": str}}
CONTAINER = KEYS(
    "envFrom lifecycle livenessProbe ports readinessProbe resizePolicy restartPolicy restartPolicyRules startupProbe stdin stdinOnce "
    "terminationMessagePath terminationMessagePolicy tty volumeDevices",
    name=str,
    image=str,
    imagePullPolicy=("Always", "IfNotPresent", "Never"),
    command=[str],
    args=[str],
    workingDir=str,
    env=[{"name": str, "value": str, "valueFrom": {"secretKeyRef": {"name": str, "key": str, "optional": bool}}}],
    resources={"limits": {"*": int}, "requests": {"*": int}},
    securityContext={"privileged": bool},
    volumeMounts=[{"name": str, "mountPath": str, "readOnly": bool, "subPath": str}],
)
POD = KEYS(
    "activeDeadlineSeconds affinity automountServiceAccountToken dnsConfig enableServiceLinks hostAliases hostIPC hostPID hostname "
    "imagePullSecrets initContainers nodeName os overhead preemptionPolicy priority priorityClassName readinessGates resourceClaims "
    "runtimeClassName schedulerName securityContext serviceAccountName shareProcessNamespace subdomain topologySpreadConstraints",
    restartPolicy=("Never", "OnFailure"),  # those of a job
    terminationGracePeriodSeconds=int,
    hostNetwork=bool,
    dnsPolicy=("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"),
    nodeSelector={"*": str},
    tolerations=[{"key": str, "operator": ("Exists", "Equal"), "value": str, "effect": str, "tolerationSeconds": int}],
    containers=[CONTAINER],
    volumes=[{"name": str, "persistentVolumeClaim": {"claimName": str, "readOnly": bool}}],
)
JOB = KEYS(
    "activeDeadlineSeconds backoffLimitPerIndex managedBy manualSelector maxFailedIndexes podReplacementPolicy selector successPolicy "
    "suspend ttlSecondsAfterFinished",
    backoffLimit=int,
    completionMode=("Indexed", "NonIndexed"),
    completions=int,
    parallelism=int,
    podFailurePolicy={
        "rules": [
            {
                "action": ("FailJob", "FailIndex", "Ignore", "Count"),
                "onExitCodes": {"containerName": str, "operator": ("In", "NotIn"), "values": [int]},
                "onPodConditions": [{"type": str, "status": str}],
            }
        ]
    },
    template={"metadata": OBJECT, "spec": POD},
)
ACTIONS = ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob", "RestartJobAndIgnoreMaxRestarts")
REASONS = ("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy")
JOBSET = {
    "apiVersion": ("jobset.x-k8s.io/v1alpha2",),
    "kind": ("JobSet",),
    "metadata": OBJECT,
    "spec": KEYS(
        "coordinator managedBy network startupPolicy successPolicy suspend ttlSecondsAfterFinished volumeClaimPolicies",
        failurePolicy={
            "maxRestarts": int,
            "restartStrategy": ("Recreate", "BlockingRecreate", "InPlaceRestart"),
            "rules": [{"name": str, "action": ACTIONS, "onJobFailureReasons": [REASONS], "targetReplicatedJobs": [str]}],
        },
        replicatedJobs=[{"name": str, "groupName": str, "replicas": int, "dependsOn": None, "template": {"metadata": OBJECT, "spec": JOB}}],
    ),
}
CHIPS = 4  # of a host, for every slice of several hosts


def wrong(value, known, where="."):
    """The places of a manifest that its schema does not know."""
    if known is None:
        return [f"{where}: not in this test's table"]
    if isinstance(known, type):
        return [] if type(value) is known else [f"{where}: {value!r} is no {known.__name__}"]
    if isinstance(known, tuple):
        return [] if value in known else [f"{where}: {value!r} is none of {known}"]
    if isinstance(known, list):
        if not isinstance(value, list):
            return [f"{where}: {value!r} is no list"]
        return [line for i, item in enumerate(value) for line in wrong(item, known[0], f"{where}[{i}]")]
    if not isinstance(value, dict):
        return [f"{where}: {value!r} is no object"]
    lines = [f"{where}: unknown field {name!r}" for name in value if name not in known and "*" not in known]
    return lines + [
        line
        for name, item in value.items()
        if name in known or "*" in known
        for line in wrong(item, known.get(name, known.get("*")), f"{where}.{name}")
    ]


@pytest.fixture
def jobset():
    return yaml.safe_load((TPU / "gke/jobset.yaml").read_text())


def job(jobset):
    (only,) = jobset["spec"]["replicatedJobs"]
    return only["template"]["spec"]


def pod(jobset):
    return job(jobset)["template"]["spec"]


def test_the_fields_of_the_jobset_are_those_of_its_schema(jobset):
    assert wrong(jobset, JOBSET) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["spec"].update(maxRestarts=3),  # one floor too high
        lambda m: m["spec"]["failurePolicy"].update(maxRestarts="3"),
        lambda m: m["spec"]["failurePolicy"]["rules"][0].update(action="Fail"),
        lambda m: m["spec"]["failurePolicy"]["rules"][0].update(onJobFailureReasons=["ExitCode"]),
        lambda m: job(m).update(restartPolicy="Never"),
        lambda m: pod(m).update(restartPolicy="Always"),
        lambda m: pod(m).update(nodeSelectors={}),
        lambda m: pod(m)["nodeSelector"].update(spot=True),
        lambda m: pod(m)["containers"][0].update(envs=[]),
        lambda m: pod(m)["containers"][0]["env"].append({"name": "A", "value": 1}),
        lambda m: pod(m)["containers"][0].update(args="train"),
        lambda m: pod(m).update(containers=pod(m)["containers"][0]),
    ],
)
def test_the_check_of_fields_finds_mistakes(jobset, change):
    changed = copy.deepcopy(jobset)
    change(changed)
    assert len(wrong(changed, JOBSET)) == 1


def test_the_numbers_of_the_jobset_agree(jobset):
    spec, (container,) = job(jobset), pod(jobset)["containers"]
    chips = prod(map(int, pod(jobset)["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert container["resources"]["limits"] == {"google.com/tpu": CHIPS}
    assert spec["parallelism"] == spec["completions"] == chips // CHIPS
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod(jobset)["volumes"]}
    mount = container["volumeMounts"][0]["mountPath"]
    paths = [entry["value"] for entry in container["env"] if "value" in entry]
    workdir = next(word.partition("=")[2] for word in container["args"] if word.startswith("--config.workdir="))
    assert all(path.startswith(mount + "/") for path in [*paths, workdir])
    assert (ROOT / container["args"][container["args"].index("--config") + 1]).exists()


def test_a_lost_host_restarts_all_and_bad_input_ends_the_jobset(jobset):
    policy, spec = jobset["spec"]["failurePolicy"], job(jobset)
    assert policy["maxRestarts"] > 0 and spec["backoffLimit"] == 0  # any pod that fails fails its job, and so restarts the JobSet
    assert pod(jobset)["restartPolicy"] == "Never"  # which a pod failure policy needs
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["operator"] == "In"
    assert rule["onExitCodes"]["containerName"] == pod(jobset)["containers"][0]["name"]
    supervised = re.search(r"case \$code in 0 \| (\d+) \|", (TPU / "supervise.sh").read_text())  # the code that ends it there, too
    assert supervised and rule["onExitCodes"]["values"] == [int(supervised[1])] == [2]
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_every_variable_that_alignax_reads_on_kubernetes_is_set(jobset):
    """GKE's webhook sets them, under conditions that the template meets; the rest must stay unset there."""
    source = Path(distributed.__file__).read_text().split("def _cloud_tpu")[1].split("\ndef ")[0]
    read = set(re.findall(r'"((?:TPU|MEGASCALE|JOB|K8S)[A-Z_]+)"', source))
    webhook = {"TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID", "MEGASCALE_COORDINATOR_ADDRESS"}
    instead = {"TPU_PROCESS_ADDRESSES", "TPU_SKIP_MDS_QUERY"}  # the first in place of TPU_WORKER_HOSTNAMES; the second if neither is there
    assert read and read <= webhook | instead
    given = {entry["name"] for entry in pod(jobset)["containers"][0]["env"]}
    assert not given & (webhook | instead | set(distributed.EXPLICIT) | set(distributed.SLURM))  # which would shadow the webhook's
    spec = job(jobset)
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] > 1  # the webhook's conditions; JobSet sets the subdomain
    assert "google.com/tpu" in pod(jobset)["containers"][0]["resources"]["limits"]
    assert set(pod(jobset)["nodeSelector"]) >= {"cloud.google.com/gke-tpu-accelerator", "cloud.google.com/gke-tpu-topology"}
    assert jobset["metadata"]["annotations"] == {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}


def test_the_environment_of_kubernetes_joins_all_slices(monkeypatch):
    before = jax.config.values["jax_platforms"]
    for name in (*distributed.EXPLICIT, *distributed.SLURM, "TPU_PROCESS_ADDRESSES", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", ",".join(f"alignax-slice-1-{n}.alignax" for n in range(4)))
    monkeypatch.setenv("TPU_WORKER_ID", "3")
    monkeypatch.setenv("MEGASCALE_COORDINATOR_ADDRESS", "alignax-slice-0-0.alignax")
    try:
        jax.config.update("jax_platforms", "tpu,cpu")
        assert distributed._cloud_tpu() == {}  # jax finds the rest
    finally:
        jax.config.update("jax_platforms", before)


# --- the image


def test_the_image_copies_what_is_there_and_installs_what_is_offered():
    lines = [line for line in (TPU / "gke/Dockerfile").read_text().splitlines() if line and line[0] != "#"]
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    words = [line.split() for line in lines]
    copied = [word for line in words if line[0] == "COPY" for word in line[1:-1]]
    assert all((ROOT / name).exists() for name in copied)
    install = next(i for i, line in enumerate(lines) if "pip install" in line)
    before = {word for line in words[:install] if line[0] == "COPY" for word in line[1:-1]}
    assert before >= {"pyproject.toml", settings["readme"], *settings["license-files"], "alignax"}  # what the build of the package reads
    assert {"experiments", "tpu"} <= set(copied)
    extra = dict(word.split("=") for line in words if line[0] == "ARG" for word in line[1:])["EXTRA"]
    assert extra in settings["optional-dependencies"] and "cuda" in settings["optional-dependencies"]
    version = re.fullmatch(r"FROM python:3\.(\d+)-slim", lines[0])
    assert version and int(version[1]) in (11, 12)
    assert 'ENTRYPOINT ["alignax"]' in lines  # an exec form: SIGTERM reaches it
    sent = [line for line in (TPU / "gke/Dockerfile.dockerignore").read_text().splitlines() if line[0] != "#"]
    assert sent[0] == "*" and {line[1:] for line in sent if line[0] == "!"} == set(copied)


# --- SLURM


SRUN = """#!/usr/bin/env bash
printf '%s\\0' "$@" >srun
exit "$(cat code)"
"""


def sbatch(folder, code, *arguments, **settings):
    """Runs the batch script where `srun` ends with this code; returns its own exit code, its output, and the calls of scontrol."""
    tools = {"srun": SRUN, "scontrol": '#!/usr/bin/env bash\necho "$*" >>scontrol\n'}
    for name, text in tools.items():
        (folder / name).write_text(text)
    (folder / "bin").mkdir()
    for name in tools:
        (folder / name).rename(folder / "bin" / name)
        (folder / "bin" / name).chmod(0o755)
    (folder / "code").write_text(str(code))
    environment = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "7"} | settings
    done = subprocess.run([TPU / "slurm.sbatch", *arguments], env=environment, cwd="/", capture_output=True, text=True, timeout=30)
    calls = (folder / "scontrol").read_text().splitlines() if (folder / "scontrol").exists() else []
    return done.returncode, done.stdout + done.stderr, calls


@pytest.mark.skipif(sys.platform != "linux", reason="a script for Linux clusters")
@pytest.mark.parametrize(("code", "again"), [(0, 0), (2, 0), (1, 1), (137, 1), (143, 1)])
def test_a_slurm_job_goes_back_into_the_queue_unless_it_finished_or_was_refused(tmp_path, code, again):
    arguments = ["train", "--config", "a b.py", '--x=it\'s "$HOME"', "*"]
    ended, text, calls = sbatch(tmp_path, code, *arguments)
    assert ended == code and calls == ["requeue 7"] * again and ("restart 1 of 20" in text) == bool(again)
    words = (tmp_path / "srun").read_text().split("\0")[:-1]
    assert words[words.index("alignax") + 1 :] == arguments


@pytest.mark.skipif(sys.platform != "linux", reason="a script for Linux clusters")
def test_a_slurm_job_gives_up_after_its_restarts(tmp_path):
    ended, text, calls = sbatch(tmp_path, 1, "train", SLURM_RESTART_COUNT="3", RESTARTS="3")
    assert ended == 1 and not calls and "ended with exit code 1 after 3 restarts; giving up" in text


@pytest.mark.skipif(sys.platform != "linux", reason="a script for Linux clusters")
def test_a_slurm_job_wants_arguments(tmp_path):
    assert sbatch(tmp_path, 0)[:2] == (
        2,
        "error: no arguments; give those of alignax, as in: sbatch tpu/slurm.sbatch train --config FILE\n",
    )


def test_a_slurm_job_has_a_task_for_each_gpu():
    """For then jax gives each task one device."""
    text = (TPU / "slurm.sbatch").read_text()
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in text.splitlines() if line.startswith("#SBATCH "))
    assert options["ntasks-per-node"] == options["gpus-per-node"] and int(options["nodes"]) > 1 and options["gpu-bind"] == "none"
    assert options["signal"].startswith("TERM@") and "requeue" in options
    header, _, body = text.partition("set -euo")
    assert "#SBATCH" not in body and header.startswith("#!")  # SLURM stops looking at the first command
