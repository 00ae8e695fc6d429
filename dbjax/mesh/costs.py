"""What a partition costs: the collectives and memory of a compiled program.

All is read from the program that XLA compiled, after it has put in what the shardings
ask for and merged what can be merged; nothing is run. The other file of costs,
`memory.py`, says before there is a program what a model will need.

Letters: `n` is the bytes of a collective's result on one device, `P` the number of
devices that take part in one. A device must send at least, with ring algorithms
(Thakur, Rabenseifner and Gropp, 2005, section 4):

  all-reduce               2 (P - 1) / P * n
  all-gather, all-to-all     (P - 1) / P * n
  reduce-scatter             (P - 1)     * n     (its result is a P-th of its operand)
  collective-permute                       n     (a source whose target is another)
  collective-broadcast                     n     (the root; others may pass it on)
"""

import collections
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from dbjax.mesh.memory import readable

_SENT: Mapping[str, Callable[[int], float]] = {
    "all-reduce": lambda p: 2 * (p - 1) / p,
    "all-gather": lambda p: (p - 1) / p,
    "reduce-scatter": lambda p: p - 1,
    "all-to-all": lambda p: (p - 1) / p,
    "ragged-all-to-all": lambda p: (p - 1) / p,
    "collective-permute": lambda p: 1 if p > 1 else 0,
    "collective-broadcast": lambda p: 1 if p > 1 else 0,
}


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
      kind: such as `all-reduce`.
      name: in the program.
      times: how often it runs in a step, with the loops around it.
      devices: `P`, that talk to each other; in a permute, the senders.
      groups: how many groups of `P` devices do so at once; 1 for a permute.
      result_bytes: `n`, each time.
      sent_bytes: that the busiest device must send, each time.
      uncertain: why `times` is not known; empty if it is.
    """

    kind: str
    name: str
    times: int
    devices: int
    groups: int
    result_bytes: int
    sent_bytes: float
    uncertain: str = ""


class Total(NamedTuple):
    """Collectives of one kind, per step.

    Attributes:
      count: how many run.
      result_bytes: of their results, on one device.
      sent_bytes: that one device must send.
      all_bytes: that all devices together must send.
    """

    count: int = 0
    result_bytes: int = 0
    sent_bytes: float = 0.0
    all_bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one step of a partitioned program costs.

    Attributes:
      devices: that run it.
      collectives: those of one device's program, in its order.
      argument_bytes: on one device: parameters and batch, and whatever else goes in.
      output_bytes: on one device.
      alias_bytes: of the output, that lie in donated arguments.
      temporary_bytes: on one device: activations and all else between.
      flops: of one device, as XLA estimates them, the body of a loop counted once; None
        where it does not.
    """

    devices: int
    collectives: tuple[Collective, ...]
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    flops: float | None

    def by_kind(self) -> dict[str, Total]:
        """Give the totals of each kind of collective that there is."""
        kinds = dict.fromkeys(one.kind for one in self.collectives)
        return {
            kind: _total(one for one in self.collectives if one.kind == kind)
            for kind in kinds
        }

    @property
    def total(self) -> Total:
        """The totals of all collectives."""
        return _total(self.collectives)

    @property
    def uncertain(self) -> tuple[Collective, ...]:
        """Collectives counted as if they ran once; how often they do is not known."""
        return tuple(one for one in self.collectives if one.uncertain)

    def __str__(self) -> str:
        """Give a small table."""
        plural = "device" if self.devices == 1 else "devices"
        lines = [
            f"per step, each of {self.devices} {plural}:",
            f"{'collective':<22}{'count':>7}{'result':>12}{'sent':>12}",
        ]
        rows = self.by_kind() | {"all": self.total}
        for kind, total in rows.items():
            result, sent = readable(total.result_bytes), readable(total.sent_bytes)
            lines.append(f"{kind:<22}{total.count:>7,}{result:>12}{sent:>12}")
        for one in self.uncertain:
            lines.append(f"  {one.kind} {one.name}: counted once, {one.uncertain}")
        for what, size in (
            ("arguments", self.argument_bytes),
            ("outputs", self.output_bytes - self.alias_bytes),
            ("temporaries", self.temporary_bytes),
        ):
            lines.append(f"{what:<29}{readable(size):>12}")
        if self.flops is not None:
            lines.append(f"{'operations (loops once)':<29}{self.flops:>12.4g}")
        return "\n".join(lines)


def partition_costs(fn: Any, *args: Any, **kwargs: Any) -> Costs:
    """Read off a compiled program what a step of it costs.

    Args:
      fn: a function, plain or jitted, or what `jax.jit(fn).lower(...)` gives, compiled
        or not.
      *args: of the function: arrays or `jax.ShapeDtypeStruct`, with shardings.
      **kwargs: likewise.

    Returns:
      The costs. Collectives in loops count as often as the loop runs; where the program
      does not say how often, they count once and stand in `uncertain`.

    Raises:
      TypeError: arguments for what is lowered already.
      ValueError: the program's text is not understood.

    >>> print(partition_costs(lambda x: x @ x, jax.ShapeDtypeStruct((8, 8), "float32")))
    per step, each of 1 device:
    collective              count      result        sent
    all                         0         0 B         0 B
    arguments                           256 B
    outputs                             256 B
    temporaries                           0 B
    operations (loops once)              1024
    """
    if isinstance(fn, jax.stages.Lowered | jax.stages.Compiled):
        if args or kwargs:
            raise TypeError(f"a {type(fn).__name__} takes no arguments here")
        compiled = fn.compile() if isinstance(fn, jax.stages.Lowered) else fn
    else:
        jitted = fn if hasattr(fn, "lower") else jax.jit(fn)
        compiled = jitted.lower(*args, **kwargs).compile()
    text = compiled.as_text() or ""
    memory: Any = compiled.memory_analysis()  # of a type that has no name
    analysis = compiled.cost_analysis() or {}
    if isinstance(analysis, list):  # one for each program, on some backends
        analysis = analysis[0] if analysis else {}
    return Costs(
        devices=_devices(text),
        collectives=collectives_of(text),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        flops=analysis.get("flops"),
    )


def collectives_of(text: str) -> tuple[Collective, ...]:
    """Find the collectives in a program's text, those in loops and branches too.

    Args:
      text: as `Compiled.as_text()` gives it.

    Returns:
      One entry for each place where one stands. What is started and awaited separately
      counts where it starts.

    Raises:
      ValueError: there is no entry, or groups are written in an unknown way.
    """
    entry, computations = _computations(text)
    devices = _devices(text)
    found = list(_walk(entry, computations, devices, 1, ""))
    reached = {one.name for one in found}
    for instructions in computations.values():
        for one in instructions:
            kind = one.op.removesuffix("-start")
            if kind in _SENT and one.name not in reached:
                found.append(
                    _collective(one, kind, devices, 1, "called in no known way")
                )
    return tuple(found)


def _total(collectives: Iterable[Collective]) -> Total:
    all_of = tuple(collectives)
    return Total(
        count=sum(one.times for one in all_of),
        result_bytes=sum(one.times * one.result_bytes for one in all_of),
        sent_bytes=sum(one.times * one.sent_bytes for one in all_of),
        all_bytes=sum(
            one.times * one.sent_bytes * one.devices * one.groups for one in all_of
        ),
    )


class _Instruction(NamedTuple):
    name: str
    shape: str
    op: str
    rest: str  # operands and attributes


# A shape has no space before a word and a bracket, so the first such is the operation.
_INSTRUCTION = re.compile(
    r"\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>.*?)"
    r" (?P<op>[a-z][\w\-]*)\((?P<rest>.*)"
)
_HEAD = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) .*\{$")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)


def _devices(text: str) -> int:
    head = text.partition("\n")[0]
    sizes = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", head)
    return math.prod(map(int, sizes))


def _computations(text: str) -> tuple[str, dict[str, list[_Instruction]]]:
    """Give the entry's name, and of each computation the instructions that matter."""
    entry, here = "", []
    found: dict[str, list[_Instruction]] = {}
    for line in text.splitlines():
        if instruction := _INSTRUCTION.match(line):
            here.append(_Instruction(**instruction.groupdict()))
        elif (head := _HEAD.match(line)) and not line.startswith("HloModule"):
            here = found.setdefault(head["name"], [])
            entry = head["name"] if head["entry"] else entry
    if not entry:
        raise ValueError(f"no program has an entry like this: {text[:200]!r}")
    return entry, found


def _walk(
    name: str,
    computations: Mapping[str, list[_Instruction]],
    devices: int,
    times: int,
    uncertain: str,
) -> Iterator[Collective]:
    """Give the collectives of a computation that runs so often, and of its callees."""
    for one in computations[name]:
        kind = one.op.removesuffix("-start")
        if kind in _SENT:
            yield _collective(one, kind, devices, times, uncertain)
            continue
        if one.op in (
            "async-done",
            "async-update",
        ):  # what they name was started before
            continue
        often, why = times, uncertain
        if one.op == "while":
            trips = re.search(r'"known_trip_count":(\{[^}]*\})', one.rest)
            if trips:
                often *= int(json.loads(trips[1])["n"])
            else:
                why = "in a loop of unknown length"
        elif one.op == "conditional":
            why = "in a branch that may not be taken"
        for role, called in _calls(one):
            extra = times if role == "condition" and often != times else 0
            yield from _walk(called, computations, devices, often + extra, why)


def _calls(one: _Instruction) -> Iterator[tuple[str, str]]:
    yield from _CALLED.findall(one.rest)
    several = r"(branch_computations|called_computations)=\{([^}]*)\}"
    for role, names in re.findall(several, one.rest):
        for name in names.split(","):
            yield role, name.strip().removeprefix("%")


def _collective(
    one: _Instruction, kind: str, devices: int, times: int, uncertain: str
) -> Collective:
    shape = one.shape
    if one.op in ("all-gather-start", "collective-permute-start"):
        shape = _elements(shape)[1]  # of operand, result and what the backend adds
    size = _bytes(shape)
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", one.rest)
        if not pairs:
            raise ValueError(f"{one.name}: no source_target_pairs in {one.rest!r}")
        ends = re.findall(r"\{(\d+),(\d+)\}", pairs[1])
        sends = collections.Counter(source for source, to in ends if source != to)
        senders, groups = len(sends), 1
        sent = size * float(max(sends.values(), default=0))
    else:
        senders, groups = _groups(one, devices)
        sent = size * float(_SENT[kind](senders))
    return Collective(kind, one.name, times, senders, groups, size, sent, uncertain)


def _groups(one: _Instruction, devices: int) -> tuple[int, int]:
    """Give the number of devices in a group, and of groups."""
    found = re.search(r"replica_groups=(.*)", one.rest)
    written = found[1] if found else "{}"
    if iota := re.match(r"\[([\d,]+)\]<=\[", written):  # [groups, devices]<=[...]
        groups, each = map(int, iota[1].split(","))
        return each, groups
    if mesh := re.match(r"@?\w*\[([^\]]*)\]\s*\{([^}]*)\}", written):  # over named axes
        sizes = dict(re.findall(r"['\"]([^'\"]+)['\"]=(\d+)", mesh[1]))
        over = re.findall(r"['\"]([^'\"]+)['\"](?::\(\d+\)(\d+))?", mesh[2])
        each = math.prod(int(part or sizes[axis]) for axis, part in over)
        return each, math.prod(map(int, sizes.values())) // each
    if written.startswith("{}"):  # all of them
        return devices, 1
    if listed := re.match(r"\{(\{[\d,]*\}(?:,\s*\{[\d,]*\})*)\}", written):
        groups = re.findall(r"\{([\d,]*)\}", listed[1])
        return max(len(group.split(",")) for group in groups), len(groups)
    raise ValueError(f"{one.name}: groups written as {written[:80]!r} are not known")


def _elements(shape: str) -> list[str]:
    """Split a tuple's shape into those of its elements; another is its own element."""
    if not shape.startswith("("):
        return [shape]
    parts, depth = [""], 0
    for letter in shape[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _bytes(shape: str) -> int:
    """Give the bytes of all arrays in a shape, such as `(f32[2,3]{1,0}, bf16[])`."""
    total = 0
    for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", shape):
        bits = 8 if dtype == "pred" else int((re.findall(r"\d+", dtype) or [0])[0])
        axes = [int(size.removeprefix("<=")) for size in dims.split(",") if size]
        total += -(-bits * math.prod(axes) // 8)
    return total
