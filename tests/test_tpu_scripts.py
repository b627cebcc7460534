"""The TPU scripts against a gcloud that replays states and runs the workers' commands here (tests/fake_gcloud.py)."""

import itertools
import json
import os
import pathlib
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time

import pytest
from cases import first

from ckl_jax.preflight.verdict import EXIT_CODE as DOES_NOT_FIT
from ckl_jax.runtime import cli

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "tpu_scripts").glob("*.sh"))
UNTIL = 300.0  # Seconds after which a script that should be at some point counts as stuck.
FOREVER = 600  # Seconds; what takes so long is killed by ``cloud``.
PREFLIGHT = "ckl_jax/preflight/__main__.py"
TOLD = "told"  # The command goes on till `tell`.

# The venv's python of a worker: notes its arguments and ends as the plan says, by how often the life and worker ran it:
# with an exit code, after so many seconds, or when a file of that name is in CLOUD (and after ten minutes without).
PYTHON = (
    f"#!{sys.executable} -IS"
    + """
import json, os, pathlib, sys, time
cloud, worker = pathlib.Path(os.environ["CLOUD"]), os.environ["WORKER"]
life = pathlib.Path.home().parent.name
jobs = cloud / "jobs.jsonl"
before = [json.loads(line) for line in jobs.read_text().splitlines()] if jobs.exists() else []
job = {"life": life, "worker": worker, "argv": sys.argv[1:], "hosts": os.environ["CKL_HOSTS"]}
job["platforms"] = os.environ.get("JAX_PLATFORMS")
with jobs.open("a") as file:
    file.write(json.dumps(job) + "\\n")
started = sum(job["worker"] == worker for job in before)
ends = json.loads((cloud / "plan.json").read_text()).get("ends", {}).get(worker, [[0, 0]])
seconds, code = ends[min(max(started, int(life)), len(ends) - 1)]
print("output of worker", worker, flush=True)
end = time.monotonic() + (600 if isinstance(seconds, str) else seconds)
while time.monotonic() < end and not (isinstance(seconds, str) and (cloud / seconds).exists()):
    time.sleep(0.01)
sys.exit(code)
"""
)
UV = """#!/bin/sh
echo "$PWD $*" >>"$CLOUD/uv"
mkdir -p .venv/bin && cp "$CLOUD/python" .venv/bin/python && [ ! -e "$CLOUD/uv_fails" ]
"""


class Cloud:
    """A checkout with the scripts, a fake gcloud first on PATH, and what they did."""

    def __init__(self, path):
        self.path, self.checkout = path / "cloud", path / "a checkout"
        (path / "bin").mkdir()
        self.path.mkdir()
        gcloud = f"#!{sys.executable} -IS\n" + (ROOT / "tests" / "fake_gcloud.py").read_text()
        for name, text in {"uv": UV, "gcloud": gcloud}.items():
            (path / "bin" / name).write_text(text)
            (path / "bin" / name).chmod(0o755)
        (self.path / "python").write_text(PYTHON)
        (self.path / "python").chmod(0o755)
        shutil.copytree(ROOT / "tpu_scripts", self.checkout / "tpu_scripts")
        self.environment = {
            "PATH": f"{path / 'bin'}:{os.environ['PATH']}",
            "HOME": str(path),
            "CLOUD": str(self.path),
            "TMPDIR": str(path),
            "PROJECT": "p",
            "ZONE": "z",
            "TPU_NAME": "t-1",
            "ACCELERATOR_TYPE": "v5litepod-16",
            "OUT": "gs://bucket/run",
            "POLL_SECONDS": "0.05",
            "RETRY_SECONDS": "0.05",
            "MAX_DELETE_SECONDS": "1",
        }
        assert shutil.which("gcloud", path=self.environment["PATH"]) == str(path / "bin" / "gcloud")
        self.plan()

    def plan(self, lives=({},), **more):
        new = self.path / "plan.new"
        new.write_text(json.dumps({"lives": lives, **more}))
        new.replace(self.path / "plan.json")  # The fake reads it meanwhile.

    def start(self, script, *arguments, **environment):
        return subprocess.Popen(
            [self.checkout / "tpu_scripts" / script, *arguments],
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A test run in the background ignores interrupts and hang-ups; its scripts would too, and never end.
            preexec_fn=lambda: [
                signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
            ],
        )

    def run(self, script, *arguments, **environment):
        process = self.start(script, *arguments, **environment)
        process.out, process.err = process.communicate(timeout=UNTIL)
        return process

    def records(self, name):
        path = self.path / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def jobs(self):
        return self.records("jobs.jsonl")

    def calls(self):
        """The verbs of gcloud in turn, looking left out."""
        verbs = [call[3] for call in self.records("calls.jsonl") if call[0] != "storage"]
        return [verb for verb in verbs if verb not in ("describe", "ssh")]

    def asked(self, verb):
        """How often workers were asked if they are ``busy``, to ``install``, to ``start``, or for a ``status``."""
        calls = self.records("calls.jsonl")
        return sum(word.startswith(f"--command=bash remote.sh {verb}") for call in calls for word in call)

    def is_there(self):
        return any(json.loads((self.path / "state.json").read_text()).get(kind) for kind in ("there", "machine"))

    def wait_for(self, happened):
        end = time.monotonic() + UNTIL
        while not happened():
            assert time.monotonic() < end
            time.sleep(0.02)

    def tell(self):
        """Lets the commands end that go on till then."""
        (self.path / TOLD).touch()

    def add(self, file, python):
        """Gives the checkout a module that is a command, and a python: this shell script."""
        for name, text in ((file, "cli.run(main)\n"), (".venv/bin/python", f"#!/bin/sh\n{python}\n")):
            path = self.checkout / name
            path.parent.mkdir(parents=True)
            path.write_text(text)
        path.chmod(0o755)

    def machine(self, **plan):
        """Has made and set up a machine."""
        self.plan(**plan)
        assert self.run("create.sh").returncode == 0
        assert self.run("setup.sh").returncode == 0


@pytest.fixture
def cloud(tmp_path):
    made = Cloud(tmp_path)
    subprocess.run(["git", "init", "-q"], cwd=made.checkout, check=True)
    yield made
    for group in made.path.glob("*/*/ckl_runs/*/group"):
        try:
            os.killpg(int(group.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            continue


@pytest.mark.skipif(
    shutil.which("shellcheck", path=pathlib.Path(sys.executable).parent) is None, reason="no shellcheck"
)
def test_shellcheck_has_nothing_to_say():
    command = [pathlib.Path(sys.executable).parent / "shellcheck", "--external-sources", "--source-path=SCRIPTDIR"]
    found = subprocess.run([*command, *SCRIPTS], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_begins_with_its_interpreter_and_stops_at_the_first_error(script):
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n" if os.access(script, os.X_OK) else "# shellcheck shell=bash\n")
    assert "\nset -euo pipefail\n" in text
    assert "tee" not in re.findall(r"\w+", re.sub("#.*", "", text))


@pytest.mark.parametrize("script", ["create.sh", "setup.sh", "run.sh", "supervise.sh", "logs.sh", "delete.sh"])
def test_help_says_the_exit_codes_and_an_unknown_option_is_refused(cloud, script):
    assert "Exit codes:" in cloud.run(script, "--help").out
    refused = cloud.run(script, "--what")
    assert refused.returncode == 2
    assert "--what" in refused.err
    assert not cloud.records("calls.jsonl")


def test_all_settings_that_are_missing_or_wrong_are_listed_at_once(cloud):
    del cloud.environment["PROJECT"]
    wrong = {"ZONE": "", "TPU_NAME": "Upper Case", "OUT": "/tmp/x", "ACCELERATOR_TYPE": "h100", "SPOT": "yes"}
    for script, arguments in (("env.sh", ()), ("supervise.sh", ("m",))):
        done = cloud.run(script, *arguments, **wrong, POLL_SECONDS="soon", MAX_RETRIES="-1")
        assert done.returncode == 2
        named = [line.split(":")[1].strip() for line in done.err.splitlines()]
        assert named == [
            *("PROJECT", "ZONE", "TPU_NAME", "OUT", "RUNTIME_VERSION"),
            *("SPOT", "POLL_SECONDS", "MAX_RETRIES"),
        ]
    assert not cloud.records("calls.jsonl")


def test_settings_that_are_not_given_are_what_the_script_and_the_page_say(cloud):
    for name in ("POLL_SECONDS", "RETRY_SECONDS", "MAX_DELETE_SECONDS"):
        del cloud.environment[name]
    used = dict(line.split("=", 1) for line in cloud.run("env.sh").out.splitlines())
    comment = (ROOT / "tpu_scripts" / "env.sh").read_text().partition("\nset -euo")[0]
    said = re.findall(r"^#   ([A-Z_]+) [^(]*\((\d+)", comment, re.MULTILINE)
    assert dict(said) == {name: used[name] for name in used if name.endswith("_SECONDS") or name.startswith("MAX_")}
    on_page = re.findall(r"`([A-Z_]+)` \((\d+)\)", (ROOT / "tpu_scripts" / "README.md").read_text())
    assert len(on_page) >= 5
    assert {*on_page} <= {*said}
    assert used["SPOT"] == "1"


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-8", "v2-alpha-tpuv6e"),
    ],
)
def test_the_runtime_version_follows_from_the_type_unless_it_is_given(cloud, kind, version):
    assert f"RUNTIME_VERSION={version}\n" in cloud.run("env.sh", ACCELERATOR_TYPE=kind).out
    assert "RUNTIME_VERSION=mine\n" in cloud.run("env.sh", ACCELERATOR_TYPE=kind, RUNTIME_VERSION="mine").out


def test_a_dry_run_prints_every_command_and_calls_none(cloud):
    done = cloud.run("supervise.sh", "--dry-run", "a.module", "--name", "two words")
    queued = "gcloud compute tpus queued-resources {} t-1 --project=p --zone=z --quiet"
    describe = [
        queued.format("describe") + " '--format=value(state.state)'",
        queued.format("describe").replace("queued-resources", "tpu-vm") + " '--format=value(state)'",
    ]
    ssh = (
        "gcloud compute tpus tpu-vm ssh ckl@t-1 --project=p --zone=z --quiet --worker=all "
        "--ssh-flag=-oBatchMode=yes --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oConnectTimeout=30 "
        "'--command=bash remote.sh {}'"
    )
    scripts, temporary = cloud.checkout / "tpu_scripts", cloud.environment["TMPDIR"]
    printed = re.sub(r"run-\d+", "run-N", re.sub(r"run-\d+ \d+-\d+", "run-N NOW", done.out))
    assert printed.splitlines() == [
        *describe,
        *describe,
        queued.format("create")
        + " --node-id=t-1 --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot",
        *describe,
        f"gcloud compute tpus tpu-vm scp {temporary}/ckl_jax.tar.gz '{scripts}/remote.sh' ckl@t-1: --project=p "
        "--zone=z --quiet --worker=all --scp-flag=-oBatchMode=yes",
        ssh.format("busy"),
        ssh.format("install"),
        describe[1].replace("state", "networkEndpoints.len()"),
        ssh.format("status run-N"),
        ssh.format(r"start run-N NOW -u -m a.module --name '\''two words'\'' --out gs://bucket/run"),
        "sleep 0.05",
        ssh.format("status run-N"),
        *describe,
        queued.format("delete") + " --force",
        *describe,
    ]
    assert done.returncode == 0
    for script in ("create.sh", "setup.sh", "logs.sh", "delete.sh"):
        assert cloud.run(script, "--dry-run").out.startswith("gcloud ")
    assert "gcloud " in cloud.run("run.sh", "--dry-run", "a.module").out
    assert not cloud.records("calls.jsonl")


@pytest.mark.parametrize(("spot", "flags"), [("1", ["--spot"]), ("0", [])])
def test_create_waits_until_the_machine_is_there_and_calling_it_again_is_harmless(cloud, spot, flags):
    cloud.plan([{"states": ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]}])
    done = cloud.run("create.sh", SPOT=spot)
    assert done.returncode == 0
    created = next(call for call in cloud.records("calls.jsonl") if call[3] == "create")
    assert created[-3 - len(flags) :] == [
        *("--node-id=t-1", "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", *flags),
    ]
    assert cloud.run("create.sh", SPOT=spot).returncode == 0
    assert cloud.calls() == ["create"]


def test_an_active_request_is_a_machine_where_gcloud_does_not_say_how_that_one_is(cloud):
    cloud.run("create.sh")
    cloud.plan(says={"tpu-vm describe": "ERROR: (gcloud) UNAVAILABLE: 503"})
    done = cloud.run("create.sh")
    assert done.returncode == 0, done.err


def test_create_deletes_a_request_that_failed_unless_it_is_to_be_kept(cloud):
    cloud.plan([{"states": ["PROVISIONING", "FAILED"]}] * 2)
    assert cloud.run("create.sh").returncode == 3
    assert not cloud.is_there()
    assert cloud.run("create.sh", "--keep").returncode == 3
    assert cloud.is_there()
    assert cloud.run("create.sh").returncode == 3
    assert cloud.calls() == ["create", "delete", "create"]


def test_create_gives_up_waiting_and_deletes_its_request(cloud):
    cloud.plan([{"states": ["WAITING_FOR_RESOURCES"]}])
    assert cloud.run("create.sh", MAX_WAIT_SECONDS="1").returncode == 5
    assert not cloud.is_there()


def test_supervise_waits_in_the_queue_once(cloud):
    cloud.plan([{"states": ["WAITING_FOR_RESOURCES"]}] * 2)
    done = cloud.run("supervise.sh", "a.module", MAX_WAIT_SECONDS="1")
    assert done.returncode == 5
    assert "no machine within MAX_WAIT_SECONDS=1 (WAITING_FOR_RESOURCES)" in done.err
    assert cloud.calls() == ["create", "delete"]


def test_ctrl_c_in_create_deletes_its_request_even_while_gcloud_is_making_it(cloud):
    cloud.plan([{"states": ["WAITING_FOR_RESOURCES"]}], slow_create=0.5)
    process = cloud.start("create.sh")
    cloud.wait_for(lambda: "create" in cloud.calls())
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=UNTIL)
    assert process.returncode == 130
    assert cloud.calls() == ["create", "delete"]
    assert not cloud.is_there()


def test_delete_is_harmless_twice_and_says_when_it_does_not_work(cloud):
    cloud.plan([{}, {}])
    cloud.run("create.sh")
    assert [cloud.run("delete.sh").returncode for _ in range(2)] == [0, 0]
    assert cloud.calls() == ["create", "delete"]
    cloud.run("create.sh")
    cloud.plan([{}, {}], undeletable=True)
    stuck = cloud.run("delete.sh")
    assert stuck.returncode == 7
    assert "STILL THERE" in stuck.err


def test_delete_waits_for_a_deletion_that_goes_on(cloud):
    cloud.plan([{"takes": 8}])
    cloud.run("create.sh")
    assert cloud.run("delete.sh", MAX_DELETE_SECONDS="600").returncode == 0
    assert not cloud.is_there()


def test_setup_copies_what_git_does_not_ignore_and_drops_what_is_gone(cloud):
    (cloud.checkout / ".gitignore").write_text("runs/\n")
    (cloud.checkout / "runs").mkdir()
    for name in ("runs/big", "with space", "dropped"):
        (cloud.checkout / name).write_text(name)
    subprocess.run(["git", "add", "."], cwd=cloud.checkout, check=True)
    (cloud.checkout / "new\nline").write_text("untracked")
    for name in ("an env", "own/env"):
        (cloud.checkout / name / "lib").mkdir(parents=True)
        (cloud.checkout / name / "lib" / "libtpu.so").touch()
        (cloud.checkout / name / "pyvenv.cfg").touch()
    (cloud.checkout / "own" / "file").touch()
    cloud.machine(workers=2)
    (cloud.checkout / "dropped").unlink()
    assert cloud.run("setup.sh").returncode == 0
    for worker in "01":
        there = {path.name for path in (cloud.path / "0" / worker / "ckl_jax").iterdir()}
        assert there == {".gitignore", "tpu_scripts", "with space", "new\nline", ".venv", "own"}
        own = cloud.path / "0" / worker / "ckl_jax" / "own"
        assert [path.name for path in own.iterdir()] == ["file"]
        result = cloud.path / "0" / worker / "ckl_jax" / "runs" / "x" / "results.json"
        result.parent.mkdir(parents=True)
        result.touch()
    for name in ("with space", "new\nline", "own/file"):
        (cloud.checkout / name).unlink()
    (cloud.checkout / "tpu_scripts" / "later").touch()
    assert cloud.run("setup.sh").returncode == 0
    for worker in "01":
        checkout = cloud.path / "0" / worker / "ckl_jax"
        assert {path.name for path in checkout.iterdir()} == {".gitignore", "tpu_scripts", ".venv", "runs", "own"}
        assert not list((checkout / "own").iterdir())
        assert (checkout / "tpu_scripts" / "later").exists()
        assert (checkout / "runs" / "x" / "results.json").exists()
    installed = (cloud.path / "uv").read_text().splitlines()
    assert len(installed) == 6
    assert all(line.endswith("/ckl_jax sync --quiet --frozen --extra tpu --python 3.12") for line in installed)


def test_setup_tells_an_installer_that_fails_from_workers_that_cannot_be_reached(cloud):
    cloud.plan([{}, {"unreachable": True}])
    cloud.run("create.sh")
    (cloud.path / "uv_fails").touch()
    assert cloud.run("setup.sh").returncode == 6
    cloud.run("delete.sh")
    cloud.run("create.sh")
    assert cloud.run("setup.sh").returncode == 255


def test_a_machine_in_maintenance_is_out_of_reach_and_no_failed_setup(cloud):
    cloud.run("create.sh")
    says = "ERROR: (gcloud) This TPU is going through a maintenance event, and is currently unavailable."
    cloud.plan(says={"tpu-vm scp": says})
    assert cloud.run("setup.sh").returncode == 255


def test_setup_leaves_all_workers_while_a_command_runs_on_one(cloud):
    (cloud.checkout / "code.py").write_text("old")
    cloud.machine(workers=2, ends={"0": [[0, 1]], "1": [[TOLD, 0]]})
    assert cloud.run("run.sh", "--no-wait", "a.module").returncode == 0
    cloud.wait_for(lambda: len(cloud.jobs()) == 2 and list(cloud.path.glob("0/0/ckl_runs/*/exit_code")))
    (cloud.checkout / "code.py").write_text("new")
    done = cloud.run("setup.sh")
    assert (done.returncode, "left as they are" in done.err, "installed on" in done.err) == (0, True, False)
    assert [(cloud.path / "0" / worker / "ckl_jax" / "code.py").read_text() for worker in "01"] == ["old"] * 2


HARD = [
    "two words",
    "it's",
    '"$HOME" `id` $(id)',
    "a\nb\n",
    "",
    "*",
    "\\",
    "a;b&c|d>e",
    "--flag=é ü",
    "%s",
    "!x",
    "~",
    " ",
]


def test_arguments_arrive_as_they_are_given(cloud):
    cloud.machine(workers=2)
    done = cloud.run("run.sh", "a.module", *HARD)
    assert done.returncode == 0, done.err
    wanted = ["-u", "-m", "a.module", *HARD, "--out", "gs://bucket/run"]
    assert [job["argv"] for job in cloud.jobs()] == [wanted, wanted]
    assert [job["hosts"] for job in cloud.jobs()] == ["auto", "auto"]


@pytest.mark.parametrize(("given", "seen"), [({}, "tpu,cpu"), ({"JAX_PLATFORMS": "cpu"}, "cpu")])
def test_a_command_computes_on_the_tpu_or_not_at_all_unless_the_worker_says_otherwise(cloud, given, seen):
    cloud.machine()
    assert cloud.run("run.sh", "a.module", **given).returncode == 0
    assert [job["platforms"] for job in cloud.jobs()] == [seen]


def test_out_is_given_once_and_only_where_it_is_set(cloud):
    cloud.machine()
    del cloud.environment["OUT"]
    assert cloud.run("run.sh", "a.module", "--out", "x").returncode == 0
    assert cloud.jobs()[0]["argv"] == ["-u", "-m", "a.module", "--out", "x"]
    for words in (["--out", "x"], ["--out=x"], []):
        assert cloud.run("run.sh", *["a.module"] * bool(words), *words, OUT="gs://b/c").returncode == 2
    assert len(cloud.jobs()) == 1


def test_the_same_command_is_the_same_run(cloud):
    cloud.machine(ends={"0": [[TOLD, 0]]})
    assert cloud.run("run.sh", "--no-wait", "a.module").returncode == 0
    attached = cloud.start("run.sh", "a.module")
    cloud.wait_for(lambda: cloud.asked("status") > 1)
    cloud.tell()
    attached.communicate(timeout=UNTIL)
    assert attached.returncode == 0
    assert cloud.run("run.sh", "a.module").returncode == 0
    assert len(cloud.jobs()) == 1
    assert cloud.run("run.sh", "another.module").returncode == 0
    assert len(cloud.jobs()) == 2


def test_a_command_is_not_started_beside_another(cloud):
    cloud.machine(workers=2, ends={"0": [[0, 0]], "1": [[TOLD, 0], [0, 0]]})
    assert cloud.run("run.sh", "--no-wait", "a.module").returncode == 0
    cloud.wait_for(lambda: len(cloud.jobs()) == 2)
    refused = cloud.run("run.sh", "another.module")
    assert (refused.returncode, len(cloud.jobs())) == (69, 2)
    assert re.search(r"run-\d+, with other arguments, goes on", refused.err)
    cloud.tell()
    assert cloud.run("run.sh", "a.module").returncode == 0
    assert cloud.run("run.sh", "another.module").returncode == 0
    assert len(cloud.jobs()) == 4


def test_the_code_is_that_of_the_command_and_a_failed_one_is_started_again(cloud):
    cloud.machine(ends={"0": [[0, 3], [0, 0]]})
    failed = cloud.run("run.sh", "a.module")
    assert failed.returncode == 3
    assert "output of worker 0" in failed.err
    assert cloud.run("run.sh", "a.module").returncode == 0
    assert len(cloud.jobs()) == 2


# A sleep that lets run.sh look at its workers only after both have ended.
BOTH_ENDED = """#!/bin/sh
for worker in 0 1; do
  until [ -e "$CLOUD/0/$worker"/ckl_runs/*/exit_code ]; do /bin/sleep 0.02; done
done
"""


def test_a_worker_that_fails_ends_the_others_and_its_code_goes_before_their_abortion(cloud):
    cloud.machine(workers=3, ends={"0": [[0, 134]], "1": [[0, 7]], "2": [[FOREVER, 0]]})
    sleep = pathlib.Path(cloud.environment["PATH"].split(":")[0], "sleep")
    sleep.write_text(BOTH_ENDED)
    sleep.chmod(0o755)
    assert cloud.run("run.sh", "a.module").returncode == 7
    (code,) = (cloud.path / "0" / "2").glob("ckl_runs/*/exit_code")
    assert code.read_text() == "143\n"


@pytest.mark.parametrize(
    ("ends", "starts"),
    [
        ({"0": [[0, 1], [0, 0]], "1": [[0, 0]]}, 2),  # Process 0 writes the results, alone, and failed there.
        ({"0": [[0, 0]], "1": [[0, 0]]}, 1),
    ],
)
def test_workers_that_fail_or_not_are_started_again_together_or_not_at_all(cloud, ends, starts):
    cloud.machine(workers=2, ends=ends)
    assert [cloud.run("run.sh", "a.module").returncode for _ in range(2)] == [ends["0"][0][1], 0]
    assert sorted(job["worker"] for job in cloud.jobs()) == ["0"] * starts + ["1"] * starts


def test_a_worker_that_goes_on_without_one_that_failed_is_started_again_with_it(cloud):
    cloud.machine(workers=2, ends={"0": [[0, 1], [0, 0]], "1": [[FOREVER, 0], [0, 0]]})
    assert cloud.run("run.sh", "--no-wait", "a.module").returncode == 0
    cloud.wait_for(lambda: len(cloud.jobs()) == 2 and list((cloud.path / "0" / "0").glob("ckl_runs/*/exit_code")))
    assert cloud.run("run.sh", "a.module").returncode == 0
    assert sorted(job["worker"] for job in cloud.jobs()) == ["0", "0", "1", "1"]


def on_worker(cloud, *words):
    """What remote.sh of the first worker prints."""
    home = cloud.path / "0" / "0"
    environment = {**cloud.environment, "HOME": str(home), "WORKER": "0"}
    command = ["bash", "remote.sh", *words]
    return subprocess.run(command, cwd=home, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def test_ssh_that_repeats_a_command_does_not_start_it_twice(cloud):
    cloud.machine(ends={"0": [[0, 5]]})
    run = cloud.path / "0" / "0" / "ckl_runs" / "r"
    for attempt in ("first", "first", "second"):
        on_worker(cloud, "start", "r", attempt, "x")
        cloud.wait_for((run / "exit_code").exists)
        subprocess.run(["flock", run / "running", "true"], check=True)
    assert len(cloud.jobs()) == 2


def test_a_look_at_the_lock_does_not_keep_a_command_from_starting(cloud):
    cloud.machine(ends={"0": [[0, 0]]})
    run = cloud.path / "0" / "0" / "ckl_runs" / "r"
    run.mkdir(parents=True)
    with subprocess.Popen(["flock", run / "running", "sh", "-c", "echo; sleep 0.5"], stdout=subprocess.PIPE) as look:
        look.stdout.readline()
        on_worker(cloud, "start", "r", "first", "x")
    cloud.wait_for((run / "exit_code").exists)
    assert len(cloud.jobs()) == 1


def test_a_command_that_ended_without_a_word_is_told_from_one_that_runs(cloud):
    cloud.machine(ends={"0": [[FOREVER, 0]]})
    process = cloud.start("run.sh", "a.module")
    cloud.wait_for(lambda: cloud.jobs())
    (group,) = (cloud.path / "0" / "0").glob("ckl_runs/*/group")
    assert process.poll() is None
    os.killpg(int(group.read_text()), signal.SIGKILL)
    process.communicate(timeout=UNTIL)
    assert process.returncode == 137


def test_a_command_that_was_killed_is_not_taken_for_the_one_that_finished_before_it(cloud):
    cloud.machine(ends={"0": [[0, 0], [FOREVER, 0]]})
    run = cloud.path / "0" / "0" / "ckl_runs" / "r"
    on_worker(cloud, "start", "r", "first", "x")
    cloud.wait_for(lambda: on_worker(cloud, "status", "r") == "ckl-status exit 0\n")
    on_worker(cloud, "start", "r", "second", "x")
    cloud.wait_for(lambda: len(cloud.jobs()) == 2)
    os.killpg(int((run / "group").read_text()), signal.SIGKILL)
    cloud.wait_for(lambda: on_worker(cloud, "status", "r") != "ckl-status running\n")
    assert on_worker(cloud, "status", "r") == "ckl-status gone\n"


def test_stop_kills_a_command_that_does_not_heed_sigterm(cloud):
    """After 30 s, which this flock makes short."""
    deaf = PYTHON.replace("\nimport json", "\nimport signal; signal.signal(15, signal.SIG_IGN)\nimport json")
    (cloud.path / "python").write_text(deaf)
    cloud.machine(ends={"0": [[FOREVER, 0]]})
    flock, impatient = shutil.which("flock"), cloud.path.parent / "bin" / "flock"
    impatient.write_text(f'#!/bin/sh\n[ "$1 $2" = "-w 30" ] && shift 2 && set -- -w 0.2 "$@"\nexec {flock} "$@"\n')
    impatient.chmod(0o755)
    on_worker(cloud, "start", "r", "first", "x")
    cloud.wait_for(lambda: cloud.jobs())
    on_worker(cloud, "stop", "r")
    subprocess.run([flock, "-w", "10", cloud.path / "0" / "0" / "ckl_runs" / "r" / "running", "true"], check=True)
    assert on_worker(cloud, "status", "r") == "ckl-status gone\n"


def test_ctrl_c_in_run_leaves_the_command_running_and_says_so(cloud):
    cloud.machine(ends={"0": [[TOLD, 0]]})
    process = cloud.start("run.sh", "a.module")
    cloud.wait_for(lambda: cloud.jobs())
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=UNTIL)
    assert process.returncode == 130
    assert "goes on" in err
    cloud.tell()
    assert cloud.run("run.sh", "a.module").returncode == 0
    assert len(cloud.jobs()) == 1


def test_an_answer_without_a_word_is_not_taken_for_a_finished_command(cloud):
    cloud.machine()
    (cloud.path / "0" / "0" / "remote.sh").write_text("")
    done = cloud.run("run.sh", "a.module")
    assert (done.returncode, "is finished" in done.err) == (255, False)


def test_a_host_that_crashed_while_it_noted_the_code_is_not_taken_for_finished(cloud):
    cloud.machine(ends={"0": [[0, 1], [0, 5]]})
    assert cloud.run("run.sh", "a.module").returncode == 1
    (file,) = (cloud.path / "0" / "0").glob("ckl_runs/*/exit_code")
    file.write_text("")
    assert cloud.run("run.sh", "a.module").returncode == 5


def test_a_worker_that_says_nothing_is_not_taken_for_finished(cloud):
    cloud.machine(workers=2, ends={"0": [[TOLD, 0]], "1": [[0, 0]]})
    assert cloud.run("run.sh", "--no-wait", "a.module").returncode == 0
    cloud.wait_for(lambda: list((cloud.path / "0" / "1").glob("ckl_runs/*/exit_code")))
    (cloud.path / "0" / "0" / "remote.sh").write_text("")
    done = cloud.run("run.sh", "a.module")
    assert (done.returncode, "is finished" in done.err) == (255, False)


def test_a_banner_before_the_answer_does_not_hide_it(cloud):
    cloud.machine(ends={"0": [[TOLD, 5]]})
    remote = cloud.path / "0" / "0" / "remote.sh"
    remote.write_text("printf 'Welcome '\n" + remote.read_text())
    assert cloud.run("run.sh", "--no-wait", "a.module").returncode == 0
    process = cloud.start("run.sh", "a.module")
    looks = cloud.asked("status")
    cloud.wait_for(lambda: cloud.asked("status") > looks + 2 or process.poll() is not None)
    cloud.tell()
    process.communicate(timeout=UNTIL)
    assert process.returncode == 5


def test_run_before_setup_is_told_to_set_up(cloud):
    cloud.run("create.sh")
    done = cloud.run("run.sh", "a.module")
    assert done.returncode == 2
    assert "setup.sh" in done.err


def test_a_gcloud_that_is_missing_for_a_moment_is_no_word_about_the_workers(cloud):
    cloud.machine()
    cloud.plan(missing=["ssh"])
    done = cloud.run("run.sh", "a.module")
    assert (done.returncode, "setup.sh" in done.err) == (255, False)


def test_logs_shows_the_newest_run_of_a_worker(cloud):
    cloud.machine(workers=2)
    cloud.run("run.sh", "a.module")
    assert cloud.run("logs.sh", "--worker", "1", "--lines", "5").out == "output of worker 1\n"
    assert cloud.run("logs.sh", "--lines", "many").returncode == 2


def test_supervise_makes_runs_and_deletes(cloud):
    cloud.plan([{"states": ["WAITING_FOR_RESOURCES", "ACTIVE"]}], workers=2)
    done = cloud.run("supervise.sh", "a.module", "--name", "two words")
    assert done.returncode == 0, done.err
    assert cloud.calls() == ["create", "scp", "delete"]
    assert [job["argv"][2:5] for job in cloud.jobs()] == [["a.module", "--name", "two words"]] * 2
    assert not cloud.is_there()


def test_supervise_goes_on_after_a_preemption_with_the_same_directory(cloud):
    cloud.plan([{"preempted_at": 6}, {}], ends={"0": [[FOREVER, 0], [0, 0]]})
    done = cloud.run("supervise.sh", "a.module", MAX_FAILURES="1")
    assert done.returncode == 0, done.err
    assert cloud.calls() == ["create", "scp", "delete", "create", "scp", "delete"]
    assert [job["life"] for job in cloud.jobs()] == ["0", "1"]
    assert cloud.jobs()[0]["argv"] == cloud.jobs()[1]["argv"]
    assert "SUSPENDED" in done.err
    assert "failed with" not in done.err


def test_a_job_goes_on_with_the_files_that_it_began_with_and_ends_with_these_scripts(cloud):
    (cloud.checkout / "loss.py").write_text("as it began")
    cloud.plan([{"preempted_at": 6}, {}], ends={"0": [[FOREVER, 0], [0, 0]]})
    process = cloud.start("supervise.sh", "a.module", RETRY_SECONDS="1")
    cloud.wait_for(lambda: cloud.jobs())
    (cloud.checkout / "loss.py").write_text("half edited")
    shutil.rmtree(cloud.checkout / "tpu_scripts")
    _, err = process.communicate(timeout=UNTIL)
    assert process.returncode == 0, err
    assert [(cloud.path / life / "0" / "ckl_jax" / "loss.py").read_text() for life in "01"] == ["as it began"] * 2
    assert not cloud.is_there()
    assert not list(cloud.path.parent.glob(".cache/ckl_jax/*"))


@pytest.mark.parametrize("code", [0, 1])
def test_a_machine_is_deleted_where_what_the_job_keeps_is_deleted_first(cloud, code):
    cloud.plan(ends={"0": [[TOLD, code]]})
    process = cloud.start("supervise.sh", "a.module")
    cloud.wait_for(lambda: cloud.jobs())
    shutil.rmtree(cloud.path.parent / ".cache" / "ckl_jax")
    cloud.tell()
    _, err = process.communicate(timeout=UNTIL)
    assert process.returncode == (2 if code else 0), err
    assert ("was deleted meanwhile" in err) == bool(code)
    assert not cloud.is_there()


def test_supervise_tries_again_where_there_was_no_capacity(cloud):
    cloud.plan([{"states": ["FAILED"]}, {}])
    assert cloud.run("supervise.sh", "a.module").returncode == 0
    assert cloud.calls() == ["create", "delete", "create", "scp", "delete"]


def test_supervise_ends_where_the_first_request_is_refused(cloud):
    cloud.plan([{"refused": "PERMISSION_DENIED"}])
    done = cloud.run("supervise.sh", "a.module")
    assert done.returncode == 3
    assert "PERMISSION_DENIED" in done.err
    assert cloud.calls() == ["create"]


def test_supervise_keeps_nothing_where_nothing_was_made(cloud):
    cloud.plan([{"refused": "PERMISSION_DENIED"}])
    done = cloud.run("supervise.sh", "--keep", "a.module")
    assert done.returncode == 3
    assert "nothing to keep" in done.err
    assert "paid for" not in done.err


def test_supervise_tries_again_where_the_first_request_did_not_arrive(cloud):
    plan = {"says": {"queued-resources create": "ERROR: gcloud crashed (TransportError): Name or service not known"}}
    cloud.plan(**plan)
    process = cloud.start("supervise.sh", "a.module")
    cloud.wait_for(lambda: cloud.calls().count("create") > 1 or process.poll() is not None)
    cloud.plan()
    _, err = process.communicate(timeout=UNTIL)
    assert process.returncode == 0, err
    assert not cloud.is_there()


def test_supervise_bounds_its_retries(cloud):
    cloud.plan([{"preempted_at": 2}] * 4)
    assert cloud.run("supervise.sh", "a.module", MAX_RETRIES="2").returncode == 5
    assert cloud.calls().count("create") == 3
    assert not cloud.is_there()


def test_supervise_does_not_repeat_a_failing_command_beyond_its_bound(cloud):
    cloud.plan(ends={"0": [[0, 9]]})
    done = cloud.run("supervise.sh", "a.module", MAX_FAILURES="2")
    assert done.returncode == 4
    assert len(cloud.jobs()) == 2
    assert cloud.calls() == ["create", "scp", "scp", "delete"]


@pytest.mark.parametrize(("most", "code", "starts"), [("3", 0, 4), ("1", 5, 2)])
def test_failures_far_apart_do_not_end_supervise_until_they_are_as_many_as_retries(cloud, most, code, starts):
    cloud.plan(ends={"0": [[0, 1], [0, 1], [0, 1], [0, 0]]}, saves=True)
    done = cloud.run("supervise.sh", "a.module", MAX_FAILURES="2", MAX_RETRIES=most, STEADY_SECONDS="0")
    assert done.returncode == code, done.err
    assert len(cloud.jobs()) == starts


@pytest.mark.parametrize(("saves", "steady"), [(False, "0"), (True, "600")])
def test_a_failure_that_takes_long_to_show_is_the_second_one_where_nothing_was_saved(cloud, saves, steady):
    cloud.plan(ends={"0": [[0, 1]]}, saves=saves)
    assert cloud.run("supervise.sh", "a.module", STEADY_SECONDS=steady).returncode == 4
    assert len(cloud.jobs()) == 2
    assert not cloud.is_there()


@pytest.mark.parametrize("code", first([134, 137, 143]))
def test_a_command_that_aborts_for_ever_is_tried_on_a_second_machine_and_no_further(cloud, code):
    cloud.plan([{}] * 8, ends={"0": [[0, code]]})
    done = cloud.run("supervise.sh", "a.module", STEADY_SECONDS="0")
    assert done.returncode == 4, done.err
    assert len(cloud.jobs()) == 6
    assert cloud.calls() == ["create", *["scp"] * 3, "delete", "create", *["scp"] * 3, "delete"]
    assert not cloud.is_there()


def test_hosts_that_are_lost_far_apart_do_not_end_a_job_that_saves(cloud):
    cloud.plan(ends={"0": [*[[0, 134]] * 8, [0, 0]]}, saves=True)
    assert cloud.run("supervise.sh", "a.module", STEADY_SECONDS="0").returncode == 0
    assert len(cloud.jobs()) == 9
    assert cloud.calls().count("create") == 1


def test_outages_far_apart_do_not_cost_a_machine_that_computes(cloud):
    plan = {"lives": [{}, {}], "ends": {"0": [[TOLD, 0], [0, 0]]}}
    cloud.plan(**plan)
    process = cloud.start("supervise.sh", "a.module", STEADY_SECONDS="0")
    cloud.wait_for(lambda: cloud.jobs())
    for _ in range(3):
        cloud.plan(**plan, says={"tpu-vm ssh": "ERROR: ssh: connection timed out"})
        looks = cloud.asked("status")
        cloud.wait_for(lambda looks=looks: cloud.asked("status") > looks + 3 or process.poll() is not None)
        cloud.plan(**plan)
        looks = cloud.asked("status")
        cloud.wait_for(lambda looks=looks: cloud.asked("status") > looks + 2 or process.poll() is not None)
    cloud.tell()
    _, err = process.communicate(timeout=UNTIL)
    assert process.returncode == 0, err
    assert cloud.calls() == ["create", "scp", "delete"]
    assert len(cloud.jobs()) == 1


def test_supervise_outlives_a_network_that_is_down_for_long(cloud):
    plan = {"ends": {"0": [[TOLD, 0]]}}
    cloud.plan(**plan)
    process = cloud.start("supervise.sh", "a.module", MAX_RETRIES="0")
    cloud.wait_for(lambda: cloud.jobs())
    groups = ("queued-resources describe", "tpu-vm describe", "tpu-vm ssh", "queued-resources delete", "tpu-vm delete")
    cloud.plan(**plan, says=dict.fromkeys(groups, "ERROR: gcloud crashed (TransportError): Name or service not known"))
    looks = len(cloud.records("calls.jsonl"))
    cloud.wait_for(lambda: len(cloud.records("calls.jsonl")) > looks + 20 or process.poll() is not None)
    cloud.plan(**plan)
    cloud.tell()
    _, err = process.communicate(timeout=UNTIL)
    assert process.returncode == 0, err
    assert "looking again" in err
    assert cloud.calls() == ["create", "scp", "delete"]
    assert not cloud.is_there()


def test_supervise_keeps_its_place_in_the_queue_while_the_network_is_down(cloud):
    cloud.plan([{"states": ["WAITING_FOR_RESOURCES", *[""] * 12, "WAITING_FOR_RESOURCES", "ACTIVE"]}])
    done = cloud.run("supervise.sh", "a.module", MAX_RETRIES="0")
    assert done.returncode == 0, done.err
    assert cloud.calls() == ["create", "scp", "delete"]


@pytest.mark.parametrize(("ended", "settings", "code"), [(9, {}, 4), (137, {"MAX_RETRIES": "1"}, 5)])
def test_a_command_that_ends_is_counted_where_gcloud_is_silent_when_it_is_looked_at(cloud, ended, settings, code):
    cloud.plan([{"states": ["ACTIVE", "", *["ACTIVE"] * 3, "", "ACTIVE"]}], ends={"0": [[0, ended]] * 2 + [[0, 0]]})
    done = cloud.run("supervise.sh", "a.module", **settings)
    assert done.err.count("looking again") == 2
    assert (done.returncode, len(cloud.jobs())) == (code, 2), done.err
    assert not cloud.is_there()


def test_a_job_that_ends_while_its_status_is_looked_up_is_not_gone(tmp_path):
    run = tmp_path / "ckl_runs" / "run-1"
    run.mkdir(parents=True)
    (run / "running").touch()
    (tmp_path / "flock").write_text(f'#!/bin/sh\necho 9 >exit_code\nexec {shutil.which("flock")} "$@"\n')
    (tmp_path / "flock").chmod(0o755)
    environment = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = ["bash", ROOT / "tpu_scripts" / "remote.sh", "status", "run-1"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "ckl-status exit 9\n"


def test_supervise_does_not_repeat_bad_arguments(cloud):
    cloud.plan(ends={"0": [[0, 2]]})
    assert cloud.run("supervise.sh", "a.module", "--beta", "x").returncode == 2
    assert len(cloud.jobs()) == 1
    assert not cloud.is_there()


def test_arguments_that_were_good_once_are_not_bad_where_the_bucket_does_not_answer(cloud):
    cloud.plan([{"preempted_at": 6}, {}], ends={"0": [[FOREVER, 0], [0, 2], [0, 0]]})
    done = cloud.run("supervise.sh", "a.module")
    assert done.returncode == 0, done.err
    assert len(cloud.jobs()) == 3


def test_supervise_does_not_repeat_what_was_not_finite(cloud):
    cloud.plan(ends={"0": [[0, 3]]})
    done = cloud.run("supervise.sh", "a.module")
    assert done.returncode == 6
    assert "a loss or parameter was not finite" in done.err
    assert len(cloud.jobs()) == 1
    assert not cloud.is_there()


@pytest.mark.parametrize("code", first([137, 134, 143, 75]))
def test_supervise_takes_a_lost_host_for_an_interruption(cloud, code):
    cloud.plan(ends={"0": [[0, code], [0, code], [0, 0]]})
    assert cloud.run("supervise.sh", "a.module", MAX_FAILURES="1").returncode == 0
    assert len(cloud.jobs()) == 3
    assert cloud.calls() == ["create", "scp", "scp", "scp", "delete"]


def test_supervise_replaces_a_machine_that_stays_unreachable(cloud):
    cloud.plan([{"unreachable": True}, {}])
    assert cloud.run("supervise.sh", "a.module", MAX_FAILURES="1").returncode == 0
    assert cloud.calls() == ["create", "scp", "scp", "scp", "delete", "create", "scp", "delete"]


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("keep", [[], ["--keep"]], ids=["", "keep"])
def test_a_signal_deletes_what_supervise_made_unless_it_is_to_be_kept(cloud, sent, code, keep):
    cloud.plan(ends={"0": [[FOREVER, 0]]})
    cloud.environment["POLL_SECONDS"] = "60"  # A signal must not wait for the next look.
    process = cloud.start("supervise.sh", *keep, "a.module")
    cloud.wait_for(lambda: cloud.jobs())
    os.killpg(process.pid, sent)
    _, err = process.communicate(timeout=UNTIL)
    assert process.returncode == code
    assert cloud.is_there() == bool(keep)
    assert ("kept (ACTIVE), and paid for" if keep else "deleting t-1") in err


def test_a_signal_while_the_machine_is_being_requested_leaves_none(cloud):
    cloud.plan([{"states": ["WAITING_FOR_RESOURCES"]}], slow_create=0.5)
    process = cloud.start("supervise.sh", "a.module")
    cloud.wait_for(lambda: "create" in cloud.calls())
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=UNTIL)
    assert process.returncode == 130
    assert cloud.calls() == ["create", "delete"]
    assert not cloud.is_there()


def test_supervise_says_so_when_the_machine_cannot_be_deleted(cloud):
    cloud.plan(undeletable=True)
    done = cloud.run("supervise.sh", "a.module")
    assert done.returncode == 7
    assert "STILL THERE" in done.err


@pytest.mark.parametrize("life", [{}, {"preempted_at": 6}], ids=["at the end", "in between"])
def test_supervise_outlives_deletes_that_fail_for_a_while(cloud, life):
    plan = {"lives": [life, {}], "ends": {"0": [[FOREVER if life else 0, 0], [0, 0]]}}
    cloud.plan(**plan, undeletable=True)
    process = cloud.start("supervise.sh", "a.module", MAX_DELETE_SECONDS=str(FOREVER))
    cloud.wait_for(lambda: cloud.calls().count("delete") > 10 or process.poll() is not None)
    cloud.plan(**plan)
    _, err = process.communicate(timeout=UNTIL)
    assert process.returncode == 0, err
    assert not cloud.is_there()


def test_supervise_leaves_a_machine_alone_that_it_was_not_given(cloud):
    cloud.machine()
    refused = cloud.run("supervise.sh", "a.module")
    assert refused.returncode == 2
    assert "--adopt" in refused.err
    assert cloud.is_there()
    assert cloud.run("supervise.sh", "--adopt", "a.module").returncode == 0
    assert not cloud.is_there()
    assert len(cloud.jobs()) == 1


def test_supervise_started_again_attaches_to_the_command_that_goes_on(cloud):
    cloud.plan(ends={"0": [[TOLD, 0]]})
    process = cloud.start("supervise.sh", "a.module")
    cloud.wait_for(lambda: cloud.jobs())
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(UNTIL)  # Its run.sh holds its streams and looks on.
    again = cloud.start("supervise.sh", "--adopt", "a.module")
    cloud.wait_for(lambda: cloud.asked("busy") == 2)
    looks = cloud.asked("status")
    cloud.wait_for(lambda: cloud.asked("status") > looks + 2)
    cloud.tell()
    _, err = again.communicate(timeout=UNTIL)
    assert again.returncode == 0, err
    assert (len(cloud.jobs()), cloud.asked("start")) == (1, 1)


def test_a_command_that_fails_is_started_again_with_the_files_of_who_adopted_it(cloud):
    (cloud.checkout / "code.py").write_text("wrong")
    cloud.machine(ends={"0": [[TOLD, 1], [0, 0]]})
    assert cloud.run("run.sh", "--no-wait", "a.module").returncode == 0
    cloud.wait_for(lambda: cloud.jobs())
    (cloud.checkout / "code.py").write_text("corrected")
    process = cloud.start("supervise.sh", "--adopt", "a.module")
    looks = cloud.asked("status")
    cloud.wait_for(lambda: cloud.asked("status") > looks + 1 or process.poll() is not None)
    cloud.tell()
    _, err = process.communicate(timeout=UNTIL)
    assert process.returncode == 0, err
    assert (cloud.path / "0" / "0" / "ckl_jax" / "code.py").read_text() == "corrected"
    assert len(cloud.jobs()) == 2


def test_a_command_is_found_by_somebody_with_another_login_name(cloud):
    cloud.environment["USER"] = "anna"
    cloud.machine(ends={"0": [[TOLD, 0]]})
    assert cloud.run("run.sh", "--no-wait", "a.module").returncode == 0
    cloud.wait_for(lambda: cloud.jobs())
    process = cloud.start("supervise.sh", "--adopt", "a.module", USER="bert")
    looks = cloud.asked("status")
    cloud.wait_for(lambda: cloud.asked("status") > looks + 1 or process.poll() is not None)
    cloud.tell()
    _, err = process.communicate(timeout=UNTIL)
    assert process.returncode == 0, err
    assert len(cloud.jobs()) == 1


def test_supervise_with_other_arguments_leaves_a_machine_to_the_command_that_goes_on_there(cloud):
    cloud.machine(ends={"0": [[TOLD, 0], [0, 2]]})
    assert cloud.run("run.sh", "--no-wait", "a.module", "--seeds", "10").returncode == 0
    cloud.wait_for(lambda: cloud.jobs())
    done = cloud.run("supervise.sh", "--adopt", "a.module")
    assert (done.returncode, len(cloud.jobs())) == (2, 1)
    assert "left to the command" in done.err
    assert cloud.is_there()
    cloud.tell()
    assert cloud.run("run.sh", "a.module", "--seeds", "10").returncode == 0


READERS = {"died": "2>&1 | head -1 >/dev/null", "full": ">/dev/full 2>/dev/full", "closed": "<&- >&- 2>&-"}


def shell(cloud, script, streams, *arguments):
    """The script with its streams so redirected, in a group of its own; its exit code is in the file ``code``."""
    outlive = "trap : HUP INT QUIT TERM"
    words = " ".join([f"tpu_scripts/{script}", *arguments])
    return subprocess.Popen(
        ["bash", "-c", f"{outlive}; {{ {outlive}; {words}; echo $? >'{cloud.path}/code'; }} {streams}"],
        cwd=cloud.checkout,
        env=cloud.environment,
        start_new_session=True,
        preexec_fn=lambda: [
            signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
        ],
    )


def interrupt(cloud, process, number):
    for _ in range(3):  # The second and third come while it cleans up.
        os.killpg(process.pid, number)
        time.sleep(0.05)
    process.wait(UNTIL)
    return ended_with(cloud)


def ended_with(cloud):
    """What `shell` has written when its script has ended."""
    file = cloud.path / "code"
    cloud.wait_for(lambda: file.exists() and file.read_text())
    return int(file.read_text())


SIGNALS = {signal.SIGHUP: 129, signal.SIGINT: 130, signal.SIGQUIT: 131, signal.SIGTERM: 143}


@pytest.mark.parametrize("number", first(SIGNALS), ids=lambda number: number.name)
@pytest.mark.parametrize("streams", READERS)
def test_no_reader_and_no_further_signal_keeps_supervise_from_deleting(cloud, streams, number):
    cloud.plan(ends={"0": [[FOREVER, 0]]})
    process = shell(cloud, "supervise.sh", READERS[streams], "a.module")
    cloud.wait_for(lambda: cloud.jobs())
    assert interrupt(cloud, process, number) == SIGNALS[number]
    assert cloud.calls() == ["create", "scp", "delete"]
    assert not cloud.is_there()


@pytest.mark.parametrize("streams", READERS)
def test_no_reader_keeps_create_from_deleting_its_request(cloud, streams):
    cloud.plan([{"states": ["WAITING_FOR_RESOURCES"]}])
    process = shell(cloud, "create.sh", READERS[streams])
    cloud.wait_for(lambda: "create" in cloud.calls())
    assert interrupt(cloud, process, signal.SIGINT) == 130
    assert not cloud.is_there()


@pytest.mark.parametrize("streams", READERS)
def test_without_a_reader_a_run_goes_on_to_its_end(cloud, streams):
    cloud.plan(ends={"0": [[0, 0]]})
    shell(cloud, "supervise.sh", READERS[streams], "a.module").wait(UNTIL)
    assert ended_with(cloud) == 0
    assert cloud.calls() == ["create", "scp", "delete"]
    assert not cloud.is_there()


ENDS = {
    # What ends without a signal: its exit code, and whether the machine is still there.
    "setup.sh": ("", {}, 0, True),
    "delete.sh": ("", {}, 0, False),
    "run.sh": ("a.module", {"ends": {"0": [[0, 0]]}}, 0, True),
    "run.sh, failing": ("a.module", {"ends": {"0": [[0, 9]]}}, 9, True),
    "create.sh, again": ("", {}, 0, True),
}


@pytest.mark.parametrize("streams", READERS)
@pytest.mark.parametrize("case", ENDS)
def test_without_a_reader_every_script_does_its_work(cloud, case, streams):
    words, plan, expected, stays = ENDS[case]
    cloud.machine(**plan)
    shell(cloud, case.split(",")[0], READERS[streams], words).wait(UNTIL)
    assert ended_with(cloud) == expected
    assert cloud.is_there() == stays
    assert not list(cloud.path.parent.glob("tmp.*"))


@pytest.mark.parametrize("number", first(SIGNALS), ids=lambda number: number.name)
@pytest.mark.parametrize("streams", READERS)
def test_no_reader_and_no_signal_keeps_run_from_leaving_the_command_alone(cloud, streams, number):
    cloud.machine(ends={"0": [[TOLD, 0]]})
    process = shell(cloud, "run.sh", READERS[streams], "a.module")
    cloud.wait_for(lambda: cloud.jobs())
    assert interrupt(cloud, process, number) == SIGNALS[number]
    cloud.tell()
    assert cloud.run("run.sh", "a.module").returncode == 0
    assert len(cloud.jobs()) == 1


def test_every_script_with_something_to_clean_up_has_the_one_trap():
    """SIGPIPE, closed streams and further signals are then settled; remote.sh has none of ours on a terminal."""
    for script in SCRIPTS:
        text = script.read_text()
        if script.name not in ("lib.sh", "run_gpu.sh", "remote.sh", "checks.sh"):
            assert not re.search(r"^\s*trap '?[a-z]", text, re.MULTILINE), script.name
            assert "lib.sh" in text or script.name == "env.sh"


def test_create_new_leaves_a_machine_alone_that_somebody_else_made_meanwhile(cloud):
    assert cloud.run("create.sh", "--keep").returncode == 0
    done = cloud.run("create.sh", "--new")
    assert done.returncode == 2
    assert "somebody else" in done.err
    assert cloud.is_there()


def test_create_gives_up_where_gcloud_stops_to_answer_and_deletes_its_request(cloud):
    cloud.plan([{"states": ["WAITING_FOR_RESOURCES", *[""] * 10, "ACTIVE"]}])
    done = cloud.run("create.sh")
    assert done.returncode == 3, done.err
    assert "ten times in turn" in done.err
    assert not cloud.is_there()


COUNTED = ["CALL_SECONDS", "MAX_WAIT_SECONDS", "MAX_DELETE_SECONDS", "MAX_RETRIES", "MAX_FAILURES", "STEADY_SECONDS"]
NO_NUMBERS = ["-1", "1e3", "9999999999", "soon", ""]


def test_a_pause_may_begin_with_a_zero_since_sleep_reads_it_as_people_do(cloud):
    assert "POLL_SECONDS=08\n" in cloud.run("env.sh", POLL_SECONDS="08").out


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product(["POLL_SECONDS", "RETRY_SECONDS"], NO_NUMBERS),
        *itertools.product(COUNTED, ["08", *NO_NUMBERS]),
    ],
)
def test_a_number_that_bash_would_read_otherwise_is_refused_before_it_is_paid_for(cloud, name, value):
    done = cloud.run("supervise.sh", "a.module", **{name: value})
    assert (done.returncode, cloud.records("calls.jsonl")) == (2, [])
    assert name in done.err


@pytest.mark.parametrize("out", ["gs://bucket", "gs://", "gs:///run", "gs://bucket//run", "/tmp/run", "s3://b/run"])
def test_an_out_that_does_not_outlive_the_machine_is_refused_before_it_is_paid_for(cloud, out):
    done = cloud.run("supervise.sh", "a.module", OUT=out)
    assert (done.returncode, cloud.records("calls.jsonl")) == (2, [])
    assert "OUT: " in done.err


@pytest.mark.parametrize("character", "[]*?\\")
def test_an_out_that_reads_as_a_pattern_is_refused_before_it_is_paid_for(cloud, character):
    out = f"gs://bucket/lr={character}1e-3"
    done = cloud.run("supervise.sh", "a.module", OUT=out)
    assert (done.returncode, cloud.records("calls.jsonl")) == (2, [])
    assert done.err.startswith(f"error: OUT: got {out}; allowed is gs://bucket/directory without [ ] * ? \\, ")


def test_an_out_may_have_all_other_characters(cloud):
    assert cloud.run("env.sh", OUT="gs://bucket/lr={1e-3},(a)+b/é").returncode == 0


@pytest.mark.parametrize(
    ("made", "listed", "kind", "code"),
    [
        (False, False, "v5litepod-16", 2),
        (True, False, "v5litepod-16", 2),
        (True, True, "v5litepod-16", 0),
        (True, False, "v5litepod-8", 0),
    ],
)
def test_an_ssh_agent_without_the_key_of_gcloud_is_noticed_before_it_is_paid_for(cloud, made, listed, kind, code):
    home = pathlib.Path(cloud.environment["HOME"])
    own, another = "3072 SHA256:own gcloud (RSA)", "256 SHA256:another me (ED25519)"
    for name, keys in {"ssh-keygen": own, "ssh-add": f"{another}\n{own}" if listed else another}.items():
        (home / "bin" / name).write_text(f"#!/bin/sh\necho '{keys}'\n")
        (home / "bin" / name).chmod(0o755)
    if made:
        (home / ".ssh").mkdir()
        (home / ".ssh" / "google_compute_engine").touch()
    done = cloud.run("supervise.sh", "a.module", ACCELERATOR_TYPE=kind)
    assert done.returncode == code, done.err
    assert bool(cloud.records("calls.jsonl")) == (code == 0)
    assert ("the ssh agent has keys" in done.err) == bool(code)


@pytest.mark.parametrize("missing", ["gcloud", "git", "tar", "gzip"])
def test_a_tool_that_is_missing_is_noticed_before_it_is_paid_for(cloud, missing):
    few = cloud.path.parent / "few"
    few.mkdir()
    for directory in cloud.environment["PATH"].split(":"):
        for tool in pathlib.Path(directory).glob("*") if pathlib.Path(directory).is_dir() else ():
            if tool.name != missing and not (few / tool.name).exists():
                (few / tool.name).symlink_to(tool)
    done = cloud.run("supervise.sh", "a.module", PATH=str(few))
    assert (done.returncode, cloud.records("calls.jsonl")) == (2, [])
    assert f"not on PATH: {missing}" in done.err


@pytest.mark.parametrize(
    ("options", "installed", "fits", "module", "code", "compiled"),
    [
        ([], 0, 0, "ckl_jax.finetune", 0, True),
        ([], 0, DOES_NOT_FIT, "ckl_jax.finetune", 2, True),
        ([], 0, 1, "ckl_jax.finetune", 2, True),
        ([], 0, 2, "ckl_jax.finetune", 2, True),
        ([], 0, 139, "ckl_jax.finetune", 2, True),
        (["--no-preflight"], 0, DOES_NOT_FIT, "ckl_jax.finetune", 0, False),
        ([], 1, DOES_NOT_FIT, "ckl_jax.finetune", 0, False),
        ([], 0, DOES_NOT_FIT, "experiments.figure4_prioritized_kl", 0, False),
    ],
)
def test_what_does_not_fit_the_tpu_is_refused_before_it_is_paid_for(
    cloud, options, installed, fits, module, code, compiled
):
    noted = cloud.path / "preflight"
    cloud.add(PREFLIGHT, f'[ "$1" = -c ] && exit {installed}\necho "$@" >{noted}\nexit {fits}')
    done = cloud.run("supervise.sh", *options, module, "--seeds", "20")
    assert done.returncode == code, done.err
    assert bool(cloud.calls()) == (code == 0)
    expected = f"-m ckl_jax.preflight --topology v5litepod-16 {module.removeprefix('ckl_jax.')} --seeds 20\n"
    assert (noted.read_text() if noted.exists() else None) == (expected if compiled else None)
    assert ("does not fit v5litepod-16" in done.err) == (code == 2 and fits == DOES_NOT_FIT)
    failed = f"preflight itself failed (code {fits}, its output is above); --no-preflight goes past it"
    assert (failed in done.err) == (code == 2 and fits != DOES_NOT_FIT)


@pytest.mark.parametrize(
    "error",
    ["topology: got v3-8, allowed is", "checkpoint: got gs://b/x, allowed with gcsfs only: install the extra tpu"],
)
def test_what_cannot_be_compiled_here_is_let_pass_and_it_is_said(cloud, error):
    cloud.add(PREFLIGHT, f'[ "$1" = -c ] && exit 0\necho "error: {error}" >&2\nexit 2')
    done = cloud.run("supervise.sh", "ckl_jax.finetune")
    assert done.returncode == 0, done.err
    assert f"error: {error}\n" in done.err
    assert "not compiled beforehand, for that reason" in done.err


def test_nothing_is_compiled_for_a_machine_that_is_adopted_and_paid_for_meanwhile(cloud):
    cloud.machine()
    cloud.add(PREFLIGHT, f'[ "$1" = -c ] && exit 0\nexit {DOES_NOT_FIT}')
    done = cloud.run("supervise.sh", "--adopt", "ckl_jax.finetune")
    assert done.returncode == 0, done.err


def test_a_command_of_one_host_is_refused_for_several_before_they_are_paid_for(cloud):
    done = cloud.run("supervise.sh", "experiments.reproduce")
    assert (done.returncode, cloud.records("calls.jsonl")) == (2, [])
    assert "is for one worker, and v5litepod-16 has several" in done.err
    assert cloud.run("supervise.sh", "experiments.reproduce", ACCELERATOR_TYPE="v5litepod-8").returncode == 0
    cloud.machine(lives=[{}, {}], workers=2)
    assert cloud.run("run.sh", "experiments.reproduce").returncode == 2
    assert len(cloud.jobs()) == 1


PARSE = ROOT / "tpu_scripts" / "parse.py"


def parse(monkeypatch, *words, script=PARSE):
    """The exit code of parse.py with these words."""
    with monkeypatch.context() as here:
        here.setattr(cli, "run", cli.run)  # parse.py replaces it.
        here.setattr(sys, "argv", ["parse.py", *words])
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as stop:
            return stop.code
    return 0


@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(
    ("words", "code"), [("--seeds 2", 0), ("--seeds x", 2), ("--no-such 1", 2), ("--beta -1", 2), ("--quiet", 0)]
)
def test_arguments_are_read_by_the_module_itself_before_it_is_paid_for(monkeypatch, capsys, words, code):
    found = parse(monkeypatch, "ckl_jax.finetune", *words.split(), "--out", "gs://bucket/run")
    printed = capsys.readouterr()
    assert (found, printed.out) == (code, "")
    assert printed.err.startswith("error: ") == bool(code)


HERE_ALONE = ["runs/mine", "runs/mine/", "./runs/mine", "kept/../runs/mine", "{root}/runs/mine/", "{root}/kept/N7"]
HERE_ALONE += ["../outside/model", "{root}/../outside/model", "linked", "linked_runs/mine"]
NOWHERE = ["runs/typo", "N8", "/nowhere/x", "~/x", "kept/N8", "./N5"]
TRAVELS = ["N5", "gs://bucket/model", "kept/N7", "./kept/N7/", "linked_kept"]


@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("git", [True, False], ids=["git", "no git"])
@pytest.mark.parametrize("checkpoint", HERE_ALONE + NOWHERE + TRAVELS)
def test_a_path_that_will_not_be_there_is_refused_before_it_is_paid_for(monkeypatch, capsys, tmp_path, checkpoint, git):
    root = tmp_path / "checkout"
    for directory in ("outside/model", "checkout/runs/mine", "checkout/kept/N7", "checkout/tpu_scripts"):
        (tmp_path / directory).mkdir(parents=True)
    (root / ".gitignore").write_text("/runs/\n")
    for name, target in {"linked": "../outside/model", "linked_runs": "runs", "linked_kept": "kept/N7"}.items():
        (root / name).symlink_to(target)
    if git:
        subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    monkeypatch.chdir(root)
    script = shutil.copy(PARSE, root / "tpu_scripts")
    words = ["ckl_jax.finetune", "--checkpoint", checkpoint.format(root=root), "--out", "gs://bucket/run"]
    found = parse(monkeypatch, *words, script=script)
    printed = capsys.readouterr().err
    refused = checkpoint not in TRAVELS
    assert found == (2 if refused else 0), printed
    assert ("error: checkpoint: got " in printed and "nothing else is on the machine" in printed) == refused
    assert parse(monkeypatch, "--adopt", *words, script=script) == 0, "what goes on may read what only the machine has"


@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(("checkpoint", "code"), [("tests/data", 0), ("data", 2), ("tests/no_data", 2)])
def test_a_path_is_one_of_the_checkout_wherever_this_is_called_from(monkeypatch, checkpoint, code):
    monkeypatch.chdir(ROOT / "tests")
    assert parse(monkeypatch, "ckl_jax.finetune", "--checkpoint", checkpoint, "--out", "gs://bucket/run") == code


@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("ckl_jax.finetune --certainty-checkpoint runs/typo", "certainty_checkpoint: got 'runs/typo'"),
        ("ckl_jax.finetune --scale small", f"checkpoint: got '{ROOT}/ckl_jax/pretrained/small'"),
        ("experiments.table1_certainty_gap --checkpoints N3 N8", "checkpoints: got 'N8'"),
        ("experiments.figure5_certainty_colors --finetuned=runs/typo", "finetuned: got 'runs/typo'"),
        ("experiments.figure7_critical_tokens", "run: got 'runs/figure4'"),
        ("experiments.figure7_critical_tokens --plot-only", None),
        ("experiments.regularizers --earlier runs/typo", "earlier: got 'runs/typo'"),
        ("experiments.benchmark --policies N3 runs/typo", "policies: got 'runs/typo'"),
        ("experiments.reproduce", None),
        ("experiments.reproduce --scale small --checkpoint N8", "checkpoint: got 'N8'"),
        (
            "experiments.reproduce --options figure4:--certainty-checkpoint=N8",
            "figure4: certainty_checkpoint: got 'N8'",
        ),
        ("experiments.reproduce --options figure2:--pretrained=runs/x", "figure2: pretrained: got 'runs/x'"),
        ("experiments.reproduce --options figure4:--no-such=1", "figure4: Unrecognized options: --no-such=1"),
        ("experiments.reproduce --items table1 --options figure4:--no-such=1", None),
        ("experiments.reproduce --report-only", None),
    ],
)
def test_every_option_that_reads_a_path_is_looked_at(monkeypatch, capsys, words, named):
    monkeypatch.chdir(ROOT)
    found = parse(monkeypatch, *words.split(), "--out", "gs://bucket/run")
    printed = capsys.readouterr().err
    assert found == (0 if named is None else 2), printed
    assert printed.startswith(f"error: {named}" if named else "")


@pytest.mark.parametrize("adopt", [[], ["--adopt"]], ids=["", "adopt"])
def test_the_process_that_reads_them_is_told_of_a_machine_that_has_more(cloud, adopt):
    noted = cloud.path / "parsed"
    cloud.add("a/module.py", f'echo "$@" >{noted}\necho error: so it is\nexit 2')
    (cloud.checkout / "pyproject.toml").touch()
    done = cloud.run("supervise.sh", *adopt, "a.module", "--checkpoint", "x")
    assert (done.returncode, cloud.records("calls.jsonl")) == (2, [])
    assert "error: so it is" in done.err
    _, read = noted.read_text().split("/tpu_scripts/parse.py ")
    assert read.split() == [*adopt, "a.module", "--checkpoint", "x", "--out", "gs://bucket/run"]


def test_a_command_that_writes_no_results_is_told_from_one_whose_options_are_wrong(cloud):
    cloud.add("ckl_jax/evaluate.py", f'PYTHONPATH={ROOT} exec {sys.executable} "$@"')
    (cloud.checkout / "pyproject.toml").touch()
    done = cloud.run("supervise.sh", "ckl_jax.evaluate", "--checkpoint", "N5")
    assert (done.returncode, cloud.records("calls.jsonl")) == (2, [])
    assert "ckl_jax.evaluate writes no results: unset OUT" in done.err


@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("figure", ["figure2_pretraining", "figure3_pretraining_levels"])
@pytest.mark.parametrize(
    ("words", "code"), [("", 2), ("--pretrained runs/x", 2), ("--pretrained gs://bucket/models", 0)]
)
def test_models_that_would_be_lost_with_the_machine_are_refused_before_it_is_paid_for(
    monkeypatch, capsys, figure, words, code
):
    found = parse(monkeypatch, f"experiments.{figure}", *words.split(), "--out", "gs://bucket/run")
    assert found == code
    assert ("error: pretrained: got 'runs/" in capsys.readouterr().err) == bool(code)


@pytest.mark.parametrize("words", [["--log-to", "wandb"], ["--log-to=tensorboard"]])
def test_copies_of_the_records_that_the_machine_cannot_make_are_refused_before_it_is_paid_for(cloud, words):
    (cloud.checkout / "pyproject.toml").touch()
    done = cloud.run("supervise.sh", "a.module", *words)
    assert done.returncode == 2
    assert "metrics.jsonl" in done.err
    assert not cloud.records("calls.jsonl")


def test_the_process_that_reads_them_ends_with_the_modules_code():
    done = subprocess.run(
        [sys.executable, PARSE, "ckl_jax.finetune", "--seeds", "x", "--out", "gs://bucket/run"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=UNTIL,
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize("state", first(["PREEMPTED", "TERMINATED", "STOPPED"]))
@pytest.mark.parametrize("at", [1, 2, 3, 6], ids=["scp", "busy", "install", "run"])
def test_a_machine_that_is_gone_under_an_active_request_is_a_preemption(cloud, state, at):
    cloud.plan([{"preempted_at": at, "machine": state}, {}], ends={"0": [[FOREVER, 0], [0, 0]]} if at == 6 else {})
    done = cloud.run("supervise.sh", "a.module", MAX_FAILURES="1")
    assert done.returncode == 0, done.err
    assert cloud.calls() == ["create", "scp", "delete", "create", "scp", "delete"]


def test_delete_looks_for_the_machine_too(cloud):
    cloud.plan([{"lingers": True}])
    cloud.run("create.sh")
    assert cloud.run("delete.sh").returncode == 0
    assert cloud.calls() == ["create", "delete", "delete"]
    assert not cloud.is_there()


def test_delete_does_not_call_a_machine_gone_that_it_could_not_see(cloud):
    cloud.plan([{"lingers": True}])
    cloud.run("create.sh")
    says = dict.fromkeys(("tpu-vm describe", "tpu-vm delete"), "ERROR: (gcloud) UNAVAILABLE: 503")
    cloud.plan([{"lingers": True}], says=says)
    done = cloud.run("delete.sh")
    assert done.returncode == 7
    assert "MAY BE PAID FOR" in done.err
    assert "nothing is paid for" not in done.err
    cloud.plan([{"lingers": True}])
    assert cloud.run("delete.sh").returncode == 0
    assert not cloud.is_there()


NO_LOGIN = "ERROR: (gcloud) There was a problem refreshing your current auth tokens: File '/run/token' was not found."
LOOKS = [f"{group} {verb}" for group in ("queued-resources", "tpu-vm") for verb in ("describe", "delete")]


def test_a_login_that_was_not_found_is_not_a_machine_that_was_not_found(cloud):
    cloud.run("create.sh")
    cloud.plan(says=dict.fromkeys(LOOKS, NO_LOGIN))
    done = cloud.run("delete.sh")
    assert done.returncode == 7
    assert "nothing is paid for" not in done.err
    assert cloud.is_there()


def test_a_gcloud_that_hangs_is_ended(cloud):
    cloud.plan(hangs=["describe"])
    assert cloud.run("supervise.sh", "a.module", CALL_SECONDS="1").returncode == 5


def test_every_call_of_gcloud_has_its_bound_and_is_killed_10_s_after_it(cloud):
    noted, timeout = cloud.path / "bounds", cloud.path.parent / "bin" / "timeout"
    timeout.write_text(f'#!/bin/sh\necho "$*" >>"{noted}"\nexec {shutil.which("timeout")} "$@"\n')
    timeout.chmod(0o755)
    assert cloud.run("supervise.sh", "a.module", CALL_SECONDS="60").returncode == 0
    form = r"^-k 10 (\d+) gcloud compute tpus \S+ (\w+).*?(?:--command=bash remote.sh (\w+).*)?$"
    found = re.findall(form, noted.read_text(), re.MULTILINE)
    assert len(found) == len(cloud.records("calls.jsonl"))
    bounds = {(words or verb, int(seconds)) for seconds, verb, words in found}
    quick, slow = ("describe", "status", "start"), ("create", "scp", "busy", "install", "delete")
    assert bounds == {*((name, 60) for name in quick), *((name, 600) for name in slow)}


def test_a_checkout_without_git_is_installed(cloud):
    shutil.rmtree(cloud.checkout / ".git")
    assert cloud.run("supervise.sh", "a.module").returncode == 0
    assert not cloud.is_there()


def test_a_checkout_that_cannot_be_packed_is_refused_before_it_is_paid_for(cloud):
    shutil.rmtree(cloud.checkout / ".git")
    (cloud.checkout / ".git").write_text("gitdir: nowhere\n")
    for script, arguments in (("create.sh", ()), ("supervise.sh", ("a.module",))):
        done = cloud.run(script, *arguments)
        assert done.returncode == 2
        assert "cannot be packed" in done.err
    assert not cloud.records("calls.jsonl")


@pytest.mark.parametrize("words", [["a/module.py"], ["no.such"], ["a.module", "--out", "x"], []])
def test_a_command_that_cannot_be_is_refused_before_it_is_paid_for(cloud, words):
    (cloud.checkout / "pyproject.toml").touch()
    assert cloud.run("supervise.sh", *words).returncode == 2
    assert not cloud.records("calls.jsonl")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        *(("v5e-8", "v5litepod-8"), ("V5LITE-16", "v5litepod-16"), ("v6-8", "v6e-8"), ("trillium-4", "v6e-4")),
        *(("tpu-v4-8", "v4-8"), ("v5-8", "v5litepod-8 or v5p-8"), ("V5P-8", "v5p-8")),
    ],
)
def test_a_type_that_gcloud_calls_otherwise_is_named(cloud, typed, meant):
    done = cloud.run("env.sh", ACCELERATOR_TYPE=typed)
    assert done.returncode == 2
    assert done.err == f"error: ACCELERATOR_TYPE: got {typed}, which gcloud calls {meant}\n"
    assert cloud.run("env.sh", ACCELERATOR_TYPE=typed, RUNTIME_VERSION="mine").returncode == 0
