"""A gcloud for tests: it notes its arguments, replays what the plan says, and runs workers' commands on this machine.

CLOUD names a directory with plan.json and, written by the fake, calls.jsonl and state.json. The plan:
  lives: one entry per machine that gets created:
    states: what ``describe`` answers in turn, the last one for ever (default: ACTIVE)
    preempted_at: the how-manieth ssh finds the machine gone (SUSPENDED, its processes killed)
    refused: text with which ``create`` fails; unreachable: ssh fails with 255 while the machine is ACTIVE
  workers: how many; undeletable: ``delete`` fails; slow_create: seconds that ``create`` takes.
Every worker of every life has a home directory of its own, CLOUD/LIFE/WORKER.
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


def homes(state):
    return [CLOUD / str(state["life"]) / str(worker) for worker in range(PLAN.get("workers", 1))]


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
        state.update(there=True, life=state["life"] + 1, described=0, ssh=0, preempted=False)
        for home in homes(state):
            home.mkdir(parents=True)
        time.sleep(PLAN.get("slow_create", 0))
        return
    if not state["there"]:
        end(1, "ERROR: (gcloud) NOT_FOUND: the resource was not found")
    if verb == "describe":
        states = PLAN["lives"][state["life"]].get("states", ["ACTIVE"])
        print("SUSPENDED" if state["preempted"] else states[min(state["described"], len(states) - 1)])
        state["described"] += 1
    elif PLAN.get("undeletable"):
        end(1, "ERROR: (gcloud) INTERNAL")
    else:
        kill_processes(state)
        state["there"] = False


def reach(state):
    life = PLAN["lives"][max(state["life"], 0)]
    state["ssh"] += 1
    if state["ssh"] == life.get("preempted_at"):
        state["preempted"] = True
        kill_processes(state)
    if not state["there"] or state["preempted"] or life.get("unreachable"):
        end(255, "ssh: connection timed out")


def main(arguments):
    with (CLOUD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with (CLOUD / "calls.jsonl").open("a") as calls:
            calls.write(json.dumps(arguments) + "\n")
        path = CLOUD / "state.json"
        state = json.loads(path.read_text()) if path.exists() else {"there": False, "life": -1}
        try:
            if arguments[2] == "queued-resources":
                return queued(arguments[3], state)
            reach(state)
        finally:
            path.write_text(json.dumps(state))
    options = dict(word.partition("=")[::2] for word in arguments if word.startswith("--"))
    wanted = homes(state) if options["--worker"] == "all" else [homes(state)[int(options["--worker"])]]
    if arguments[3] == "scp":
        for home in wanted:
            for source in arguments[4 : arguments.index("t-1:")]:
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
