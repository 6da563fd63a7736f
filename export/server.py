"""python -m export.server: serves exported files in a process of its own: a runtime's crash or hang ends it alone."""

import sys

from export.artifact_server import ArtifactServer
from harness.run.child import serve

if __name__ == "__main__":
    sys.exit(serve(ArtifactServer()))
