import os

import pytest

# Both are read at the first use of a device, so they must stand before any test's.
# XLA's pool of CPU threads takes its size from NPROC; a small pool can deadlock where
# several devices talk to each other.
os.environ["NPROC"] = str(max(64, int(os.environ.get("NPROC") or 0)))
os.environ.setdefault("JAX_PLATFORMS", "cpu")


@pytest.fixture(scope="session")
def ray_cluster():
    """Ray on this machine, with processes that go from one test to the next."""
    pytest.importorskip("ray")
    import dbjax

    with dbjax.Ray(digest_every=5, timeout=60) as ray:
        yield ray
