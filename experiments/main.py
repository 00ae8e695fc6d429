"""The command line: flags in, `train_and_evaluate` out.

python -m experiments.main --config=configs/digits_downpour.py --workdir=runs/digits
"""

import os
import pathlib
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from experiments import dry_run, meshes, registry, train

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The run, a file in configs/.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where everything is written.")
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Say what memory and time the run would need, and stop."
)


def main(argv: Sequence[str]) -> None:
    """Run what the flags ask for."""
    if len(argv) > 1:
        raise app.UsageError(f"what is {argv[1]!r}? There are only flags.")
    _check_file(config_flags.get_config_filename(flags.FLAGS["config"]))
    config, workdir = _CONFIG.value, _WORKDIR.value
    if config is None or not (workdir or _DRY_RUN.value):
        raise app.UsageError("--config and --workdir (or --dry_run) are needed.")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    if flags.FLAGS.verbosity == logging.INFO:  # absl's default; orbax says a lot then
        logging.set_verbosity(logging.WARNING)
    try:
        meshes.make_devices(config)
        if _DRY_RUN.value or not workdir:
            dry_run.show(config)
        else:
            train.train_and_evaluate(config, workdir)
    except registry.ConfigError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on from the last checkpoint")


def _check_file(path: str | None) -> None:
    """Leave with a clear error if the config's file is not there."""
    path = (path or "").partition(":")[0]
    if path and not os.path.exists(path):
        known = [str(file) for file in pathlib.Path("configs").glob("[!_]*.py")]
        hint = f"; did you mean {registry.nearest(path, known)!r}?" if known else ""
        sys.exit(f"error: there is no {path!r}{hint}")


def parse(argv: Sequence[str]) -> list[str]:
    """Parse the flags; an override of a key that does not exist names the nearest."""
    try:
        return app.parse_flags_with_usage(list(argv))
    except (AttributeError, KeyError, OSError):
        _explain(list(argv))
        raise


def _explain(argv: list[str]) -> None:
    """Leave with a clear error if there is no such file, or no such key in it."""
    paths = [word.partition("=")[2] for word in argv if re.match("--?config=", word)]
    after = zip(argv, argv[1:], strict=False)
    paths += [path for word, path in after if re.fullmatch("--?config", word)]
    keys = [word for word in argv if re.match(r"--?config\.", word)]
    for path in paths:
        _check_file(path)
        config: Any = flags.FLAGS["config"].parser.parse(path)
        known = list(registry.flatten(config.to_dict()))
        for key in (word.partition(".")[2].partition("=")[0] for word in keys):
            if key not in known:
                sys.exit(
                    f"error: {path} has no key {key!r}; did you mean "
                    f"{registry.nearest(key, known)!r}?"
                )


def run() -> None:
    """Start, from the command line."""
    app.run(main, flags_parser=parse)


if __name__ == "__main__":
    run()
