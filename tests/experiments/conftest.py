"""Programs that several experiments compile alike are compiled once, and kept on disk.

Each call of an experiment makes its workload, and so its functions, anew: within a
process nothing else says that two of them are the same program.
"""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

KEPT = {
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@pytest.fixture(scope="package", autouse=True)
def programs(tmp_path_factory):
    """A folder of this process's own: entries are not written at one stroke."""
    kept = KEPT | {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs"))
    }
    before = {name: getattr(jax.config, name) for name in kept}
    for settings in (kept, before):
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # it reads them at its first use only
        if settings is kept:
            yield
