"""A gcloud for tests: it notes its arguments, replays what the plan says, and runs workers' commands on this machine.

CLOUD names a directory with plan.json and, written by the fake, calls.jsonl and state.json. The plan:
  lives: one entry per machine that gets created:
    states: what ``describe`` answers in turn, the last one for ever (default: ACTIVE)
    preempted_at: the how-manieth ssh finds the machine gone (SUSPENDED, its processes killed)
    machine: the machine's state then, while the request stays ACTIVE: ssh fails with 1, as gcloud does
    refused: text with which ``create`` fails; unreachable: ssh fails with 255 while the machine is ACTIVE
    lingers: the machine outlives its request
    takes: the how-manieth ``delete`` works; after the first the request is DELETING
  workers: how many; undeletable: ``delete`` fails; slow_create: seconds that ``create`` takes.
  hangs: verbs that take for ever; missing: verbs for which there is no gcloud.
  says: by "group verb", an error with which that fails.
  saves: every command that starts saves a checkpoint in the bucket; else nothing lies there.
Every worker of every life has a home directory of its own, CLOUD/LIFE/WORKER: that of ckl, and CLOUD/LIFE/WORKER-NAME
for another NAME that logs in.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import signal
import sys
import time

CLOUD = pathlib.Path(os.environ["CLOUD"])
PLAN = json.loads((CLOUD / "plan.json").read_text())


NOT_FOUND = (
    "ERROR: (gcloud) NOT_FOUND: Resource 'projects/p/locations/z/{}/t-1' was not found. You are authenticated as me."
)
UNUSABLE = {
    "PREEMPTED": 'ERROR: (gcloud) This TPU has terminal state "PREEMPTED", so it cannot be used anymore.',
    "TERMINATED": 'ERROR: (gcloud) This TPU has terminal state "TERMINATED", so it cannot be used anymore.',
    "STOPPED": 'ERROR: (gcloud) This TPU has state "STOPPED", so it cannot be currently connected to.',
}


def homes(state, user="ckl"):
    other = "" if user == "ckl" else f"-{user}"
    return [CLOUD / str(state["life"]) / f"{worker}{other}" for worker in range(PLAN.get("workers", 1))]


def wait_for_commands(state):
    """Until all that was started on the workers has noted its arguments, which on a loaded machine takes a while."""
    started = len(list((CLOUD / str(state["life"])).glob("*/ckl_runs/*/attempt")))
    jobs, end = CLOUD / "jobs.jsonl", time.monotonic() + 60
    while time.monotonic() < end:
        lines = jobs.read_text().splitlines() if jobs.exists() else []
        if sum(json.loads(line)["life"] == str(state["life"]) for line in lines) >= started:
            break
        time.sleep(0.01)


def kill_processes(state):
    for group in (CLOUD / str(state["life"])).glob("*/ckl_runs/*/group"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(group.read_text()), signal.SIGKILL)


def end(code, message=""):
    print(message, file=sys.stderr)
    sys.exit(code)


def queued(verb, state):
    if verb == "create":
        if state["there"]:
            end(1, "ERROR: (gcloud) ALREADY_EXISTS")
        life = PLAN["lives"][state["life"] + 1]
        if "refused" in life:
            end(1, f"ERROR: (gcloud) {life['refused']}")
        state.update(there=True, machine=True, life=state["life"] + 1, described=0, deletes=0, ssh=0, preempted=False)
        for home in homes(state):
            home.mkdir(parents=True)
        time.sleep(PLAN.get("slow_create", 0))
        return
    if not state["there"]:
        end(1, NOT_FOUND.format("queuedResources"))
    life = PLAN["lives"][state["life"]]
    if verb == "describe":
        states = life.get("states", ["ACTIVE"])
        gone = state["preempted"] and "machine" not in life
        states = ["DELETING"] if state["deletes"] else ["SUSPENDED"] if gone else states
        print(states[min(state["described"], len(states) - 1)])
        state["described"] += 1
    elif PLAN.get("undeletable"):
        end(1, "ERROR: (gcloud) INTERNAL")
    elif state["deletes"] + 1 < life.get("takes", 1):
        state["deletes"] += 1
        end(1, "ERROR: (gcloud) FAILED_PRECONDITION: it is being deleted")
    else:
        kill_processes(state)
        state.update(there=False, machine=state["machine"] and bool(life.get("lingers")))


def machine(verb, state):
    if not state.get("machine"):
        end(1, NOT_FOUND.format("nodes"))
    if "--format=value(networkEndpoints.len())" in sys.argv:
        print(PLAN.get("workers", 1))
    elif verb == "describe":
        print(PLAN["lives"][max(state["life"], 0)].get("machine", "PREEMPTED") if state.get("preempted") else "READY")
    elif PLAN.get("undeletable") or state.get("deletes"):
        end(1, "ERROR: (gcloud) INTERNAL")
    else:
        kill_processes(state)
        state["machine"] = False


def reach(state):
    life = PLAN["lives"][max(state["life"], 0)]
    state["ssh"] = state.get("ssh", 0) + 1
    if state["ssh"] == life.get("preempted_at"):
        wait_for_commands(state)
        state["preempted"] = True
        kill_processes(state)
    if state.get("preempted") and "machine" in life:
        end(1, UNUSABLE[life["machine"]])
    if not state.get("machine") or state["preempted"] or life.get("unreachable"):
        end(255, "ssh: connection timed out")


def main(arguments):
    with (CLOUD / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    if arguments[3] in PLAN.get("hangs", ()):
        time.sleep(600)
    if arguments[3] in PLAN.get("missing", ()):
        end(127, "timeout: failed to run command 'gcloud': No such file or directory")
    if arguments[0] == "storage":
        jobs = CLOUD / "jobs.jsonl"
        count = len(jobs.read_text().splitlines()) if PLAN.get("saves") and jobs.exists() else 0
        if not count:
            end(1, "ERROR: (gcloud.storage.ls) One or more URLs matched no objects.")
        print(*[f"{arguments[-1]}/checkpoints/{step}.sha256.json" for step in range(count)], sep="\n")
        return None
    with (CLOUD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = CLOUD / "state.json"
        state = json.loads(path.read_text()) if path.exists() else {"there": False, "life": -1}
        try:
            group, verb = arguments[2:4]
            if error := PLAN.get("says", {}).get(f"{group} {verb}"):
                end(1, error)
            if verb not in ("describe", "ssh"):
                print(f"Request to {verb} issued", file=sys.stderr, flush=True)  # Before it is done, as gcloud does.
            if group == "queued-resources":
                return queued(verb, state)
            if verb not in ("scp", "ssh"):
                return machine(verb, state)
            reach(state)
        finally:
            new = path.with_suffix(".new")
            new.write_text(json.dumps(state))
            new.replace(path)  # The tests read it meanwhile.
    options = dict(word.partition("=")[::2] for word in arguments if word.startswith("--"))
    login = next(word for word in arguments[4:] if word.rstrip(":").endswith("t-1"))
    user = login.rpartition("@")[0] or os.environ.get("USER", "me")
    wanted = homes(state, user) if options["--worker"] == "all" else [homes(state, user)[int(options["--worker"])]]
    for home in wanted:
        home.mkdir(exist_ok=True)
    if arguments[3] == "scp":
        for home in wanted:
            for source in arguments[4 : arguments.index(login)]:
                shutil.copy(source, home)
        return None
    import subprocess  # Most calls do without, and the tests make hundreds.

    codes = []
    for worker, home in enumerate(wanted):
        environment = {**os.environ, "HOME": str(home), "WORKER": str(worker)}
        # Joined by ssh and read by the login shell, which need not be bash.
        command = " ".join(options["--command"].split(" "))
        codes.append(subprocess.run(["sh", "-c", command], cwd=home, env=environment, check=False).returncode)
    sys.exit(next((code for code in codes if code), 0))


main(sys.argv[1:])
