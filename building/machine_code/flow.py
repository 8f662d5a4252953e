"""Instructions, their control flow, and loops: what the readers of both assemblies share."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Instruction:
    """One instruction. ``address``: bytes from the kernel's start, or the line number if the text has no addresses."""

    address: int
    opcode: str
    operands: tuple[str, ...]
    guarded: bool = False  # runs under a predicate

    @cached_property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]


@dataclass(frozen=True)
class Program:
    """A kernel. ``successors[i]``: indices of what may follow ``instructions[i]``; the first is the entry."""

    instructions: list[Instruction]
    successors: list[tuple[int, ...]]

    def innermost_loops(self, matters: Callable[[Instruction], bool]) -> list[list[Instruction]]:
        """Return the loops that hold an instruction that matters, but no smaller such loop, by address."""
        bodies = [loop for loop in natural_loops(self.successors) if any(matters(self.instructions[i]) for i in loop)]
        inner = [loop for loop in bodies if not any(other < loop for other in bodies)]
        return [[self.instructions[i] for i in sorted(loop)] for loop in sorted(inner, key=min)]


def natural_loops(successors: list[tuple[int, ...]]) -> list[set[int]]:
    """Return a set of nodes for each node that has a back edge, that is an edge from a node that it dominates.

    A jump to a lower address does not make a loop: ptxas moves spins on a barrier behind the kernel's end, from where
    they jump back into the loop that they left.
    """
    order = _reverse_postorder(successors)
    rank = {node: i for i, node in enumerate(order)}
    predecessors: dict[int, list[int]] = {node: [] for node in order}
    for node in order:
        for after in successors[node]:
            predecessors[after].append(node)

    # Cooper, Harvey, Kennedy: A Simple, Fast Dominance Algorithm. parent is the immediate dominator.
    parent = {order[0]: order[0]}

    def common(a: int, b: int) -> int:
        while a != b:
            if rank[a] > rank[b]:
                a = parent[a]
            else:
                b = parent[b]
        return a

    changed = True
    while changed:
        changed = False
        for node in order[1:]:
            known = [p for p in predecessors[node] if p in parent]
            new = known[0]
            for other in known[1:]:
                new = common(new, other)
            if parent.get(node) != new:
                parent[node] = new
                changed = True

    loops: dict[int, set[int]] = {}
    for node in order:
        for head in successors[node]:
            if common(node, head) == head:
                body = loops.setdefault(head, {head})
                found = [node]
                while found:
                    inside = found.pop()
                    if inside not in body:
                        body.add(inside)
                        found += predecessors[inside]
    return list(loops.values())


def _reverse_postorder(successors: list[tuple[int, ...]]) -> list[int]:
    done: list[int] = []
    seen = {0}
    path = [(0, iter(successors[0]))]
    while path:
        node, rest = path[-1]
        after = next((n for n in rest if n not in seen), None)
        if after is None:
            done.append(node)
            path.pop()
        else:
            seen.add(after)
            path.append((after, iter(successors[after])))
    return done[::-1]
