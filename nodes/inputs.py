"""What several nodes share: the menu category and the socket type of a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from comfy_api.latest import io

from ..efficient_vdit_core.plan import TilePlan

CATEGORY = "Efficient-vDiT"
SCHEMA_FIELDS = {field.name for field in dataclasses.fields(io.Schema)}
Define = Callable[[type[io.ComfyNode]], io.Schema]

# What someone types who wants a faster video and knows no node of ours: it finds the two that do it. The page translates no
# such word, so the Chinese ones stand here too.
SPEED_WORDS = ("faster", "speed", "speed up", "accelerate", "efficient", "sparse", "wan", "加速", "更快")
# And who has just installed the pack: the page searches neither the menu's category nor a node's badge.
PACK_WORDS = ("Efficient-vDiT", "efficient vdit")

Input = TypeVar("Input", bound=io.Input)

# A seed's control on a new node: a search or a map is made again only when it is asked for. Earlier ComfyUI know only "randomize".
SEED_STAYS: Any = getattr(getattr(io, "ControlAfterGenerate", None), "fixed", True)

# Carries an efficient_vdit_core.plan.TilePlan between nodes.
Plan = io.Custom("EVDIT_PLAN")


def plan_ui(plan: TilePlan) -> dict[str, list[str]]:
    """What the page's chart of a plan is drawn from after a run: its text form. For ``NodeOutput(ui=...)``."""
    return {"evdit_plan": [plan.to_text()]}


def for_page(field: Input, **more: Any) -> Input:
    """An input with ``more`` for the page, in versions of ComfyUI too whose inputs take no such argument."""
    field.extra_dict = {**field.extra_dict, **more}
    return field


def advanced_inputs(*names: str) -> Callable[[Define], Define]:
    """Decorates ``define_schema``: Nodes 2.0 and the right panel show these inputs on demand, other pages as any."""

    def decorate(define: Define) -> Define:
        @wraps(define)
        def defined(cls: type[io.ComfyNode]) -> io.Schema:
            schema = define(cls)
            for field in schema.inputs:
                if field.id in names:
                    for_page(field, advanced=True)
            return schema

        return defined

    return decorate


def where_known(**fields: Any) -> dict[str, Any]:
    """Those fields of ``io.Schema`` that this version of ComfyUI has."""
    return {name: value for name, value in fields.items() if name in SCHEMA_FIELDS}


def search_words(*words: str) -> dict[str, Any]:
    """Words under which the page's search finds a node too, beside the pack's name."""
    return where_known(search_aliases=[*words, *PACK_WORDS])


def plan_is_told_again() -> dict[str, Any]:
    """A page that was loaded anew is told the plan of a run that is taken from the cache, and can draw it."""
    return where_known(has_intermediate_output=True)
