"""The order of a free-running run, whole columns at a time.

Where nobody waits, no shard queues and nobody fails, each replica's times are a running
sum of its own draws, and who takes which ticket is one sort of all turns. A turn is
what a replica does between two minibatches: push, take a ticket, fetch. Letters: `R`
replicas, `S` shards, `N` turns, with the joins.
"""

from typing import Any, NamedTuple

import numpy as np

from dbjax.cluster import Cluster, Constant
from dbjax.trace import COMPUTE, FETCH, JOIN, LEAVE, PUSH


class Run(NamedTuple):
    """What is simulated.

    Attributes:
      cluster: how long everything takes; no shard queues and nobody fails.
      seed: seed of its draws.
      replicas: `R`.
      steps: minibatches processed by all replicas together.
      n_fetch: minibatches between a replica's fetches.
      n_push: minibatches between its pushes.
      warmstart_steps: steps that replica 0 takes alone.
      shard_bytes: `[S]` the size of each shard.
    """

    cluster: Cluster
    seed: int
    replicas: int
    steps: int
    n_fetch: int
    n_push: int
    warmstart_steps: int
    shard_bytes: tuple[int, ...]

    @property
    def shards(self) -> int:
        """The number of shards."""
        return len(self.shard_bytes)

    @property
    def transfer(self) -> np.ndarray:
        """Seconds that each shard's parameters, or gradients, need on a link: `[S]`."""
        return np.array([self.cluster.transfer_time(b) for b in self.shard_bytes])

    @property
    def instant(self) -> bool:
        """Whether messages take no time."""
        return self.cluster.latency == Constant(0.0) and not self.transfer.any()


class Turns(NamedTuple):
    """All turns, replica by replica: each one's join, then its turns 0, 1, 2, ...

    Attributes:
      offset: `[R]` where the replica's join stands; turn `j` is at `offset + 1 + j`.
      replica: `[N]`.
      time: `[N]`.
      begins: `[N]` when the computing after that turn begins.
    """

    offset: np.ndarray
    replica: np.ndarray
    time: np.ndarray
    begins: np.ndarray


def order(run: Run) -> dict[str, Any] | None:
    """Give the columns of the Trace in their final order.

    Args:
      run: what is simulated.

    Returns:
      Columns for `Trace.from_columns`; None where a push would be overtaken by a later
      message of its replica on the same link, which this way of counting cannot tell.
    """
    turns = _turns(run)
    sequence = np.argsort(turns.time, kind="stable")  # equal times: by replica, by turn
    turns, sequence, ticket = _give_tickets(run, turns, sequence)
    acts = _acts(run, turns, sequence, ticket)
    handled = _handle(run, turns, sequence, acts)
    if handled is None:
        return None
    columns = _rows(run, turns, sequence, ticket, acts, *handled)
    if run.instant:
        return columns  # the rows of a turn have its time, so they are sorted already
    final = np.argsort(columns["time"], kind="stable")
    return {name: values[final] for name, values in columns.items()}


def _paths(
    run: Run, ids: np.ndarray, first: int, count: int, time: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Follow replicas `ids` `[A]`, at turn `first` at `time`, for `count` turns more.

    Returns:
      Times of turns `first` to `first + count`, and when the computing after each
      begins (the last one's is not known yet), both `[A, count + 1]`.
    """
    compute = run.cluster.compute_times(run.seed, ids, first, count)
    # A running sum adds in order, so each time is rounded as if it were alone.
    if run.instant:
        times = np.empty((len(ids), count + 1))
        times[:, 0] = time
        times[:, 1:] = compute
        np.cumsum(times, axis=1, out=times)
        return times, times
    moments = np.zeros((len(ids), 2 * count + 2))
    moments[:, 0] = time
    moments[:, 1:-1:2] = _round_trips(run, ids, first, count)
    moments[:, 2::2] = compute
    np.cumsum(moments[:, :-1], axis=1, out=moments[:, :-1])
    return moments[:, ::2], moments[:, 1::2]


def _round_trips(run: Run, ids: np.ndarray, first: int, count: int) -> np.ndarray:
    """Give the seconds that turns wait for their fetch, 0 without one: `[A, count]`."""
    turn = np.arange(first, first + count)
    there, back = (
        run.cluster.latencies(run.seed, ids, first, count, run.shards, direction)
        for direction in (0, 1)
    )
    pushes = (turn > 0) & (turn % run.n_push == 0)
    there = there + np.where(pushes[:, None], run.transfer, 0.0)
    trips = there + (back + run.transfer)
    return np.where(turn % run.n_fetch == 0, trips.max(axis=2), 0.0)


def _starts(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Give when each replica joins, and when it may begin, both `[R]`."""
    join = run.cluster.join_times(run.seed, np.arange(run.replicas))
    alone = min(run.warmstart_steps, run.steps)
    if not alone:
        return join, join
    warm = _paths(run, np.zeros(1, np.int64), 0, alone, join[:1])[0][0, -1]
    start = np.maximum(join, warm)
    start[0] = join[0]
    return join, start


def _turns(run: Run) -> Turns:
    """Give every turn that may take a ticket, and for each replica one turn more."""
    join, last = _starts(run)
    limit = np.inf
    ids, known, blocks = np.arange(run.replicas), 0, []
    share = -(-run.steps // run.replicas)
    block = share + int(share**0.5) + 2
    while ids.size:
        times, begins = _paths(run, ids, known, block, last)
        blocks.append((ids, known, times, begins))
        # Turns later than this one take no ticket. It only moves earlier, as replicas
        # that have not passed it are followed further.
        limit = _ticket_limit(run, blocks)
        known += block
        late = times[:, -1] <= limit
        pace = (times[:, -1] - times[:, 0])[late] / block
        ids, last = ids[late], times[late, -1]
        with np.errstate(divide="ignore", invalid="ignore"):
            ahead = np.nan_to_num((limit - last) / pace).max(initial=0.0)
        block = int(min(1.1 * min(ahead, run.steps) + 2, known, run.steps + 1))
    return _flatten(run, join, blocks, limit)


def _ticket_limit(run: Run, blocks: list) -> float:
    """Give the time of the turn that takes the last ticket, of the turns known."""
    # The last turn of a block is the first of the replica's next one.
    times = [times[:, :-1].ravel() for *_, times, _ in blocks]
    if sum(map(len, times)) < run.steps:
        return np.inf
    every = np.concatenate(times)
    return float(np.partition(every, run.steps - 1)[run.steps - 1])


def _flatten(run: Run, join: np.ndarray, blocks: list, limit: float) -> Turns:
    """Lay the turns up to the limit, and one more, out replica by replica."""
    upto = np.zeros(run.replicas, np.int64)
    for ids, _, times, _ in blocks:
        upto[ids] += (times[:, :-1] <= limit).sum(axis=1)
    lengths = upto + 2
    offset = np.cumsum(lengths) - lengths
    replica = np.repeat(np.arange(run.replicas, dtype=np.int32), lengths)
    time = np.empty(len(replica))
    begins = time if run.instant else np.empty(len(replica))
    time[offset] = join
    for ids, first, times, starts in blocks:
        turn = np.arange(first, first + times.shape[1])
        keep = turn <= upto[ids, None]
        place = (turn + (offset[ids, None] + 1))[keep]
        time[place] = times[keep]
        if not run.instant:
            begins[place] = starts[keep]
    return Turns(offset, replica, time, begins)


def _give_tickets(
    run: Run, turns: Turns, sequence: np.ndarray
) -> tuple[Turns, np.ndarray, np.ndarray]:
    """Give each turn its ticket; each replica's first refused turn is its last.

    Args:
      run: what is simulated.
      turns: all turns.
      sequence: `[N]` the turns in the order in which they happen.

    Returns:
      The turns that remain, their sequence, and in that sequence the tickets `[N]`; -1
      for a join or a refused turn.
    """
    joins = np.zeros(len(sequence), bool)
    joins[turns.offset] = True
    taken = ~joins[sequence]
    ticket = np.cumsum(taken) - 1
    taken &= ticket < run.steps
    ticket[~taken] = -1
    granted = np.bincount(turns.replica[sequence[taken]], minlength=run.replicas)
    place = np.arange(len(sequence)) - turns.offset[turns.replica]
    keep = place <= granted[turns.replica] + 1
    if keep.all():
        return turns, sequence, ticket
    # Turns at the very time of the last ticket: only here is there more to drop.
    number, kept = np.cumsum(keep) - 1, keep[sequence]
    lengths = granted + 2
    turns = Turns(np.cumsum(lengths) - lengths, *(values[keep] for values in turns[1:]))
    return turns, number[sequence[kept]], ticket[kept]


class Acts(NamedTuple):
    """What happens at each turn, all `[N]` in sequence.

    Attributes:
      turn: minibatches that the replica has finished; -1 for the join.
      count: gradients pushed, 0: no push.
      fetches: whether it fetches.
      stops: whether its ticket is refused.
    """

    turn: np.ndarray
    count: np.ndarray
    fetches: np.ndarray
    stops: np.ndarray


def _acts(run: Run, turns: Turns, sequence: np.ndarray, ticket: np.ndarray) -> Acts:
    turn = sequence - turns.offset[turns.replica[sequence]] - 1
    stops = (ticket < 0) & (turn >= 0)
    window = turn % run.n_push
    count = np.where(stops, window, 0)
    count[(window == 0) & (turn > 0)] = run.n_push
    fetches = (ticket >= 0) & (turn % run.n_fetch == 0)
    return Acts(turn, count, fetches, stops)


def _handle(
    run: Run, turns: Turns, sequence: np.ndarray, acts: Acts
) -> tuple[np.ndarray, np.ndarray] | None:
    """Let the shards handle the messages of all turns.

    Returns:
      When the turn's message arrived, `[N, S]`, and the shard's version then, `[N, S]`,
      both in sequence and meaningless at turns that send none; None if a message
      overtook another. Where messages take no time, one column stands for all shards.
    """
    pushes = acts.count > 0
    time = turns.time[sequence]
    if run.instant:
        return time[:, None], np.cumsum(pushes)[:, None]
    sends = pushes | acts.fetches
    there = _latencies_there(run, turns)[sequence[sends]]
    there = there + np.where(pushes[sends, None], run.transfer, 0.0)
    arrival = np.empty((len(time), run.shards))
    arrival[sends] = time[sends, None] + there
    if _overtakes(turns, sequence, sends, arrival):
        return None
    version = np.zeros(arrival.shape, np.int64)
    senders = np.flatnonzero(sends)
    for shard in range(run.shards):
        queue = senders[np.argsort(arrival[senders, shard], kind="stable")]
        version[queue, shard] = np.cumsum(pushes[queue])
    return arrival, version


def _latencies_there(run: Run, turns: Turns) -> np.ndarray:
    """Give each turn's latency to the shards, `[N, S]`."""
    if isinstance(run.cluster.latency, Constant):
        shape = len(turns.time), run.shards
        return np.broadcast_to(run.cluster.latency.mean, shape)
    lengths = np.diff(turns.offset, append=len(turns.time))
    latency = np.zeros((len(turns.time), run.shards))
    # Replicas with about equally many turns are drawn for together.
    ordered = np.argsort(lengths, kind="stable")
    begin = 0
    while begin < run.replicas:
        most = 1.25 * lengths[ordered[begin]] + 8
        end = int(np.searchsorted(lengths[ordered], most, side="right"))
        ids = np.sort(ordered[begin:end])
        count = int(lengths[ids].max()) - 1
        draws = run.cluster.latencies(run.seed, ids, 0, count, run.shards, 0)
        keep = np.arange(count) < lengths[ids, None] - 1
        place = turns.offset[ids, None] + 1 + np.arange(count)
        latency[place[keep]] = draws[keep]
        begin = end
    return latency


def _overtakes(
    turns: Turns, sequence: np.ndarray, sends: np.ndarray, arrival: np.ndarray
) -> bool:
    """Say whether a message arrives before an earlier one of its replica."""
    place = np.empty_like(sequence)
    place[sequence] = np.arange(len(sequence))
    place = place[sends[place]]  # the messages, replica by replica
    owner = turns.replica[sequence[place]]
    earlier = np.diff(arrival[place], axis=0) < 0
    return bool((earlier.any(axis=1) & (owner[1:] == owner[:-1])).any())


def _bases(
    run: Run, turns: Turns, sequence: np.ndarray, acts: Acts, version: np.ndarray
) -> np.ndarray:
    """Give the versions each push's oldest gradient was computed on, `[pushes, S]`."""
    pushes = np.flatnonzero(acts.count)
    oldest = acts.turn[pushes] - acts.count[pushes]
    fetched_at = oldest - oldest % run.n_fetch
    by_replica = np.empty_like(version)
    by_replica[sequence] = version
    return by_replica[turns.offset[turns.replica[sequence[pushes]]] + 1 + fetched_at]


def _rows(
    run: Run,
    turns: Turns,
    sequence: np.ndarray,
    ticket: np.ndarray,
    acts: Acts,
    arrival: np.ndarray,
    version: np.ndarray,
) -> dict[str, np.ndarray]:
    """Write the rows of all turns, in sequence."""
    shards = np.arange(run.shards)
    computes, pushes = acts.turn > 0, acts.count > 0
    joins = 1 * (acts.turn < 0)
    length = joins + computes + acts.stops + run.shards * (1 * pushes + acts.fetches)
    end = np.cumsum(length)
    first = end - length
    rows = int(end[-1])
    columns = {
        "kind": np.full(rows, JOIN, np.uint8),
        "time": np.repeat(turns.time[sequence], length),
        "replica": np.repeat(turns.replica[sequence], length),
    }
    columns["start"] = columns["time"].copy()
    for name in ("shard", "step", "batch", "version", "base", "id"):
        columns[name] = np.full(rows, -1, np.int32 if name == "shard" else np.int64)
    columns["count"] = np.zeros(rows, np.int32)
    columns["bytes"] = np.zeros(rows, np.int64)

    def write(at: np.ndarray, **values: Any) -> None:
        for name, value in values.items():
            columns[name][at] = value

    by_replica = np.empty_like(ticket)
    by_replica[sequence] = ticket
    before = sequence[computes] - 1  # a turn's minibatch was begun at the turn before
    write(
        first[computes],
        kind=COMPUTE,
        start=turns.begins[before],
        step=by_replica[before],
        batch=acts.turn[computes] - 1,
    )
    write(
        (first + computes)[pushes, None] + shards,
        kind=PUSH,
        time=arrival[pushes],
        start=arrival[pushes],
        shard=shards,
        step=by_replica[sequence[pushes] - 1][:, None],
        version=version[pushes],
        base=_bases(run, turns, sequence, acts, version),
        count=acts.count[pushes, None],
        bytes=run.shard_bytes,
        id=((acts.turn[pushes] - 1) // run.n_push)[:, None],
    )
    fetches = acts.fetches
    write(
        (first + computes + run.shards * pushes)[fetches, None] + shards,
        kind=FETCH,
        time=turns.begins[sequence[fetches], None],
        shard=shards,
        step=ticket[fetches, None],
        version=version[fetches],
        bytes=run.shard_bytes,
    )
    write(end[acts.stops] - 1, kind=LEAVE)
    if not run.instant:
        # A replica leaves when its last push has been handled.
        last = acts.stops & pushes
        handled = arrival[last].max(axis=1)
        write(end[last] - 1, time=handled, start=handled)
    return columns
