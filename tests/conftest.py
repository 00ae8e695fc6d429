import os
import re

import pytest

# Both are read at the first use of a device, so they must stand before any test's.
# XLA's pool of CPU threads takes its size from NPROC; a small pool can deadlock where
# several devices talk to each other.
os.environ["NPROC"] = str(max(64, int(os.environ.get("NPROC") or 0)))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# How tests on Ray are called: those of a file, or with a parameter.
ON_RAY = re.compile(r"ray_test\.py::|[-\[]ray\b")


def pytest_collection_modifyitems(items):
    """Tests on Ray come first, as they wait much while others compute."""
    items.sort(key=lambda item: not ON_RAY.search(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """As `--dist loadfile`, but all tests on Ray go to one process: they share a cluster.

    The marker `xdist_group` cannot say so, as pytest 9.2 and xdist 3.8 ignore it
    (pytest-dev/pytest-xdist, issue 1386).
    """
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return "ray" if ON_RAY.search(nodeid) else super()._split_scope(nodeid)

    return Files(config, log)


@pytest.fixture(scope="session")
def ray_cluster():
    """Ray on this machine, with processes that go from one test to the next."""
    pytest.importorskip("ray")
    import dbjax

    with dbjax.Ray(digest_every=5, timeout=60) as ray:
        yield ray
