"""Replicas on Ray, each cut over two devices of its own process."""

import numpy as np
from jax.sharding import PartitionSpec

import dbjax
from tests import problems


def main() -> None:
    """Train, replay, and say so."""
    keywords = {
        "optimizer": problems.ADAGRAD,
        "mesh": dbjax.make_mesh(model=2),
        "rules": [("w", PartitionSpec(None, "model"))],
    }
    problem = problems.loss_fn, problems.PARAMS, problems.DATA
    run = dbjax.downpour.train(
        *problem, replicas=2, shards=2, steps=16, runtime=dbjax.Ray(digest_every=1),
        **keywords,
    )  # fmt: skip
    run.trace.validate()
    assert run.trace.header["mesh"] == {"model": 2}
    assert np.all(run.trace.bytes[run.trace.shard >= 0] > 0)
    again = dbjax.replay(run.trace, *problem, verify=True, **keywords)
    problems.assert_same_bits(again.params, run.params)
    print("replays")


if __name__ == "__main__":
    main()
