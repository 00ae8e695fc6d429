"""Runs on Ray: processes, on this machine or many. The only file that imports ray."""

import abc
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any, NamedTuple

import jax

from dbjax.runtime.group import Group, World
from dbjax.runtime.lanes import cores
from dbjax.runtime.line import LONGEST, Elsewhere, listen
from dbjax.runtime.neighbours import Published, neighbours
from dbjax.runtime.remote import Progress
from dbjax.runtime.transport import SIDE, WORK, Gone, Late, Reply

_LANES = {WORK: 1, SIDE: 8}  # threads
_QUICK = frozenset({"push", "fetch", "repeat"})
"""What is asked for each minibatch, over a line where there is one.

A fetch may be carried out twice: its answer may have to come by Ray.
"""
_LINE_TIMEOUT = 60.0
_CONFIG = (
    "jax_enable_x64",
    "jax_platforms",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)
"""What a process takes over from the one that starts it, so that both compute alike."""
_GROUPED = {
    "jax_cpu_collectives_implementation": "gloo",
    "jax_enable_preemption_service": False,  # we end processes ourselves
}
_LEAST = {"digest_every": 0, "snapshot_every": 1, "replica_processes": 1}


@dataclasses.dataclass(frozen=True)
class Ray:
    """Run replicas and shards as processes, on this machine or a cluster.

    As a context manager it stays connected, and keeps processes for the next run.

    Attributes:
      address: "local" starts a cluster on this machine and stops it at the end; any
        other address, such as "auto" or "10.0.0.1:6379", joins one that runs. A
        process that is connected to Ray already keeps to that.
      standby: 1: every push is handled by two processes before it is acknowledged, so
        that a shard may die and nothing acknowledged is lost.
      snapshot_every: without standby, minibatches between the copies from which a shard
        that died is restored; a tenth of the run by default.
      digest_every: every so many versions a shard's parameters are checksummed into the
        Trace; 0 for never.
      replicas_at: `replicas_at(step)`, how many replicas are wanted once `step`
        minibatches are finished, at most the run's `replicas`: they join and leave.
      watch: called with a `Progress` every `watch_every` seconds, in another thread.
      watch_every: seconds.
      replica_processes: over how many processes, perhaps on several machines, the
        devices of a replica are spread evenly; `mesh=` says how many these are.
      replica_cpus: CPUs that Ray sets aside for each replica's process; on a cluster of
        our own none, else 1.
      shard_cpus: the same for each shard.
      replica_gpus: GPUs for each replica's process.
      runtime_env: Ray's, say `{"working_dir": "."}` to send your own modules along.
      timeout: seconds until a process that does not answer is an error.

    >>> Ray(standby=1).address
    'local'
    """

    address: str = "local"
    standby: int = 0
    snapshot_every: int | None = None
    digest_every: int = 100
    replicas_at: Callable[[int], int] | None = None
    watch: Callable[[Progress], None] | None = None
    watch_every: float = 1.0
    replica_processes: int = 1
    replica_cpus: float | None = None
    shard_cpus: float | None = None
    replica_gpus: float = 0.0
    runtime_env: dict[str, Any] | None = None
    timeout: float = 120.0
    _kept: list["Session"] = dataclasses.field(
        default_factory=list, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not isinstance(self.address, str) or not self.address:
            raise ValueError(
                f'address must be "local", "auto" or host:port, got {self.address!r}'
            )
        if self.standby not in (0, 1):
            raise ValueError(f"standby must be 0 or 1, got {self.standby!r}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if (name, value) == ("snapshot_every", None):
                continue
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be at least {least}, got {value!r}")
        for name in ("replica_cpus", "shard_cpus", "replica_gpus"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be at least 0, got {value!r}")
        for name in ("timeout", "watch_every"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} must be above 0 seconds, got {getattr(self, name)}"
                )

    def __enter__(self) -> "Ray":
        """Connect, or start a cluster, and keep it for several runs."""
        self._kept.append(Session(self))
        return self

    def __exit__(self, *error: object) -> None:
        """Let all processes go, and stop what was started."""
        self._kept.pop().close()

    @contextlib.contextmanager
    def session(self) -> Iterator["Session"]:
        """Give the connection that is kept, or one for the time being."""
        if self._kept:
            yield self._kept[-1]
            return
        session = Session(self)
        try:
            yield session
        finally:
            session.close()


class Session:
    """A connection to a cluster: a `Transport`.

    Args:
      settings: how to connect.

    Raises:
      ModuleNotFoundError: Ray is not installed.
      ConnectionError: nobody answers at the address, or with another version.
    """

    def __init__(self, settings: Ray) -> None:
        self.settings = settings
        ray = _ray()
        self._own = not ray.is_initialized()
        self._local = settings.address == "local" and self._own
        if self._own:
            _connect(settings)
        elif settings.runtime_env is not None:
            raise ValueError(
                "runtime_env belongs to the connection, and this process is connected "
                "to Ray already: give it to ray.init"
            )
        self._idle: dict[Any, list[_Address]] = {}
        self._keys: dict[_Address, Any] = {}
        self._followers: dict[_Address, list[_Address]] = {}

    def close(self) -> None:
        """End the processes that are left, and what was started for this session."""
        ray = _ray()
        for address in [*self._keys, *sum(self._idle.values(), [])]:
            self.kill(address)
        neighbours().forget()
        if self._own:
            ray.shutdown()

    def check_room(self, replicas: int, shards: int) -> None:
        """Raise where the cluster is too small for so many processes at once.

        Raises:
          ValueError: says what is missing.
        """
        have = _ray().cluster_resources()
        wanted = {"CPU": 0.0, "GPU": 0.0}
        processes = replicas * self.settings.replica_processes
        for kind, count in (("replica", processes), ("shard", shards)):
            cpus, gpus = self._needs(kind)
            wanted["CPU"] += count * cpus
            wanted["GPU"] += count * gpus
        for name, want in wanted.items():
            if want > have.get(name, 0.0):
                raise ValueError(
                    f"{replicas} replicas and {shards} shards (with standbys) need "
                    f"{want:g} {name}s, the cluster has {have.get(name, 0.0):g}: "
                    f"{want - have.get(name, 0.0):g} are missing; add machines, or "
                    "lower replica_cpus, shard_cpus or replica_gpus"
                )

    def share(self, what: str, value: Any, keyed: bool = False) -> "_Shared":
        """See `Transport.share`."""
        return share(what, value, keyed)

    @property
    def share_there(self) -> Callable[[str, Any], Published]:
        """See `Transport.share_there`."""
        return _publish

    def host(
        self,
        name: str,
        make: Callable[[], Any],
        *,
        kind: str = "replica",
        devices: int = 1,
        away_from: Any = None,
        processes: int = 1,
    ) -> tuple["_Address", Reply]:
        """See `Transport.host`."""
        if processes > 1:
            return self._host_group(name, make, kind, devices // processes, processes)
        key = kind, devices, _config(devices)
        idle = self._idle.get(key, []) if away_from is None else []
        address = None
        while idle and address is None:
            with contextlib.suppress(Gone, Late):  # it may have died meanwhile
                kept = idle.pop()._replace(name=name)
                kept.ask("pid", lane=SIDE).result(self.settings.timeout)
                address = kept
        if address is None:
            address = _Address(name, self._start(kind, devices, away_from))
        self._keys[address] = key
        return address, address.ask("", make, _versions())

    def end(self, address: "_Address") -> None:
        """See `Transport.end`; the process is kept for the next one."""
        if address not in self._keys:
            return
        # Those of a group cannot leave the world they are in.
        if not self.settings._kept or address in self._followers:
            self.kill(address)
            return
        address.ask("rest", lane=SIDE)
        self._idle.setdefault(self._keys.pop(address), []).append(address)

    def kill(self, address: "_Address") -> None:
        """See `Transport.kill`."""
        self._keys.pop(address, None)
        # The leader last: followers that miss it first would fail with much noise.
        for one in (*self._followers.pop(address, ()), address):
            with contextlib.suppress(Exception):
                _ray().kill(one.handle)

    def _host_group(
        self, name: str, make: Any, kind: str, devices: int, processes: int
    ) -> tuple["_Address", Reply]:
        """Start a leader and its followers, each with so many devices."""
        names = [name, *(f"{name}, process {i}" for i in range(1, processes))]
        group = [
            _Address(each, self._start(kind, devices, None, grouped=True))
            for each in names
        ]
        leader, *followers = group
        self._keys[leader], self._followers[leader] = None, followers
        # In half the time, so that who is late is heard of and not killed for silence.
        half = self.settings.timeout / 2
        return leader, leader.ask("", make, _versions(), followers, half)

    def _needs(self, kind: str) -> tuple[float, float]:
        s, usual = self.settings, 0.0 if self._local else 1.0
        cpus = s.replica_cpus if kind == "replica" else s.shard_cpus
        gpus = s.replica_gpus if kind == "replica" else 0.0
        return usual if cpus is None else cpus, gpus

    def _start(
        self, kind: str, devices: int, away_from: Any, grouped: bool = False
    ) -> Any:
        cpus, gpus = self._needs(kind)
        env = {}
        if devices > 1 or grouped:
            # XLA's pool must have a thread a device, or collectives can hang.
            env["env_vars"] = {"NPROC": str(max(64, 8 * devices))}
        options = {
            "num_cpus": cpus,
            "num_gpus": gpus,
            "max_restarts": 0,
            "scheduling_strategy": _where(kind, away_from, cpus),
            **({"runtime_env": env} if env else {}),
        }
        return _host_class().options(**options).remote(_config(devices, grouped))


class _Address(NamedTuple):
    """The actor that hosts an object; see `Address`."""

    name: str
    handle: Any

    def ask(self, method: str, *args: Any, lane: str = WORK) -> "_Answer":
        """See `Address.ask`."""
        what = f"{self.name} ({method or 'start'})"
        near, other = neighbours(), self.handle._actor_id
        try:
            if not method:  # what it makes may come from a script: Ray pickles it
                wire: Any = near.greet(other), args
            else:
                wire = near.pack(near.greet(other), args, near.reader(other))
            with near.way(other).lock:
                if method in _QUICK and isinstance(wire, bytes):
                    answer = self._over_line(method, wire, lane)
                    if answer is not None:
                        again = functools.partial(self._by_ray, method, wire, lane)
                        return _Quick(what, other, answer, again)
                return _Reply(what, self._by_ray(method, wire, lane), other)
        except (TypeError, AttributeError, RecursionError) as error:
            raise _cannot_be_sent(what, error) from error
        except Exception as error:
            raise _store_error(what, error) from error

    def _by_ray(self, method: str, wire: Any, lane: str) -> Any:
        near, other = neighbours(), self.handle._actor_id
        if lane == SIDE:
            return self.handle.side.remote(method, wire)
        way = near.way(other)
        with way.lock:
            way.wait_for_line(_LINE_TIMEOUT)
            ref = self.handle.work.remote(method, wire)
            way.last_by_ray = None if near.is_far(other) else ref
        return ref

    def _over_line(
        self, method: str, wire: bytes, lane: str
    ) -> concurrent.futures.Future[bytes] | None:
        """Call it so if that can be; what Ray carries on `WORK` comes first."""
        near, other = neighbours(), self.handle._actor_id
        line, way = near.line(other), near.way(other)
        if line is None or len(wire) > LONGEST:
            return None
        if lane == SIDE:
            return line.call(lane, method, wire)
        if way.last_by_ray is not None:
            if not _ray().wait([way.last_by_ray], timeout=0)[0]:
                return None
            way.last_by_ray = None
        answer = line.call(lane, method, wire)
        way.sent(answer)
        return answer


class _Answer(abc.ABC):
    """See `Reply`; `other`: whom was asked, None if it is Ray's store."""

    def __init__(self, what: str, other: Any) -> None:
        self._what, self._other = what, other
        self._lock = threading.Lock()

    def result(self, timeout: float | None = None) -> Any:
        """See `Reply.result`."""
        answer = self._get(timeout)
        if self._other is None:
            return answer
        with self._lock:  # what was lent is opened once
            if not hasattr(self, "_value"):
                near = neighbours()
                greeting, self._value = near.unpack(answer)
                near.hear(self._other, greeting)
        return self._value

    def then(self, call: Callable[["_Answer"], None]) -> None:
        """See `Reply.then`."""
        self._future().add_done_callback(lambda _: call(self))

    @abc.abstractmethod
    def _get(self, timeout: float | None) -> Any:
        """Wait for what was sent."""

    @abc.abstractmethod
    def _future(self) -> Any:
        """What calls back when that is there."""


class _Reply(_Answer):
    """One that comes by Ray."""

    def __init__(self, what: str, ref: Any, other: Any = None) -> None:
        super().__init__(what, other)
        self._ref = ref

    def _get(self, timeout: float | None) -> Any:
        ray = _ray()
        errors = ray.exceptions
        try:
            return ray.get(self._ref, timeout=timeout)
        except errors.GetTimeoutError:
            raise Late(f"{self._what} has not answered for {timeout:g} s") from None
        except errors.RayTaskError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, Exception) and not isinstance(cause, errors.RayError):
                raise cause from None
            raise RuntimeError(f"{self._what} failed: {error}") from None
        except errors.ObjectStoreFullError as error:
            raise _store_error(self._what, error) from error
        except (errors.RayActorError, errors.ObjectLostError) as error:
            raise Gone(f"{self._what}: {error}") from None
        except errors.RaySystemError as error:  # what was sent cannot be unpickled
            raise RuntimeError(f"{self._what} failed: {error}") from None
        except errors.RayError as error:
            raise Gone(f"{self._what}: {error}") from None

    def _future(self) -> Any:
        return self._ref.future()


class _Quick(_Answer):
    """One that comes over a line; `again` asks by Ray instead."""

    def __init__(
        self,
        what: str,
        other: Any,
        answer: concurrent.futures.Future[bytes],
        again: Callable[[], Any],
    ) -> None:
        super().__init__(what, other)
        self._over_line, self._again = answer, functools.cache(again)

    def _get(self, timeout: float | None) -> Any:
        if not concurrent.futures.wait([self._over_line], timeout).done:
            raise Late(f"{self._what} has not answered for {timeout:g} s")
        try:
            return self._over_line.result()
        except Elsewhere:
            return _Reply(self._what, self._again())._get(timeout)

    def _future(self) -> Any:
        return self._over_line


class _Shared:
    """See `Shared`; equal if what was pickled is."""

    def __init__(self, ref: Any, key: str) -> None:
        self._ref, self._key = ref, key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Shared) and other._key == self._key

    def __hash__(self) -> int:
        return hash(self._key)

    def get(self, timeout: float | None = None) -> Any:
        """See `Shared.get`."""
        return _Reply("a shared value", self._ref).result(timeout)


def share(what: str, value: Any, keyed: bool = False) -> _Shared:
    """Put a value where all processes can read it, from any of them.

    Args:
      what: what it is, for errors.
      value: anything that pickles.
      keyed: whether references to equal values are to be equal; it is small then.

    Returns:
      A reference to it.

    Raises:
      TypeError: it cannot be sent.
      MemoryError: it does not fit.
    """
    ray = _ray()
    try:
        pickled = ray.cloudpickle.dumps(value) if keyed else b""
        ref = ray.put(value)
        return _Shared(ref, hashlib.sha256(pickled).hexdigest() if keyed else ref.hex())
    except (TypeError, AttributeError, RecursionError) as error:
        raise _cannot_be_sent(what, error) from error
    except Exception as error:
        raise _store_error(what, error) from error


def _publish(what: str, value: Any) -> Published:
    return Published(what, value, share)


@functools.cache
def _host_class() -> Any:
    """The actor that hosts an object."""
    ray = _ray()

    class Host:
        """A process with one object in it, which may be replaced by another."""

        def __init__(self, config: tuple[tuple[str, Any], ...]) -> None:
            import jax

            for name, value in config:
                jax.config.update(name, value)
            self._object: Any = None
            self._rest = threading.Event()
            self._lanes = {
                lane: concurrent.futures.ThreadPoolExecutor(threads, lane)
                for lane, threads in _LANES.items()
            }
            place = neighbours().memory.place
            if place is not None:
                listen(place, self._over_line, self._lanes)

        @ray.method(concurrency_group=WORK)
        def work(self, method: str, wire: Any) -> Any:
            # One thread works, whichever way it is called.
            return self._lanes[WORK].submit(self._answer, method, wire).result()

        @ray.method(concurrency_group=SIDE)
        def side(self, method: str, wire: Any) -> Any:
            return self._answer(method, wire)

        def _over_line(self, method: str, wire: bytes) -> bytes | None:
            answer = self._answer(method, wire)
            return answer if isinstance(answer, bytes) else None

        def _answer(self, method: str, wire: Any) -> Any:
            near = neighbours()
            greeting, args = near.unpack(wire) if method else wire
            value = self._call(method, *args)
            reader = greeting.place if greeting.reads else None
            return near.pack(near.reply_to(greeting), value, reader)

        def _call(self, method: str, *args: Any) -> Any:
            if not method:
                make, versions, *group = args
                _check_versions(versions)
                self._object = None  # whose memory the next one may need
                if not group:
                    self._object = make()
                elif isinstance(group[0], World):
                    self._object = _follow(make, *group)
                else:
                    self._object = _lead(make, versions, *group)
                return None
            if method == "alive":  # for as long as the process is in use
                self._rest.wait()
                return None
            if method == "rest":  # nobody asks any more whether it is alive
                before, self._rest = self._rest, threading.Event()
                before.set()
                return None
            if method == "node":
                return ray.get_runtime_context().get_node_id()
            if method == "pid":  # for whoever wants to kill it
                return os.getpid()
            return getattr(self._object, method)(*args)

    return ray.remote(concurrency_groups=_LANES)(Host)


def _lead(
    make: Callable[[Group], Any],
    versions: dict[str, str],
    followers: list[_Address],
    timeout: float,
) -> Any:
    """Make a group's object, while its followers make theirs."""
    host = _ray().util.get_node_ip_address()
    with socket.socket() as free:
        free.bind((host, 0))
        coordinator = f"{host}:{free.getsockname()[1]}"
    count = 1 + len(followers)
    world, *others = (World(coordinator, count, index) for index in range(count))
    group = Group(followers)
    asked = [
        follower.ask("", make, versions, other, timeout)
        for follower, other in zip(followers, others, strict=True)
    ]

    def own() -> Any:
        world.join(2 * timeout)
        return make(group)

    try:
        return group.do(own, asked, timeout)
    except Late:
        raise TimeoutError(
            f"the {count} processes of a replica have not met at {coordinator} within "
            f"{timeout:g} s: are there machines for all, and can all reach that one?"
        ) from None


def _follow(make: Callable[[], Any], world: World, timeout: float) -> Any:
    world.join(2 * timeout)
    return make()


def _ray() -> Any:
    try:
        import ray
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "runtime=dbjax.Ray(...) needs Ray: pip install 'dbjax[ray]'"
        ) from None
    return ray


def _connect(settings: Ray) -> None:
    ray = _ray()
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if settings.address == "local":
        options |= {"num_cpus": cores(), "include_dashboard": False}
    if settings.runtime_env is not None:
        options["runtime_env"] = settings.runtime_env
    try:
        with warnings.catch_warnings():
            # Python warns of forks in a process with threads; Ray executes at once.
            warnings.filterwarnings("ignore", r"os\.fork\(\)", RuntimeWarning)
            ray.init(address=settings.address, namespace="dbjax", **options)
    except ConnectionError as error:
        raise ConnectionError(
            f"no Ray cluster answers at address={settings.address!r}: start one with "
            '`ray start --head`, or use address="local"'
        ) from error
    except (RuntimeError, ValueError) as error:
        raise ConnectionError(
            f"the Ray cluster at address={settings.address!r} cannot be joined: {error}"
        ) from error


def _config(devices: int, grouped: bool = False) -> tuple[tuple[str, Any], ...]:
    config = {name: getattr(jax.config, name, None) for name in _CONFIG}
    if grouped:
        config |= {n: v for n, v in _GROUPED.items() if hasattr(jax.config, n)}
    if (devices > 1 or grouped) and jax.default_backend() == "cpu":
        config["jax_num_cpu_devices"] = devices
    return tuple((n, v) for n, v in config.items() if v is not None)


def _where(kind: str, away_from: _Address | None, cpus: float) -> Any:
    """Spread shards and pack replicas; a standby goes to another machine than this."""
    if away_from is not None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        with contextlib.suppress(Gone, Late):  # then anywhere
            here = away_from.ask("node", lane=SIDE).result(5.0)
            for node in _ray().nodes():
                there = node["Alive"] and node["NodeID"] != here
                if there and node["Resources"].get("CPU", 0.0) >= max(cpus, 1.0):
                    return NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)
    return "SPREAD" if kind == "shard" else "DEFAULT"


def _versions() -> dict[str, str]:
    versions = {"Python": ".".join(map(str, sys.version_info[:2]))}
    for name in ("dbjax", "jax", "jaxlib", "numpy", "optax"):
        with contextlib.suppress(metadata.PackageNotFoundError):  # not installed: found
            versions[name] = metadata.version(name)
    return versions


def _check_versions(driver: dict[str, str]) -> None:
    """Raise where this process has other versions than the one that started it."""
    for name, here in _versions().items():
        if here != driver.get(name, here):
            raise RuntimeError(
                f"this node has {name} {here}, the driver has {driver[name]}: all "
                "machines of a run need the same"
            )


def _cannot_be_sent(what: str, error: Exception) -> TypeError:
    lines = [line for line in str(error).splitlines() if "cannot pickle" in line]
    why = lines[0].removeprefix("!!! FAIL serialization: ") if lines else str(error)
    return TypeError(
        f"{what} cannot be sent to another process: {why}. Functions may use modules, "
        "arrays and plain values, but no locks, files or devices"
    )


def _store_error(what: str, error: Exception) -> Exception:
    errors = _ray().exceptions
    full = errors.ObjectStoreFullError, errors.OutOfDiskError
    if isinstance(error, full):
        return MemoryError(
            f"{what}: Ray's object store is full; give it more "
            "(ray start --object-store-memory) or use more shards on more machines"
        )
    if isinstance(error, errors.RayActorError):
        return Gone(f"{what}: {error}")
    return RuntimeError(f"{what} could not be sent: {error!r}")
