"""Several processes as one program: what the environment must say, and two real ones against a single one."""

import jax
import pytest

from ckl_jax import hosts
from ckl_jax.config import ConfigError

SETTINGS = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


@pytest.fixture
def joined(monkeypatch):
    """The arguments of calls of ``jax.distributed.initialize``, in an environment that names no hosts."""
    for name in (*SETTINGS, "CKL_HOSTS"):
        monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    return calls


def test_a_process_on_its_own_is_the_first_and_agrees_with_itself(joined):
    hosts.start()
    assert joined == []
    assert hosts.is_first()
    assert not hosts.several()
    assert (hosts.any_host(True), hosts.any_host(False)) == (True, False)
    assert hosts.of_first(lambda: "found") == hosts.together(lambda: "found") == "found"


@pytest.mark.parametrize("call", [hosts.of_first, hosts.together])
def test_what_is_refused_on_its_own_is_raised_as_it_is(call):
    error = ConfigError("out: got nothing")

    def refuse():
        raise error

    with pytest.raises(ConfigError) as caught:
        call(refuse)
    assert caught.value is error


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        (SETTINGS, {"coordinator_address": "10.0.0.1:8476", "num_processes": 2, "process_id": 1}),
        ({"CKL_HOSTS": "auto"}, {}),
    ],
)
def test_the_environment_says_which_others_are_joined_and_is_not_passed_on(joined, monkeypatch, settings, arguments):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    hosts.start()
    hosts.start()
    assert joined == [arguments]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID: got '', allowed is a value where JAX_COORDINATOR_ADDRESS has one"),
        ({"JAX_COORDINATOR_ADDRESS": ""}, "JAX_COORDINATOR_ADDRESS: got '', allowed is a value where JAX_NUM"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "JAX_COORDINATOR_ADDRESS: got '10.0.0.1', allowed is host:port"),
        ({"JAX_COORDINATOR_ADDRESS": "host:70000"}, "JAX_COORDINATOR_ADDRESS: got 'host:70000', allowed is host:port"),
        ({"JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES: got '0', allowed is a number of at least 1"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES: got 'two', allowed is a number"),
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID: got '2', allowed is 0 to 1, below JAX_NUM_PROCESSES = 2"),
        ({"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID: got '-1', allowed is 0 to 1"),
        ({"CKL_HOSTS": "auto"}, "CKL_HOSTS: got 'auto', allowed is only without JAX_COORDINATOR_ADDRESS"),
        (dict.fromkeys(SETTINGS, "") | {"CKL_HOSTS": "2"}, "CKL_HOSTS: got '2', allowed is auto"),
    ],
)
def test_settings_that_are_partial_or_cannot_work_are_refused_by_name(joined, monkeypatch, change, said):
    for name, value in (SETTINGS | change).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        hosts.start()
    assert str(caught.value).startswith(said)
    assert joined == []


def test_others_that_are_not_found_are_one_line(joined, monkeypatch):
    def fail(**arguments):
        raise ValueError("coordinator_address\n should be defined.")

    monkeypatch.setenv("CKL_HOSTS", "auto")
    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(ConfigError, match=r"^hosts: .* CKL_HOSTS=auto \(ValueError: coordinator_address should be def"):
        hosts.start()
