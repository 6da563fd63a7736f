"""requirements.lock: every distribution that the tested platform needs, with its hashes."""

import re
import subprocess
import sys
import sysconfig
import tomllib

import pytest
from conftest import TOP

TEXT = (TOP / "requirements.lock").read_text()
LOCK = "\n".join(line for line in TEXT.splitlines() if not line.startswith("#")).strip()
LOCKED = dict(re.findall(r"^([a-z0-9._-]+)==(\S+)(?: ;.*)? \\$", LOCK, flags=re.MULTILINE))


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_distribution_has_its_hashes():
    blocks = re.split(r"\n(?=\S)", LOCK)
    assert len(blocks) == len(LOCKED) > 80
    for block in blocks:
        assert re.fullmatch(r"\S+==\S+( ;.*)? \\\n( +--hash=sha256:[0-9a-f]{64}( \\\n)?)+", block), block


def test_no_registry_is_named():
    assert not re.search(r"://|--index|--find-links|\bfile:", LOCK)


def test_it_has_the_versions_that_the_tests_run_with():
    pinned = dict(re.findall(r"^(\S+)==(\S+)$", (TOP / "constraints.txt").read_text(), flags=re.MULTILINE))
    assert {name: LOCKED[name] for name in pinned if name in LOCKED} == {n: v for n, v in pinned.items() if n in LOCKED}


def test_it_has_all_that_the_project_depends_on():
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    names = {canonical(re.match(r"[\w.-]+", text)[0]) for text in wanted if "linux" in text or ";" not in text}
    assert names - {"onnxruntime"} <= set(LOCKED)


@pytest.mark.slow
@pytest.mark.skipif(
    sysconfig.get_platform() != "linux-x86_64" or sys.version_info[:2] != (3, 11), reason="of the tested platform"
)
def test_pip_installs_it_with_hashes(tmp_path):
    """Downloads every file and compares its hash, as an installation would; unpacks none."""
    words = ["install", "--dry-run", "--ignore-installed", "--no-deps", "--require-hashes", "-q"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words, "-r", str(TOP / "requirements.lock")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
