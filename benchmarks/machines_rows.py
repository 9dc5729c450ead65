"""How long a pass takes on many machines, in simulation. Pure: from measured times and a network to rows.

*Tensor parallel*: each machine has its part of every linear on its own disk and under its own budget; query, key,
value, gate and up are split by rows, output and down by columns, and behind those two the machines add up what they
have (Shoeybi et al., 2019, https://arxiv.org/abs/1909.08053). *Pipeline*: each has some of the layers, and a pass goes
from one to the next.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pylomin.residency.schedule import choose_residents
from pylomin.residency.simulation import Costs, Group, simulate
from pylomin.residency.tiling import lines_per_tile

MACHINES = (1, 2, 4, 8, 16, 32, 64)
STEPS = 500  # of an iteration, before what it has come to is taken


@dataclass(frozen=True)
class Network:
    """A message takes ``latency_s`` and its bytes at a bandwidth."""

    name: str
    bandwidth_bytes_per_s: float
    latency_s: float

    def all_reduce_s(self, nbytes: int, machines: int) -> float:
        """The quicker of recursive doubling and a ring (Thakur, Rabenseifner and Gropp, 2005)."""
        if machines == 1:
            return 0.0
        transfer_s = nbytes / self.bandwidth_bytes_per_s
        doubling_s = math.ceil(math.log2(machines)) * (self.latency_s + transfer_s)
        return min(doubling_s, 2 * (machines - 1) * (self.latency_s + transfer_s / machines))

    def gather_s(self, nbytes: int, machines: int) -> float:
        """Everybody's part of ``nbytes`` to everybody, by recursive doubling."""
        if machines == 1:
            return 0.0
        transfer_s = nbytes / self.bandwidth_bytes_per_s
        return math.ceil(math.log2(machines)) * self.latency_s + (machines - 1) / machines * transfer_s

    def send_s(self, nbytes: int) -> float:
        """From one to the next."""
        return self.latency_s + nbytes / self.bandwidth_bytes_per_s


SHOWN = "25 GbE"  # in the table
# Assumed: line rate, and what a message of TCP (of RDMA for the last) takes between two machines of one rack.
ASSUMED_NETWORKS = (
    Network("10 GbE", 1.25e9, 50e-6),
    Network("25 GbE", 3.125e9, 30e-6),
    Network("100 GbE", 12.5e9, 5e-6),
)


@dataclass(frozen=True)
class Linear:
    """Output and input features of one machine's part, and whether the parts' outputs are added up."""

    rows: int
    columns: int
    is_summed: bool = False


@dataclass(frozen=True)
class Shape:
    """A decoder like Llama, and the budget of each machine."""

    name: str
    layers: int
    width: int
    hidden: int
    heads: int
    key_heads: int
    words: int
    dtype: str
    element_bytes: int
    budget_bytes: int

    def layer(self, machines: int) -> list[Linear]:
        """The linears of a layer on the machine that has most; heads are not split."""
        head = self.width // self.heads
        query = math.ceil(self.heads / machines) * head
        key = math.ceil(self.key_heads / machines) * head
        hidden = math.ceil(self.hidden / machines)
        by_rows = [Linear(rows, self.width) for rows in (query, key, key)]
        return [
            *by_rows,
            Linear(self.width, query, is_summed=True),
            Linear(hidden, self.width),
            Linear(hidden, self.width),
            Linear(self.width, hidden, is_summed=True),
        ]

    def head(self, machines: int) -> Linear:
        """The output layer, of which each machine has some words."""
        return Linear(math.ceil(self.words / machines), self.width)

    def nbytes(self, linear: Linear) -> int:
        """Of its weight."""
        return linear.rows * linear.columns * self.element_bytes

    def part_bytes(self, machines: int) -> int:
        """Of the weights on the machine that has most."""
        return self.layers * sum(map(self.nbytes, self.layer(machines))) + self.nbytes(self.head(machines))

    @property
    def weight_bytes(self) -> int:
        """Of all weights; but for the embedding, of which a pass reads some rows."""
        return self.part_bytes(1)

    def group(self, linear: Linear) -> Group:
        """As pylomin loads it: by tiles, two of them in memory, where it does not fit twice into the budget."""
        row_bytes = linear.columns * self.element_bytes
        rows = lines_per_tile(linear.rows, row_bytes, None, self.budget_bytes)
        return Group(self.nbytes(linear), None if rows is None else 2 * rows * row_bytes)


@dataclass(frozen=True)
class Times:
    """What was measured of one machine.

    Args:
        linear_s: for output features, input features, tokens: a product.
        rest_s: all else that a layer does, for tokens; on every machine, however many there are.
        costs: of its disk.
    """

    linear_s: Mapping[tuple[int, int, int], float]
    rest_s: Mapping[int, float]
    costs: Costs

    def of(self, linear: Linear, tokens: int) -> float:
        """Of one product."""
        return self.linear_s[linear.rows, linear.columns, tokens]

    def shared_by(self, processes: int) -> Times:
        """What is left for each of some processes on this one machine: a part of its disk and of its processors."""
        linear_s = {kind: processes * seconds for kind, seconds in self.linear_s.items()}
        costs = Costs(self.costs.bandwidth_bytes_per_s / processes, self.costs.latency_s)
        return Times(linear_s, self.rest_s, costs)


@dataclass(frozen=True)
class Pass:
    """One pass on one of the machines, in the steady state."""

    elapsed_s: float
    compute_s: float
    communication_s: float
    read_bytes: int
    bound_s: float


def layer_s(shape: Shape, machines: int, tokens: int, times: Times) -> float:
    """Computing a layer."""
    return times.rest_s[tokens] + sum(times.of(linear, tokens) for linear in shape.layer(machines))


def computing_s(shape: Shape, tokens: int, times: Times) -> float:
    """Of all on one machine that has everything in memory."""
    return shape.layers * layer_s(shape, 1, tokens, times) + times.of(shape.head(1), 1)


def tensor_parallel(shape: Shape, machines: int, tokens: int, times: Times, network: Network) -> Pass:
    """All machines work on all layers; all-reduces and computing take turns, reading goes on beside both."""
    reduce_s = network.all_reduce_s(tokens * shape.width * shape.element_bytes, machines)
    gather_s = network.gather_s(shape.words * shape.element_bytes, machines)
    groups, compute_s = [], []
    for _ in range(shape.layers):
        for linear in shape.layer(machines):
            groups.append(shape.group(linear))
            compute_s.append(times.of(linear, tokens) + (reduce_s if linear.is_summed else 0.0))
        compute_s[-1] += times.rest_s[tokens]
    groups.append(shape.group(shape.head(machines)))
    compute_s.append(times.of(shape.head(machines), 1) + gather_s)
    communication_s = 2 * shape.layers * reduce_s + gather_s
    elapsed_s, read_bytes = cycle(groups, compute_s, shape.budget_bytes, times.costs)
    computed_s = sum(compute_s) - communication_s
    rest_s = shape.layers * times.rest_s[tokens]
    least_s = min(computed_s, (computing_s(shape, tokens, times) - rest_s) / machines + rest_s)
    least_bytes = max(0.0, shape.weight_bytes / machines - shape.budget_bytes)
    bound_s = max(least_s + communication_s, least_bytes / times.costs.bandwidth_bytes_per_s)
    return Pass(elapsed_s, computed_s, communication_s, read_bytes, bound_s)


def pipeline(shape: Shape, machines: int, tokens: int, times: Times, network: Network) -> Pass | None:
    """A pass goes from machine to machine. None where the layers do not divide evenly; the head is taken to do so."""
    if shape.layers % machines:
        return None
    layers, head = shape.layers // machines, shape.head(1)
    send_s = network.send_s(tokens * shape.width * shape.element_bytes) if machines > 1 else 0.0
    linears = shape.layer(1) * layers
    groups = [shape.group(linear) for linear in linears]
    compute_s = [times.of(linear, tokens) for linear in linears]
    compute_s[-1] += layers * times.rest_s[tokens] + send_s
    groups.append(shape.group(Linear(math.ceil(shape.words / machines), shape.width)))
    compute_s.append(times.of(head, 1) / machines)
    busy_s = sum(compute_s)
    # A machine reads no further ahead than its budget holds, and the rest of its layers while the others wait.
    least_bytes = max(0, shape.weight_bytes - machines * shape.budget_bytes)
    bound_s = max(busy_s * machines, least_bytes / times.costs.bandwidth_bytes_per_s)
    groups.append(Group(1))  # while the others are busy
    elapsed_s, read_bytes = bound_s, 0
    for _ in range(STEPS):  # how long they are depends on how long this one waits, which is like them
        others_s = elapsed_s * (machines - 1) / machines
        before_s = elapsed_s
        elapsed_s, read_bytes = cycle(groups, [*compute_s, others_s], shape.budget_bytes, times.costs)
        if elapsed_s - before_s <= 1e-4 * elapsed_s:
            break
    return Pass(elapsed_s, (busy_s - send_s) * machines, send_s * machines, read_bytes, bound_s)


def cycle(groups: Sequence[Group], compute_s: Sequence[float], budget_bytes: int, costs: Costs) -> tuple[float, int]:
    """Seconds and bytes read of one pass, as pylomin would plan it."""
    order = range(len(groups))
    schedule = choose_residents(order, groups, budget_bytes, compute_s=compute_s, costs=costs)
    if schedule is None:
        raise ValueError(f"a budget of {budget_bytes} bytes does not hold the largest of the weights")
    done = simulate(order, groups, schedule.residents, schedule.window_bytes, compute_s, costs)
    return done.elapsed_s, done.read_bytes


def linears_of(shapes: Iterable[Shape], tokens: Iterable[int]) -> list[tuple[str, int, int, int]]:
    """What is to be timed: dtype, output features, input features, tokens."""
    found = {
        (shape.dtype, linear.rows, linear.columns, count)
        for shape in shapes
        for machines in MACHINES
        for count in tokens
        for linear in shape.layer(machines)
    }
    return sorted(found | {(s.dtype, (head := s.head(n)).rows, head.columns, 1) for s in shapes for n in MACHINES})


def rows_of(shape: Shape, tokens: int, times: Times, networks: Sequence[Network]) -> list[dict[str, Any]]:
    """A row for each number of machines: details with the network ``SHOWN``, and how many times as fast as one."""
    rows = []
    one_s = tensor_parallel(shape, 1, tokens, times, networks[0]).elapsed_s
    for machines in MACHINES:
        passes = {network.name: tensor_parallel(shape, machines, tokens, times, network) for network in networks}
        shown = passes[SHOWN]
        (network,) = (network for network in networks if network.name == SHOWN)
        row: dict[str, Any] = {
            "variant": f"{shape.name}, {tokens} token{'s' * (tokens > 1)}, {machines} machine{'s' * (machines > 1)}",
            "shape": shape.name,
            "tokens": tokens,
            "machines": machines,
            "budget_bytes_each": shape.budget_bytes,
            "resident_share": 1 - shown.read_bytes / shape.part_bytes(machines),
            "read_bytes": shown.read_bytes,
            "compute_s": shown.compute_s,
            "communication_s": shown.communication_s,
            "simulated_s": shown.elapsed_s,
            "least_s": shown.bound_s,
            "times_least": shown.elapsed_s / shown.bound_s,
            "bound_speedup": one_s / shown.bound_s,
            "speedups": {name: one_s / one.elapsed_s for name, one in passes.items()},
        }
        if staged := pipeline(shape, machines, tokens, times, network):
            row["pipeline_s"], row["pipeline_speedup"] = staged.elapsed_s, one_s / staged.elapsed_s
        rows.append(row)
    return rows
