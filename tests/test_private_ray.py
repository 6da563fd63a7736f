"""A local run's Ray: bound to the loopback interface, closed to other users, no secrets in its files; and addresses of
clusters that cannot be joined."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest
from conftest import TOP, command

STARTED = """
import json, os, subprocess, sys, time
from pathlib import Path
import psutil
from harness.config import Resources
from harness.search.cluster import cluster
import ray

def as_nobody(*words):
    return subprocess.run(["setpriv", "--reuid=65534", "--clear-groups", *words], capture_output=True).returncode

with cluster(Resources(gpus_per_trial=0)):
    @ray.remote
    class Actor:
        def secret(self):
            return os.environ["AWS_SECRET_ACCESS_KEY"]
    actor = Actor.remote()
    inherited = ray.get(actor.secret.remote())
    me = psutil.Process()
    listening = [
        (process.name(), one.laddr.ip)
        for process in [me, *me.children(recursive=True)]
        for one in process.net_connections(kind="inet")
        if one.status == psutil.CONN_LISTEN or not one.raddr
    ]
    session = Path(ray._private.worker._global_node.get_session_dir_path()).resolve()
    folder = session.parent.parent
    files = [path for path in folder.rglob("*") if path.is_file()]
    found = {
        "inherited": inherited,
        "listening": listening,
        "outside": [one for one in listening if not one[1].startswith(("127.", "::1", "::ffff:127."))],
        "mode": oct(folder.stat().st_mode & 0o777),
        "token_mode": oct((folder / "token").stat().st_mode & 0o777),
        "secrets": [str(path) for path in files if b"planted" in path.read_bytes()],
        "sockets": max(len(str(path)) for path in folder.rglob("*") if path.is_socket()),
    }
    if os.geteuid() == 0:
        closed = [folder, folder / "token", session / "logs", *folder.rglob("*.out")]
        found["readable"] = [str(path) for path in closed if as_nobody("ls", str(path)) == 0]
        found["control"] = as_nobody("ls", "/tmp")
print(json.dumps(found))
print(json.dumps(sorted(name for name in os.environ if name.startswith("RAY_AUTH"))))
"""


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    import json

    secrets = dict.fromkeys(("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "HF_TOKEN", "WANDB_API_KEY"), "planted")
    own = {**os.environ, **secrets, "PYTHONPATH": str(TOP), "RAY_ADDRESS": "127.0.0.1:1"}
    done = subprocess.run(
        [sys.executable, "-c", STARTED], env=own, cwd=tmp_path_factory.mktemp("ray"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()[-2:]
    return json.loads(first), json.loads(second)


def test_ray_listens_on_the_loopback_interface_alone(started):
    found, _ = started
    assert found["listening"]
    assert found["outside"] == []


def test_other_users_read_neither_token_nor_logs(started):
    found, left = started
    assert (found["mode"], found["token_mode"]) == ("0o700", "0o600")
    assert found["sockets"] <= 100
    assert left == []
    if "readable" in found:
        assert found["readable"] == []
        assert found["control"] == 0


def test_no_secret_is_in_a_file_and_trials_have_it(started):
    found, _ = started
    assert found["inherited"] == "planted"
    assert found["secrets"] == []


@pytest.fixture
def silent():
    """A port where something listens that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:1", "no Ray cluster answers there; start a cluster with"),
        ("nosuchhost.invalid:6379", "start a cluster with `ray start --head`"),
        ("silent", "no Ray cluster answers there"),
        ("nonsense", "start a cluster with"),
        ("127.0.0.1:abc", "start a cluster with"),
        ("ray://127.0.0.1:10001", "Ray Client is not supported"),
    ],
)
def test_an_address_that_does_not_answer(address, said, silent, tmp_path):
    given = silent if address == "silent" else address
    started = time.monotonic()
    done = command("-m", "harness.tune", "space=quick", f"resources.address={given}", cwd=tmp_path)
    assert time.monotonic() - started < 20
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith(f"error: resources.address={given}: ")
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def closed_cluster(tmp_path):
    """A cluster that wants a token, on this machine; yields its address and the file of its token."""
    token, home = tmp_path / "token", tmp_path / "home"
    token.write_text("a" * 64)
    token.chmod(0o600)
    home.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    own = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "HOME": str(home)}
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    head = [*ray, "start", "--head", f"--port={port}", "--num-cpus=1", "--include-dashboard=false", "--block"]
    head += ["--node-ip-address=127.0.0.1", "--disable-usage-stats", "--object-store-memory=100000000"]
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*head, f"--temp-dir={folder}"], env=own, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while "Ray runtime started" not in (tmp_path / "log").read_text():
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.2)
            yield f"127.0.0.1:{port}", token, home
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


@pytest.mark.slow
def test_a_cluster_that_wants_a_token(closed_cluster, tmp_path):
    """Without one, with another one: one line within 15 s, and nothing written. With it: a trial."""
    address, token, home = closed_cluster
    (tmp_path / "other").write_text("b" * 64)
    (tmp_path / "work").mkdir()
    words = ["-m", "harness.tune", "space=quick", "run=run", f"resources.address={address}", "search.samples=1"]
    words += ["trial.epochs=1", "stages=[search]"]
    given = {
        "none": {},
        "absent": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "absent")},
        "another": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "other")},
    }
    for kind, own in given.items():
        started = time.monotonic()
        done = command(*words, cwd=tmp_path / "work", HOME=str(home), **own)
        assert time.monotonic() - started < 20, kind
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), (kind, done.stderr)
        assert done.stderr.startswith(f"error: resources.address={address}: "), kind
        assert list((tmp_path / "work").iterdir()) == [], kind
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    done = command(*words, cwd=tmp_path / "work", HOME=str(home), **own)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_long_temporary_folder_and_ports_in_use(tmp_path):
    """Paths of sockets have at most 107 bytes; others listen at the ports that Ray uses by default."""
    folder = tmp_path / ("d" * 110)
    folder.mkdir()
    words = ["space=quick", "run=run", "search.samples=1", "trial.epochs=1", "stages=[search]"]
    with contextlib.ExitStack() as stack:
        for port in (6379, 8265, 10001):
            with contextlib.suppress(OSError):  # in use already
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
        done = command("-m", "harness.tune", *words, cwd=tmp_path, TMPDIR=str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
