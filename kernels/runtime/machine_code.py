"""What a multiprocessor must issue: instructions counted in machine code, as cuobjdump prints it."""

from __future__ import annotations

import re

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;]*?)\s*;")
_BRANCH = re.compile(r"^(@!?U?P\w+ )?BRA(?:\.\S+)?( !?U?P\w+,)? `?\(?(0x[0-9a-f]+)")


def loop_instructions(code: str) -> int | None:
    """Instructions that a warp issues in one trip through the main loop, by the shortest way; None without a loop.

    The main loop is the first one that is at least a quarter as long as the longest: Triton's kernels have their ragged
    tiles, which take more instructions, in a loop behind it. Branches over code for rare tiles are taken.
    """
    instructions = [(int(place, 16), text) for place, text in _INSTRUCTION.findall(code)]
    branches = {place: found for place, text in instructions if (found := _BRANCH.match(text))}
    loops = [(int(b[3], 16), place) for place, b in branches.items() if int(b[3], 16) < place]
    if not loops:
        return None
    longest = max(end - start for start, end in loops)
    start, end = next((s, e) for s, e in sorted(loops) if e - s >= longest / 4)
    cost = {start: 0}
    body = [(place, text) for place, text in instructions if start <= place <= end]
    for (place, text), (following, _) in zip(body, [*body[1:], (end + 1, "")], strict=True):
        if place not in cost:
            continue
        ways = [following]
        if (branch := branches.get(place)) is not None and place != end:
            target = int(branch[3], 16)
            conditional = branch[1] or branch[2]
            ways = [target] * (place < target <= end) + [following] * bool(conditional)
        for way in ways:
            spent = cost[place] + (text != "NOP")
            cost[way] = min(cost.get(way, spent), spent)
    return cost.get(end + 1)
