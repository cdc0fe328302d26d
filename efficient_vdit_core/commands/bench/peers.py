"""evdit bench peers: the arrow mask beside ComfyUI's own sparse attention."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from .. import say
from ..arguments import count

HEARS = ("seed", "device")

PEERS_PROMPTS = (
    "a red circle moving right fast on a white background",
    "a blue square moving up slowly on a black background",
)
SEARCH_PROMPTS = (
    "a green triangle moving left on a gray background",
    "a yellow circle moving down slowly on a purple background",
)


def add(commands: Any) -> argparse.ArgumentParser:
    peers = commands.add_parser("peers", help="the arrow mask beside ComfyUI's own sparse attention, at equal density")
    peers.add_argument("--model", default="tiny", help="a built-in model or a folder, default: %(default)s")
    peers.add_argument("--prompt", action="append", help="default: two of the tiny world")
    peers.add_argument(
        "--search-prompt", action="append", help="what the plans are searched on, default: two others like them"
    )
    peers.add_argument("--frames", type=count(5, 10_000), default=93, help="default: %(default)s, 24 latent frames")
    peers.add_argument(
        "--size", type=count(64, 8192), nargs=2, default=(128, 256), metavar=("H", "W"), help="default: 128 256"
    )
    peers.add_argument("--steps", type=count(1, 1000), default=3, help="noise levels to look at, default: %(default)s")
    peers.add_argument("--references", type=count(0, 1024), nargs="+", default=(1, 2, 4, 6), help="default: 1 2 4 6")
    return peers


def run(args: argparse.Namespace, device: Any) -> Iterator[list[dict[str, Any]]]:
    from ...bench.peers import CANDIDATES, PeerRecord, peer, searched_plans
    from ...pipeline import Pipeline
    from ...search.candidates import parse_candidates
    from ...search.probe import make_probe_override
    from ...search.record import ProbeRecord
    from ...search.watch import make_watching_override

    references, attend = tuple(args.references), peer()
    pipeline = Pipeline.from_model(args.model, device=str(device), dtype="float32")
    height, width = args.size
    choices = {"frames": args.frames, "height": height, "width": width, "steps": args.steps, "segments": args.steps}
    probed = ProbeRecord(parse_candidates(CANDIDATES))
    for prompt in args.search_prompt or SEARCH_PROMPTS:
        request = pipeline.request(prompt, guidance=1.0, seed=args.seed + 1, **choices)
        pipeline.observe(request, make_probe_override(probed))
    config = pipeline.transformer.config
    plans = searched_plans(probed, references, config.num_layers, config.num_attention_heads)
    record = PeerRecord(references, attend, plans)
    for prompt in args.prompt or PEERS_PROMPTS:
        request = pipeline.request(prompt, guidance=1.0, seed=args.seed, **choices)
        pipeline.observe(request, make_watching_override(record.add))
    rows = record.rows()
    assert record.layout is not None
    grid = record.layout.grid
    say(
        f"{args.model}, {grid.t} latent frames of {grid.tokens_per_frame} tokens; relative error of the attention, mean of calls"
    )
    say(f"layer  reference frames  {'method':<24}  density    error")
    for r in rows:
        say(f"{r['layer']:>5}  {r['reference_frames']:>16}  {r['method']:<24} {r['density']:>8.3f} {r['error']:>8.3f}")
    yield rows
