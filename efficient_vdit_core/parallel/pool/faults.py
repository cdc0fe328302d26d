"""What is said of a pool that is lost: which rank failed, of what, and where the others are."""

from __future__ import annotations

from typing import Any

from .pending_request import Request

Fault = dict[str, Any]


class PoolFault(RuntimeError):
    """The pool is gone, or had to be given up; a new one must be started. ``lost``: the ranks that ended without a
    word. ``runs_on``: whether it was left running, where others have started it."""

    def __init__(self, text: str, lost: tuple[int, ...] = (), *, runs_on: bool = False) -> None:
        super().__init__(text)
        self.lost, self.runs_on = lost, runs_on


class Fatal(Exception):
    """The pool says that it ends, and of each rank what it died of."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__()
        self.faults = faults


def fault_of_lost(faults: list[Fault]) -> PoolFault:
    """After the end of a pool that has told of ``faults``; one that has told of none lost rank 0, which tells."""
    lost = tuple(f["rank"] for f in faults if f.get("lost")) if faults else (0,)
    return PoolFault("\n".join(_words(faults)) or "rank 0 ended without a word", lost)


def fault_of_hanging(late: Request, request: Request, places: dict[str, str], ranks: int) -> PoolFault:
    """After a timeout of ``late``, behind which ``request`` waited, or which is that: which rank does not answer, or what
    all of them are doing. ``places``: where each rank that answers is."""
    silent = [rank for rank in range(ranks) if str(rank) not in places]
    who = f"rank {silent[0]} does not answer" if silent else "all ranks answer but none has finished"
    what = "" if late is request else " what was asked of them before"
    advice = f" Raise {late.setting} if it takes that long." if late.setting else ""
    stacks = "".join(f"\nrank {rank} is at\n{place}" for rank, place in sorted(places.items()))
    text = f"The workers did not finish{what} in {late.seconds:.0f} s: {who}.{advice}{stacks}"
    return PoolFault(text, runs_on=not late.ours)


def _words(faults: list[Fault]) -> list[str]:
    """What the ranks said, each sentence once. A mistake needs no traceback: its sentence says what to do."""
    said: dict[str, set[int]] = {}
    for fault in faults:
        detail = "" if fault.get("mistake") or "traceback" not in fault else f"\n{fault['traceback']}"
        said.setdefault(f"{'' if fault.get('lost') else ':'} {fault['error']}{detail}", set()).add(fault["rank"])
    return [f"rank{'s' * (len(who) > 1)} {', '.join(map(str, sorted(who)))}{text}" for text, who in said.items()]
