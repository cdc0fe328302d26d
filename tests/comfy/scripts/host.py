"""Loads ComfyUI (CPU) and the pack in this process, as ComfyUI itself does, for the other scripts here."""

import asyncio
import functools
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn

sys.argv = [sys.argv[0], "--cpu"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import torch  # noqa: E402
import utils  # noqa: E402, F401  # before the nodes put comfy/ on the path, whose utils.py would hide it

import nodes  # noqa: E402  # isort: skip

PACK = os.environ["EVDIT_PACK"]
torch.manual_seed(0)


@functools.cache
def load_pack() -> dict:
    """The pack's node classes by id."""
    assert asyncio.run(nodes.load_custom_node(PACK, module_parent="custom_nodes")), "the pack did not load"
    return {name: kind for name, kind in nodes.NODE_CLASS_MAPPINGS.items() if name.startswith("EVDiT")}


def skip(reason: str) -> NoReturn:
    """Ends the script: this ComfyUI lacks what it looks at."""
    print(json.dumps({"skipped": reason}))
    sys.exit()


def of_pack(name):
    """The module of the pack's core that ends so, imported where it was not yet."""
    root = next(found for found in sys.modules if found.endswith("efficient_vdit_core.plan")).removesuffix(".plan")
    return __import__(f"{root}.{name}", fromlist=["*"])


def call(kind, **inputs):
    """A V3 node's result: the tuple of its outputs."""
    return kind.execute(**inputs).args


def follow_layers(states, seen: list) -> Callable[[], None]:
    """Puts the layer of every call over the video into ``seen``, None beyond the last. What it returns ends that."""
    original = states.ForwardState.next_call

    def next_call(self, options, heads=0):
        place = original(self, options, heads)
        seen.append(place and place.layer)
        return place

    states.ForwardState.next_call = next_call
    return lambda: setattr(states.ForwardState, "next_call", original)


def log_lines() -> list[str]:
    """What the pack writes to the log from now on, in a list that grows."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log = logging.getLogger("efficient_vdit")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    return lines


def sample(model, sampler, sigmas, noise, text, mask=None, seed=0, cfg=1.0):
    """Sample, by default without guidance, through ComfyUI's own guider; returns latents."""
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    extra = {} if mask is None else {"attention_mask": mask}
    guider.set_conds([[text, extra]], [[text, extra]])
    guider.set_cfg(cfg)
    with torch.inference_mode():
        return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, seed=seed, disable_pbar=True)


def refusal(act) -> str:
    """What a ValueError says; "" where there is none."""
    try:
        act()
    except ValueError as error:
        return str(error)
    return ""
