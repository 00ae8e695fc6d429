"""Ray's part played by threads of this process, whom a test may kill at any message."""

import concurrent.futures
import contextlib
import random
import threading

import cloudpickle

from dbjax.runtime.ray import Ray
from dbjax.runtime.replica_host import ReplicaHost
from dbjax.runtime.transport import SIDE, WORK, Gone, Late


class Pretend(Ray):
    """Runs replicas and shards on `Session`, without Ray.

    `before(session, address, method)` is called before each message is carried out.
    """

    def __init__(self, before=lambda session, address, method: None, **settings):
        super().__init__(**{"timeout": 20.0, **settings})
        object.__setattr__(self, "before", before)

    @contextlib.contextmanager
    def session(self):
        session = Session(self.before)
        try:
            yield session
        finally:
            session.close()


class Session:
    """A transport whose processes are threads."""

    def __init__(self, before):
        self.before, self.processes, self.shared = before, [], {}

    def close(self):
        for address in self.processes:
            address.end()

    def check_room(self, replicas, shards):
        pass

    def share(self, what, value, keyed=False):
        return Value(value, cloudpickle.dumps(value) if keyed else object())

    @property
    def share_there(self):
        return self.share

    def host(
        self, name, make, *, kind="replica", devices=1, away_from=None, processes=1
    ):
        assert processes == 1, "all that is pretended is one process"
        address = Address(self, name)
        self.processes.append(address)
        return address, address.ask("", make)

    def end(self, address):
        address.end()

    def kill(self, address):
        address.end()


class Value:
    def __init__(self, value, key):
        self.value, self.key = value, key

    def __eq__(self, other):
        return self.key == other.key

    def __hash__(self):
        return hash(self.key)

    def get(self, timeout=None):
        return self.value


class Address:
    def __init__(self, session, name):
        self.session, self.name, self.dead = session, name, threading.Event()
        self.lanes = {
            lane: concurrent.futures.ThreadPoolExecutor(threads, "pretended")
            for lane, threads in ((WORK, 1), (SIDE, 8))
        }
        self.object, self.open, self.lock = None, set(), threading.RLock()

    def __bool__(self):
        return True

    def ask(self, method, *args, lane=WORK):
        reply = Reply(f"{self.name} ({method})")
        with self.lock:
            if self.dead.is_set():
                reply.fail()
                return reply
            self.open.add(reply)
            self.lanes[lane].submit(self.carry_out, reply, method, args)
        return reply

    def carry_out(self, reply, method, args):
        if method == "alive":
            return
        try:
            self.session.before(self.session, self, method)
            if self.dead.is_set():
                return
            if not method:
                self.object = args[0]()
                result = None
            else:
                result = getattr(self.object, method)(*args)
        except BaseException as error:
            reply.finish(error, None)
        else:
            reply.finish(None, result)
        with self.lock:
            self.open.discard(reply)

    def end(self):
        """Die: nobody gets an answer any more."""
        with self.lock:
            self.dead.set()
            left, self.open = self.open, set()
        for reply in left:
            reply.fail()
        gone, self.object = self.object, None
        if isinstance(gone, ReplicaHost):  # it waits no more for anybody
            gone._around._timeout = 0.0
            for shard in range(len(gone._around._shards)):
                gone.moved(shard, self)
            if gone._life._courier is not None:
                gone._life._courier.shutdown(wait=False)
        for lane in self.lanes.values():
            lane.shutdown(wait=False, cancel_futures=True)


class Reply:
    def __init__(self, what):
        self.what, self.future = what, concurrent.futures.Future()

    def fail(self):
        self.finish(Gone(f"{self.what}: dead"), None)

    def finish(self, error, result):
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            if error is not None:
                self.future.set_exception(error)
            else:
                self.future.set_result(result)

    def result(self, timeout=None):
        try:
            return self.future.result(timeout)
        except concurrent.futures.TimeoutError:
            raise Late(f"{self.what} has not answered for {timeout} s") from None

    def then(self, call):
        self.future.add_done_callback(lambda _: call(self))


def killer(seed, chance, names=("replica", "shard"), most=20):
    """A `before` that kills the process asked with some chance, or another one."""
    die, lock, killed = random.Random(seed), threading.Lock(), []

    def before(session, address, method):
        with lock:
            if method in ("", "moved") or len(killed) >= most:
                return
            if die.random() >= chance or not address.name.startswith(names):
                return
            alive = [
                a
                for a in session.processes
                if not a.dead.is_set() and a.name.startswith(names) and a.object
            ]
            if not alive:
                return
            victim = die.choice(alive)
            killed.append(victim.name)
        victim.end()

    before.killed = killed
    return before
