"""The command line: flags in, `train_and_evaluate` out.

python -m experiments.main --config=configs/digits_downpour.py --workdir=runs/digits
"""

import re
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from experiments import dry_run, registry, train

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
    config, workdir = _CONFIG.value, _WORKDIR.value
    if config is None or not (workdir or _DRY_RUN.value):
        raise app.UsageError("--config and --workdir (or --dry_run) are needed.")
    if flags.FLAGS.verbosity == logging.INFO:  # absl's default; orbax says a lot then
        logging.set_verbosity(logging.WARNING)
    try:
        if _DRY_RUN.value or not workdir:
            dry_run.show(config)
        else:
            train.train_and_evaluate(config, workdir)
    except registry.ConfigError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on from the last checkpoint")


def parse(argv: Sequence[str]) -> list[str]:
    """Parse the flags; an override of a key that does not exist names the nearest."""
    try:
        return app.parse_flags_with_usage(list(argv))
    except (AttributeError, KeyError):
        _explain(list(argv))
        raise


def _explain(argv: list[str]) -> None:
    """Leave with a clear error if an override is of a key that does not exist."""
    words = [re.fullmatch(r"--?config([.=])([^=]*)(=.*)?", word) for word in argv]
    found = [(word[1], word[2]) for word in words if word]
    for path in (text for sign, text in found if sign == "="):
        config: Any = flags.FLAGS["config"].parser.parse(path)
        known = list(registry.flatten(config.to_dict()))
        for key in (text for sign, text in found if sign == "."):
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
