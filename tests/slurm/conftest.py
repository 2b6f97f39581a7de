import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, local_cluster, reason_to_skip


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    reason = reason_to_skip()
    if reason:
        pytest.skip(reason)
    # munge wants every folder above its socket to be open to all, which pytest's own are not
    with tempfile.TemporaryDirectory(prefix="mtp-slurm-") as folder:
        Path(folder).chmod(0o755)
        with local_cluster(Path(folder) / "cluster") as found:
            yield found
