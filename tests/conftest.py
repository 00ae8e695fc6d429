import os
import re
import signal

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

# Both are read at the first use of a device, so they must stand before any test's.
# XLA's pool of CPU threads takes its size from NPROC; a small pool can deadlock where
# several devices talk to each other.
os.environ["NPROC"] = str(max(64, int(os.environ.get("NPROC") or 0)))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# A script's background job is deaf to Ctrl-C, which some tests press.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

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
def programs(tmp_path_factory):
    """A folder of this process's own: entries are not written at one stroke."""
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return str(tmp_path_factory.mktemp("programs"))


@pytest.fixture(autouse=True)
def kept_programs(request, programs):
    """What is compiled is kept on disk, and an equal program is not compiled again.

    Each run makes its functions anew: within a process nothing else says that two of
    them are the same. Not on Ray: its processes take the folder over, and are to come
    to the driver's bits by a program that each has compiled for itself.
    """
    folder = None if request.node.get_closest_marker("ray") else programs
    if jax.config.jax_compilation_cache_dir != folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()  # it reads the settings at its first use only


@pytest.fixture(scope="module", autouse=True)
def plain_code(request):
    """Modules that ask for it are compiled without what takes LLVM the most time.

    They compare with a tolerance. What is equal to the bit is tested as users have it.
    """
    if not getattr(request.module, "PLAIN_CODE", False):
        yield
        return
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


@pytest.fixture(scope="session")
def ray_cluster():
    """Ray on this machine, with processes that go from one test to the next."""
    pytest.importorskip("ray")
    import dbjax

    with dbjax.Ray(digest_every=5, timeout=60) as ray:
        yield ray
