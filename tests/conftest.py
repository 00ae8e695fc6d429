import os

# Both are read at the first use of a device, so they must stand before any test's.
# XLA's pool of CPU threads takes its size from NPROC; a small pool can deadlock where
# several devices talk to each other.
os.environ["NPROC"] = str(max(64, int(os.environ.get("NPROC") or 0)))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
