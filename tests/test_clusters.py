"""Sweeps on SLURM, and the files for clusters."""

import os
import pickle
import re
import subprocess
import sys
import threading
import time
import types

import pytest
import small
import yaml
from stub_runs import events, install, make_runs, wait_for

from zorn_jax import sweep

SBATCH = small.ROOT / "scripts" / "slurm.sbatch"
KUBERNETES = small.ROOT / "scripts" / "kubernetes.yaml"
TRAIN = r"""#!/bin/bash
echo "$@" > "$0.args"
for flag; do
  [[ $flag != --workdir=* ]] || workdir=${flag#*=}
done
mkdir -p "$workdir/checkpoints/$SAVED"
printf '{\n  "steps": 30,\n  "search": {\n    "steps": 1\n  }\n}\n' \
  > "$workdir/config.json"
if [[ -n $PAUSE ]]; then
  trap 'sleep 0.3; touch "$0.saved"; exit 0' TERM
  touch "$0.ready"
  sleep 9 > /dev/null 2>&1 &
  wait
fi
exit "$STATUS"
"""
FAKE = {}


@pytest.fixture
def stub(tmp_path, monkeypatch):
  return install(tmp_path, monkeypatch)


# SLURM.


class FakeJob:
  def __init__(self, folder, job_id, call=None):
    self.folder, self.job_id, self.call = folder, job_id, call

  def done(self):
    return self.call is not None or self.job_id in FAKE["done"]

  def result(self):
    return self.call()


class FakeExecutor:
  def __init__(self, folder, **kwargs):
    FAKE["constructed"] = {"folder": folder, **kwargs}

  def update_parameters(self, **kwargs):
    FAKE["parameters"] = kwargs

  def submit_array(self, calls):
    FAKE["arrays"].append(len(calls))
    calls = pickle.loads(pickle.dumps(calls))  # As they travel to a node.
    folder = FAKE["constructed"]["folder"]
    return [FakeJob(folder, f"77_{i}", call) for i, call in enumerate(calls)]


@pytest.fixture
def fake_submitit(monkeypatch):
  FAKE.clear()
  FAKE.update(arrays=[], done=set())
  module = types.SimpleNamespace(
    AutoExecutor=FakeExecutor,
    SlurmJob=FakeJob,
    helpers=types.SimpleNamespace(DelayedSubmission=lambda call: call),
  )
  monkeypatch.setitem(sys.modules, "submitit", module)
  monkeypatch.setattr(sweep.shutil, "which", lambda name: f"/bin/{name}")


def test_slurm_gets_one_array(stub, tmp_path, fake_submitit):
  said = []
  runs = make_runs(0, 13)
  states, stopped = sweep.run_slurm(
    runs, tmp_path, said.append, partition="gpu", gpus=2, minutes=9, at_once=5
  )
  assert FAKE["constructed"]["cluster"] == "slurm"
  assert FAKE["arrays"] == [2]
  assert FAKE["parameters"] == {
    "name": "zorn_sweep",
    "timeout_min": 9,
    "nodes": 1,
    "tasks_per_node": 1,
    "gpus_per_node": 2,
    "slurm_partition": "gpu",
    "slurm_array_parallelism": 5,
    "slurm_signal_delay_s": 120,
  }
  assert states == {"seed=0": "complete", "seed=13": "failed"}
  assert not stopped
  assert said[-1].endswith("failed (exit status 3): the reason")
  # Only what an earlier call has not left in the queue is submitted.
  states, _ = sweep.run_slurm(
    make_runs(13, 0, 1), tmp_path, said.append, wait=False
  )
  assert FAKE["arrays"] == [2, 1]
  assert set(states.values()) == {"queued"}
  FAKE["done"] = {"77_1"}  # The job of seed 13.
  sweep.run_slurm(make_runs(0, 13), tmp_path, said.append, wait=False)
  assert FAKE["arrays"] == [2, 1, 1]


def test_a_job_saves_before_it_is_queued_again(stub, tmp_path, fake_submitit):
  (run,) = make_runs(100)
  directory = tmp_path / run.name
  job = sweep._Job(sweep.train_command(run, directory), directory, os.getcwd())
  status = []
  thread = threading.Thread(target=lambda: status.append(job()))
  thread.start()
  wait_for(lambda: events(directory))
  again = job.checkpoint()
  assert [x[0] for x in events(directory)] == ["start", "stop", "end"]
  thread.join()
  assert status == [0]
  assert pickle.loads(pickle.dumps(again))._arguments == job._arguments


def test_slurm_needs_its_programs(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace())
  monkeypatch.setattr(sweep.shutil, "which", lambda name: None)
  with pytest.raises(ValueError, match="needs sbatch"):
    sweep.run_slurm([], tmp_path, print)
  monkeypatch.setitem(sys.modules, "submitit", None)
  with pytest.raises(ValueError, match=r'pip install "zorn_jax\[sweep\]"'):
    sweep.run_slurm([], tmp_path, print)


def test_submitit_runs_the_jobs(stub, tmp_path):
  pytest.importorskip("submitit")
  runs = make_runs(0, 13)
  states, _ = sweep.run_slurm(runs, tmp_path, print, gpus=0, cluster="local")
  assert states == {"seed=0": "complete", "seed=13": "failed"}


# The files for clusters.


def fake_program(tmp_path, name, text):
  path = tmp_path / "bin" / name
  path.parent.mkdir(exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)


def shell_environ(tmp_path, **extra):
  path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
  extra = {"PAUSE": "", "STATUS": "0", "SAVED": "30"} | extra
  return os.environ | {"PATH": path, "SLURM_JOB_ID": "5"} | extra


def kubernetes():
  documents = list(yaml.safe_load_all(KUBERNETES.read_text()))
  named = {document["kind"]: document for document in documents}
  assert len(named) == len(documents)
  return named


def start_pod(tmp_path, **extra):
  (container,) = kubernetes()["Job"]["spec"]["template"]["spec"]["containers"]
  fake_program(tmp_path, "python", TRAIN)
  environ = {"CONFIG": "c.py", "WORKDIR": str(tmp_path / "run")}
  return subprocess.Popen(
    [*container["command"], "--config.seed=1"],
    env=shell_environ(tmp_path, **environ, **extra),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


@pytest.mark.parametrize(
  ("saved", "status", "state", "requeued"),
  [
    ("30", "0", "RUNNING", False),  # All is done.
    ("20", "0", "RUNNING", True),  # The limit was near.
    ("20", "1", "RUNNING", False),  # The training failed.
    ("20", "0", "COMPLETING", False),  # The user has cancelled it.
  ],
)
def test_slurm_script(tmp_path, saved, status, state, requeued):
  fake_program(tmp_path, "srun", '#!/bin/bash\nkill $PPID\nexec "${@:3}"')
  fake_program(tmp_path, "python", TRAIN)
  fake_program(tmp_path, "squeue", f"#!/bin/bash\necho {state}")
  fake_program(tmp_path, "scontrol", '#!/bin/bash\necho "$@" > "$0.args"')
  args = ["c.py", str(tmp_path / "run"), "--config.name=a b"]
  done = subprocess.run(
    ["bash", SBATCH, *args],
    env=shell_environ(tmp_path, SAVED=saved, STATUS=status),
    capture_output=True,
    text=True,
  )
  assert done.returncode == int(status), done.stderr
  assert (tmp_path / "bin" / "python.args").read_text().strip() == (
    f"-m zorn_jax.cli.train --config=c.py --workdir={args[1]} --config.name=a b"
  )
  called = tmp_path / "bin" / "scontrol.args"
  assert called.exists() == requeued
  assert not requeued or called.read_text() == "requeue 5\n"


def test_slurm_script_asks_for_a_task_per_gpu():
  text = SBATCH.read_text()
  subprocess.run(["bash", "-n", SBATCH], check=True)
  options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.M))
  assert options["ntasks-per-node"] == options["gpus-per-node"]
  assert options["signal"] == "TERM@120"
  assert options["open-mode"] == "append"
  assert "requeue" in options and int(options["nodes"]) > 1
  # Options end where the commands begin.
  assert text.rindex("#SBATCH") < text.index("set -euo")
  done = subprocess.run(["bash", SBATCH], capture_output=True, text=True)
  assert done.returncode == 1 and "name a config" in done.stderr


def test_kubernetes_job_is_one_that_jax_detects():
  objects = kubernetes()
  job, service = objects["Job"], objects["Service"]
  spec = job["spec"]
  pod = spec["template"]["spec"]
  assert spec["completionMode"] == "Indexed"
  assert spec["completions"] == spec["parallelism"] > 1
  assert job["metadata"]["labels"]  # JAX looks into them.
  assert (
    service["spec"]["clusterIP"] == "None" or not service["spec"]["clusterIP"]
  )
  assert service["spec"]["publishNotReadyAddresses"]
  assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
  assert pod["subdomain"] == service["metadata"]["name"]
  # What jax's cluster detection calls, and no more.
  allowed = {
    (group, resource, verb)
    for rule in objects["Role"]["rules"]
    for group in rule["apiGroups"]
    for resource in rule["resources"]
    for verb in rule["verbs"]
  }
  assert allowed == {("", "pods", "list"), ("batch", "jobs", "get")}
  binding = objects["RoleBinding"]
  account = objects["ServiceAccount"]["metadata"]["name"]
  assert binding["roleRef"]["name"] == objects["Role"]["metadata"]["name"]
  assert [x["name"] for x in binding["subjects"]] == [account]
  assert pod["serviceAccountName"] == account


def test_kubernetes_job_keeps_its_run():
  objects = kubernetes()
  spec = objects["Job"]["spec"]
  pod = spec["template"]["spec"]
  (container,) = pod["containers"]
  assert pod["terminationGracePeriodSeconds"] == 120
  assert pod["restartPolicy"] == "Never"  # As a failure policy demands.
  (rule,) = spec["podFailurePolicy"]["rules"]
  assert rule["action"] == "Ignore"
  assert rule["onPodConditions"] == [{"type": "DisruptionTarget"}]
  assert container["resources"]["limits"]["nvidia.com/gpu"] >= 1
  claim = objects["PersistentVolumeClaim"]
  assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
  volumes = {v["name"]: v for v in pod["volumes"]}
  mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
  claimed = volumes["runs"]["persistentVolumeClaim"]["claimName"]
  assert claimed == claim["metadata"]["name"]
  environ = {x["name"]: x["value"] for x in container["env"]}
  assert environ["WORKDIR"].startswith(f"{mounts['runs']}/")
  assert (small.ROOT / environ["CONFIG"]).exists()


@pytest.mark.parametrize(
  ("saved", "status", "expected"), [("30", 0, 0), ("20", 0, 1), ("20", 4, 4)]
)
def test_kubernetes_pod_succeeds_after_the_last_step(
  tmp_path, saved, status, expected
):
  process = start_pod(tmp_path, SAVED=saved, STATUS=str(status))
  process.communicate()
  assert process.returncode == expected
  assert (tmp_path / "bin" / "python.args").read_text().strip() == (
    f"-m zorn_jax.cli.train --config=c.py --workdir={tmp_path / 'run'} "
    "--config.seed=1"
  )


def test_kubernetes_pod_passes_sigterm_on(tmp_path):
  process = start_pod(tmp_path, SAVED="20", PAUSE="yes")
  wait_for((tmp_path / "bin" / "python.ready").exists)
  begun = time.monotonic()
  process.terminate()
  process.communicate()
  assert process.returncode == 1 and time.monotonic() - begun < 5
  assert (tmp_path / "bin" / "python.saved").exists()
