"""Compiled programs of a script are kept on disk: the next run does without."""

import pathlib

import jax


def keep_programs(folder: pathlib.Path) -> None:
    """Keep compiled programs, unless somebody else does."""
    if not jax.config.values.get("jax_compilation_cache_dir"):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
