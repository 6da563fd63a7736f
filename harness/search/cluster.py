"""Joins a Ray cluster, or starts one on this machine and stops it at the end."""

import contextlib
import json
import logging
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

# Ray reads these when it is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new output prints tables even with verbose=0
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths refer to the user's working directory
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # CPU trials see no GPU
if not os.environ.get("HOME"):  # Ray expands ~ when it is imported, which fails for a user without an account
    with contextlib.suppress(KeyError):
        os.environ["HOME"] = pwd.getpwuid(os.getuid()).pw_dir
    os.environ.setdefault("HOME", tempfile.gettempdir())
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ray and its dependencies announce their own future changes
    import ray
from harness.config import BadInput, Resources
from harness.config.plugins import TOP
from harness.run import gpus, system
from harness.search.ray_internals import private_cluster


@contextlib.contextmanager
def cluster(resources: Resources) -> Iterator[list[dict[str, float]]]:
    """Join the cluster at `resources.address`, or start one here and stop it at the end; yields each node's resources.

    Raises BadInput where the cluster cannot be joined.
    """
    own = not ray.is_initialized()
    terminate: Any = signal.getsignal(signal.SIGTERM)
    with scratch() as folder, contextlib.ExitStack() as stack:
        if own and resources.address:
            _check_answers(resources.address)
            stack.callback(_shut_down, terminate)
            try:
                with _importing_nothing_from_here(folder):
                    ray.init(address=resources.address, log_to_driver=False, logging_level=logging.ERROR)
            except Exception as error:
                raise _cannot_join(resources.address, " ".join(str(error).split())[:120]) from error
        elif own:
            command = [
                sys.executable,
                "-P",
                str(TOP / "harness" / "search" / "guard.py"),
                str(os.getpid()),
                str(folder),
            ]
            guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
            stack.callback(guard.communicate, b"ended")  # runs last
            stack.enter_context(private_cluster(folder))
            stack.callback(_shut_down, terminate)
            cores = system.environment().cores
            try:
                with _importing_nothing_from_here(folder):
                    ray.init(
                        address="local",  # else RAY_ADDRESS would be preferred
                        num_cpus=cores,
                        num_gpus=gpus.usable(),  # Ray would query NVML, which may be missing where PyTorch works
                        include_dashboard=False,
                        log_to_driver=False,
                        logging_level=logging.ERROR,
                        object_store_memory=256 * 2**20,
                        _temp_dir=str(folder / "r"),  # which Ray opens to all users
                    )
            except SystemExit:  # Ray turns a SIGTERM during ray.init into this
                terminate(signal.SIGTERM, None)
                raise
            stack.enter_context(_ending_with_the_head())
        signal.signal(signal.SIGTERM, terminate)  # ray.init installed its own handler
        for name in ("ray", "ray.tune"):  # Watcher logs each failure once, in one line
            logging.getLogger(name).setLevel(logging.CRITICAL)
        yield [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _check_answers(address: str) -> None:
    """Raises BadInput where no cluster answers that ray.init could join."""
    if reason := _why_not(address):
        raise _cannot_join(address, reason)


PROBE_SECONDS = 10.0
PROBE_LIMITS = {"RAY_gcs_rpc_server_connect_timeout_s": "1", "RAY_py_gcs_connect_timeout_s": "4"}  # of Ray


def _why_not(address: str) -> str | None:
    """Why no cluster can be joined at an address; None if one can. ray.init itself would try for minutes."""
    command = [sys.executable, "-P", "-W", "ignore", str(TOP / "harness" / "search" / "probe.py"), address]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            env={**os.environ, **PROBE_LIMITS},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {PROBE_SECONDS:g} s"
    with contextlib.suppress(ValueError, IndexError):
        answer: str | None = json.loads(done.stdout.splitlines()[-1])
        return answer
    return (done.stderr.strip().splitlines() or ["no answer"])[-1]


def _cannot_join(address: str, reason: str) -> BadInput:
    if "token" in reason.lower():
        reason += "; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the file of the cluster's token"
    else:
        reason += "; start a cluster with `ray start --head`, or leave the address (and RAY_ADDRESS) out"
    return BadInput(f"resources.address={address}: {reason}")


@contextlib.contextmanager
def _importing_nothing_from_here(folder: Path) -> Iterator[None]:
    """Call ray.init from an empty folder. Ray's workers import first from the driver's working directory, where a
    user's folder named `export` or `architectures` would shadow this project's packages. Workers on this machine find
    the project by PYTHONPATH."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TOP), *filter(None, [before])])
    try:
        with contextlib.chdir(folder):
            yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _shut_down(terminate: Any) -> None:
    """Shut Ray down with `terminate` as SIGTERM handler. Ray restores the default handler two seconds before it is
    done; a second SIGTERM would then kill this process, so the main thread keeps reinstalling ours (only it may)."""
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(ray.shutdown)
        while not ending.done():
            signal.signal(signal.SIGTERM, terminate)
            time.sleep(0.001)
    signal.signal(signal.SIGTERM, terminate)
    ending.result()


@contextlib.contextmanager
def _ending_with_the_head() -> Iterator[None]:
    """Exit this process if Ray's head process dies: Ray's clients would hang for a minute and then crash.

    Files are written atomically, so all are intact; the guard kills the remaining processes.
    """
    over = threading.Event()
    heads = [child for child in psutil.Process().children() if child.name() == "gcs_server"]

    def watch() -> None:
        while not over.wait(1.0):
            for head in heads:
                if not head.is_running() or head.status() == psutil.STATUS_ZOMBIE:
                    print(
                        "error: Ray's head process died; run the same command again to continue",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder for Ray's files, removed at the end; first removes those that killed processes left."""
    from filelock import FileLock, Timeout

    top = Path("/tmp")  # sockets need short paths
    for left in top.glob("harness-ray-*.lock"):
        with contextlib.suppress(OSError, Timeout):
            if left.lstat().st_uid != os.getuid():
                continue
        with contextlib.suppress(OSError, Timeout), FileLock(left, timeout=0):
            shutil.rmtree(left.with_suffix(""), ignore_errors=True)
            left.unlink(missing_ok=True)
    folder = top / f"harness-ray-{uuid.uuid4().hex[:12]}"
    with FileLock(folder.with_suffix(".lock")) as held:
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            Path(held.lock_file).unlink(missing_ok=True)
