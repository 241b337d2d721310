"""Disassembled kernels as a graph of instructions: their loops, what stands in them, how long the epilogue is.

Reads cuobjdump's listing of NVIDIA machine code and the AMD compiler's assembly, and for two faults that are easier to
see there PTX and Triton's own IR. Imports neither torch nor Triton.
"""

from __future__ import annotations

import functools
import re
import statistics
from collections.abc import Iterable
from typing import NamedTuple

import networkx as nx  # which PyTorch brings

TENSOR_CORES = re.compile(r"\b(?:HMMA|HGMMA|IMMA|IGMMA|QGMMA|UTCHMMA|UTCQMMA|OMMA)\b|\bv_mfma_")
LOCAL_MEMORY = re.compile(r"\b(?:LDL|STL)\b|\bscratch_(?:load|store)")
FP64 = re.compile(r"\b(?:DADD|DMUL|DFMA|DSETP|DMMA)\b|\b[FI]2F\S*\.F64|\bv_\w+_f64")
EXPONENTIAL = re.compile(r"\bMUFU\.EX2\b|\bv_exp_f32")

_SASS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_SASS_BRANCH = re.compile(r"\bBRA\S*(?: (.*),)? 0x([0-9a-f]+)$")
_SASS_CALL = re.compile(r"\bCALL\S* .*0x([0-9a-f]+)$")
_BARRIER = re.compile(r"\b(BSSY|BSYNC)\S* (B\d+)(?:, 0x([0-9a-f]+))?$")
_AMD_LABEL = re.compile(r"^(\.L\w+):")
_AMD_BRANCH = re.compile(r"^s_(c?)branch\w*\s+(\.L\w+)")

_PTX_PRODUCT = re.compile(r"\bmul\.(?:rn\.)?(?:ftz\.)?(?:f32|f32x2)\s+(%\w+), ([^\s,]+), ([^\s,]+)$")
_PTX_NEGATION = re.compile(r"\bneg\.(?:ftz\.)?(?:f32|f32x2)\s+(%\w+), (%\w+)$")
_PTX_FUSED = re.compile(r"\bfma\.rn\.(?:ftz\.)?(?:f32|f32x2)\s+%\w+, ([^\s,]+), ([^\s,]+), ([^\s,]+)$")


class Instruction(NamedTuple):
    text: str
    jumps: tuple[int, ...]  # indices of the instructions that it may branch to
    falls: bool  # whether the next instruction may follow it


def parse(listing: str) -> tuple[Instruction, ...]:
    return _parse_sass(listing) if _SASS.search(listing) else _parse_amd(listing)


def _parse_sass(listing: str) -> tuple[Instruction, ...]:
    found = [(int(address, 16), text) for address, text in _SASS.findall(listing)]
    # padding behind the last instruction
    while found and found[-1][1] == "NOP":
        found.pop()
    index = {address: at for at, (address, _) in enumerate(found)}
    code: list[Instruction] = []
    meeting: dict[str, int] = {}  # convergence barrier: the address where its threads meet
    for _, text in found:
        predicated = text.startswith("@")
        jumps: tuple[int, ...] = ()
        falls = predicated or not re.search(r"\b(?:EXIT|RET\S*)\b", text)
        if branch := _SASS_BRANCH.search(text):
            jumps, falls = (index[int(branch[2], 16)],), predicated or branch[1] is not None
        elif call := _SASS_CALL.search(text):
            jumps = (index[int(call[1], 16)],)
        elif barrier := _BARRIER.search(text):
            if barrier[1] == "BSSY":
                meeting[barrier[2]] = int(barrier[3], 16)
            elif barrier[2] in meeting:
                jumps, falls = (index[meeting[barrier[2]]],), predicated
        code.append(Instruction(text, jumps, falls))
    return tuple(code)


def _parse_amd(listing: str) -> tuple[Instruction, ...]:
    labels: dict[str, int] = {}
    texts: list[str] = []
    for line in listing.splitlines():
        text = line.split(";")[0].strip()
        if text.startswith(".Lfunc_end"):
            break
        if label := _AMD_LABEL.match(text):
            labels[label[1]] = len(texts)
        elif line.startswith("\t") and re.match(r"[a-z]\w+(?:\s|$)", text):
            texts.append(text)
    code = []
    for text in texts:
        branch = _AMD_BRANCH.match(text)
        jumps = (labels[branch[2]],) if branch and labels.get(branch[2], len(texts)) < len(texts) else ()
        code.append(Instruction(text, jumps, text != "s_endpgm" and not (branch and not branch[1])))
    return tuple(code)


def _graph(code: tuple[Instruction, ...]) -> nx.DiGraph:
    """Which instruction may follow which, by their indices, of those that are ever reached."""
    after = {at: [*one.jumps, *([at + 1] if one.falls and at + 1 < len(code) else [])] for at, one in enumerate(code)}
    graph = nx.DiGraph(after)
    return graph.subgraph({0} | nx.descendants(graph, 0)).copy()


@functools.lru_cache(maxsize=1)
def loops(code: tuple[Instruction, ...]) -> list[set[int]]:
    """Indices of each natural loop's instructions, the smallest loop first."""
    graph = _graph(code)
    tree = nx.DiGraph((above, at) for at, above in nx.immediate_dominators(graph, 0).items() if at != 0)
    tree.add_node(0)
    walks = nx.dfs_preorder_nodes, nx.dfs_postorder_nodes
    before, after = ({at: place for place, at in enumerate(walk(tree, 0))} for walk in walks)
    bodies: dict[int, set[int]] = {}
    for tail, header in graph.edges:
        if before[header] <= before[tail] and after[tail] <= after[header]:  # no way to the tail but past the header
            inside = graph.subgraph(graph.nodes - {header})
            body = {tail} | nx.ancestors(inside, tail) if tail != header else set()
            bodies.setdefault(header, {header}).update(body)
    return sorted(bodies.values(), key=len)


def _matching(code: tuple[Instruction, ...], within: Iterable[int], pattern: re.Pattern[str]) -> set[int]:
    return {at for at in within if pattern.search(code[at].text)}


def count(code: tuple[Instruction, ...], pattern: re.Pattern[str]) -> int:
    return len(_matching(code, range(len(code)), pattern))


def product_loops(code: tuple[Instruction, ...]) -> list[set[int]]:
    """The innermost loops that hold tensor-core instructions.

    Where the compiler unrolled the steps of a product this is the loop over tiles, the epilogue included.
    """
    holding = [loop for loop in loops(code) if _matching(code, loop, TENSOR_CORES)]
    return [loop for loop in holding if not any(other < loop for other in holding)]


def count_in_product_loops(code: tuple[Instruction, ...], pattern: re.Pattern[str]) -> int:
    return len(_matching(code, set().union(*product_loops(code)), pattern))


def epilogue(code: tuple[Instruction, ...]) -> int | None:
    """Instructions from a tile's product to the next one, by the shortest way through its exponentials.

    The shortest way is that of a tile without a candidate. None where no loop holds both products and exponentials.
    """
    for loop in loops(code):
        products, exponentials = (_matching(code, loop, pattern) for pattern in (TENSOR_CORES, EXPONENTIAL))
        if products and exponentials:
            inside = _graph(code).subgraph(loop)
            since, until = (nx.multi_source_dijkstra_path_length(g, products) for g in (inside, inside.reverse()))
            # the median: a few are of what only a tile with candidates computes
            return statistics.median_low(since[at] + until[at] - 1 for at in exponentials)
    return None


def rounding_residues(ptx: str) -> list[str]:
    """The fused multiply-adds of a PTX text that compute a·b − (a·b): what v − v becomes where v is a product.

    Such a difference is the product's rounding error and not 0, so a test like v − v = 0 for "v is finite" fails.
    """
    products: dict[str, tuple[str, ...]] = {}
    negated: dict[str, str] = {}
    found = []
    for line in ptx.splitlines():
        text = line.partition("//")[0].strip().rstrip(";")
        if product := _PTX_PRODUCT.search(text):
            products[product[1]] = tuple(sorted(product.groups()[1:]))
        elif negation := _PTX_NEGATION.search(text):
            negated[negation[1]] = negation[2]
        elif fused := _PTX_FUSED.search(text):
            # one of the three is negated: the addend, or a factor
            signs = sum(operand in negated for operand in fused.groups())
            first, second, addend = (negated.get(operand, operand) for operand in fused.groups())
            if signs == 1 and products.get(addend) == tuple(sorted((first, second))):
                found.append(text)
    return found


def narrow_strides(ttir: str) -> list[str]:
    """The lines of Triton's IR that compute with a stride argument in 32 bits.

    Every offset must be 64 bits wide before it meets a stride: column 3 of a transposed weight of 2³⁰ classes lies past
    2³¹. Triton before 3.6 does not name arguments there, and nothing is found.
    """
    uses = [line for line in ttir.splitlines() if re.search(r"%\w+_stride_\w+", line) and "tt.func" not in line]
    return [line.strip() for line in uses if not re.search(r"= arith\.extsi %\w+_stride_\w+ : i32 to i64", line)]
