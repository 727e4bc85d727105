"""The recipes for clusters are valid, hold no secrets and open nothing to the world. None of them is run here."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from pipeline.account import ExitCode

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
AWS, RAYJOB, SLURM = CONFIGS / "cluster-aws.yaml", CONFIGS / "rayjob.yaml", CONFIGS / "slurm" / "encode.sbatch"

# The fields of ray.io/v1 as KubeRay's Go types have them, read at revisions 0057210 (RayJob) and 026f143 (RayCluster).
JOB_FIELDS = {
    "activeDeadlineSeconds",
    "backoffLimit",
    "clusterSelector",
    "deletionStrategy",
    "entrypoint",
    "entrypointNumCpus",
    "entrypointNumGpus",
    "entrypointResources",
    "jobId",
    "managedBy",
    "metadata",
    "rayClusterSpec",
    "runtimeEnvYAML",
    "schedule",
    "shutdownAfterJobFinishes",
    "submissionMode",
    "submitterConfig",
    "submitterPodTemplate",
    "suspend",
    "ttlSecondsAfterFinished",
}
CLUSTER_FIELDS = {
    "autoscalerOptions",
    "enableInTreeAutoscaling",
    "headGroupSpec",
    "headServiceAnnotations",
    "rayVersion",
    "suspend",
    "workerGroupSpecs",
}
HEAD_FIELDS = {"enableIngress", "headService", "rayStartParams", "serviceType", "template"}
WORKER_FIELDS = {
    "groupName",
    "maxReplicas",
    "minReplicas",
    "numOfHosts",
    "rayStartParams",
    "replicas",
    "scaleStrategy",
    "template",
}


def load_rayjob() -> tuple[dict[str, Any], dict[str, Any]]:
    job, policy = yaml.safe_load_all(RAYJOB.read_text())
    return job, policy


def test_aws_cluster_passes_the_checks_that_ray_up_makes_before_it_asks_aws() -> None:
    config = yaml.safe_load(AWS.read_text())
    validate_config(config)
    validate_config(prepare_config(config))


def test_aws_cluster_lets_nobody_in_but_by_ssh_from_one_network_and_keeps_its_dashboard_on_loopback() -> None:
    config = yaml.safe_load(AWS.read_text())
    (rule,) = config["provider"]["security_group"]["IpPermissions"]
    assert (rule["FromPort"], rule["ToPort"]) == (22, 22)
    assert [network["CidrIp"] for network in rule["IpRanges"]] == ["203.0.113.0/24"]
    (head,) = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in head
    starts = [head, *(command for command in config["worker_start_ray_commands"] if "ray start" in command)]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    for kind in config["available_node_types"].values():
        node = kind["node_config"]
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"])


def test_rayjob_has_the_fields_of_its_kind_and_no_others() -> None:
    job, _ = load_rayjob()
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert spec.keys() <= JOB_FIELDS
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "InteractiveMode")
    assert isinstance(spec["backoffLimit"], int)
    assert spec["shutdownAfterJobFinishes"] is True
    assert yaml.safe_load(spec["runtimeEnvYAML"]).keys() == {"env_vars"}
    cluster = spec["rayClusterSpec"]
    assert cluster.keys() <= CLUSTER_FIELDS
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert {"rayStartParams", "template"} <= head.keys() <= HEAD_FIELDS
    for group in workers:
        assert {"groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"} <= group.keys() <= WORKER_FIELDS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (head, *workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_pods_of_the_rayjob_have_no_more_rights_than_they_need() -> None:
    job, _ = load_rayjob()
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        (container,) = pod["containers"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert all("value" in variable and "KEY" not in variable["name"] for variable in container["env"])
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
    (worker,) = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_network_policy_closes_rays_ports_to_everybody_else() -> None:
    _, policy = load_rayjob()
    assert (policy["apiVersion"], policy["kind"]) == ("networking.k8s.io/v1", "NetworkPolicy")
    spec = policy["spec"]
    assert spec["podSelector"]["matchLabels"] == {"ray.io/is-ray-node": "yes"}
    assert spec["policyTypes"] == ["Ingress"]
    within, outside = spec["ingress"]
    assert within["from"] == [{"podSelector": {"matchLabels": {"ray.io/is-ray-node": "yes"}}}]
    assert outside["ports"] == [{"protocol": "TCP", "port": 8265}]
    assert all(peer["podSelector"]["matchLabels"] for peer in outside["from"])


# SLURM: the script runs, with programs in the places of SLURM and Ray that write down how they were called

STAND_INS = {
    "scontrol": 'if [ "$1" = show ]; then printf "node-a\\nnode-b\\nnode-c\\n"; fi',
    "srun": "",
    "ray": "",
    "python": 'trap "exit 4" TERM; touch "$LOG.started"; for _ in $(seq "$TENTHS"); do sleep 0.1; done; exit "$CODE"',
}


def start_batch(folder: Path, *, code: int = 0, tenths: int = 0) -> subprocess.Popen[bytes]:
    programs = folder / "venv" / "bin"
    programs.mkdir(parents=True)
    for name, body in STAND_INS.items():
        program = programs / name
        program.write_text(f'#!/bin/bash\necho "{name} $*" >> "$LOG"\n{body}\n')
        program.chmod(0o755)
    environment = {
        "PATH": os.environ["PATH"],
        "VENV": str(folder / "venv"),
        "LOG": str(folder / "log"),
        "CODE": str(code),
        "TENTHS": str(tenths),
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "node-[a-c]",
        "SLURM_CPUS_PER_TASK": "96",
        "SLURM_GPUS_PER_NODE": "8",
    }
    return subprocess.Popen(["bash", str(SLURM), "--input.uri", "in put"], env=environment, cwd=folder)


@pytest.mark.parametrize("code", list(ExitCode))
def test_slurm_script_starts_ray_on_every_node_and_ends_as_the_job_does(tmp_path: Path, code: ExitCode) -> None:
    assert start_batch(tmp_path, code=code).wait(60) == code
    calls = (tmp_path / "log").read_text().splitlines()
    head, workers = sorted(call for call in calls if call.startswith("srun"))
    assert "--nodes=1 " in head
    assert head.endswith("ray start --block --num-cpus=96 --num-gpus=8 --head --port=23456 --dashboard-host=127.0.0.1")
    assert "--nodes=2 --ntasks=2 --nodelist=node-b,node-c" in workers
    assert workers.endswith("--address=node-a:23456")
    assert "python jobs/encode_dataset.py --config configs/cogvideox-5b.yaml --input.uri in put" in calls
    assert ("scontrol requeue 123456" in calls) == (code == ExitCode.STOPPED)


def test_slurm_warning_stops_the_driver_and_puts_the_job_back_in_the_queue(tmp_path: Path) -> None:
    process = start_batch(tmp_path, tenths=300)
    deadline = time.monotonic() + 30
    while not (tmp_path / "log.started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == ExitCode.STOPPED
    assert "scontrol requeue 123456" in (tmp_path / "log").read_text().splitlines()


def test_slurm_script_keeps_its_token_out_of_files_and_command_lines(tmp_path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(SLURM)], check=True).returncode == 0
    text = SLURM.read_text()
    assert "RAY_AUTH_MODE=token" in text
    assert start_batch(tmp_path).wait(60) == 0
    assert not [word for word in (tmp_path / "log").read_text().split() if len(word) == 64]
