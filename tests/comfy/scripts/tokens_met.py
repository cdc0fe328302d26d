"""The matrices that the video's tokens really meet in a forward of each family's tiny model, beside those that the pack counts.
Prints JSON."""

import json
import sys

from host import load_pack, torch  # isort: skip
from tiny_models import CASES, build, missing, run  # isort: skip

load_pack()
(families,) = (m for name, m in sys.modules.items() if name.endswith("comfy_bridge.families"))


class SeenEnough(Exception):
    """A forward is over."""


def met(model, case) -> dict[str, int]:
    """By the name of each matrix of a layer, for how many tokens of one clip it was asked in a forward."""
    network, rows, clips = model.model.diffusion_model, {}, []

    def begun(_, inputs):
        """The latents come first, sound behind them where there is any."""
        clips.append(len(inputs[0] if isinstance(inputs[0], torch.Tensor) else inputs[0][0]))

    hooks = [network.register_forward_pre_hook(begun)]

    def over(*_):
        raise SeenEnough

    hooks.append(network.register_forward_hook(over))
    for number, layer in enumerate(families.find_family(network).layers(network)):
        for name, module in layer.named_modules():
            if hasattr(module, "in_features"):

                def asked(_, inputs, name=f"{number}.{name}"):
                    rows[name] = rows.get(name, 0) + inputs[0].numel() // inputs[0].shape[-1]

                rows[f"{number}.{name}"] = 0
                hooks.append(module.register_forward_pre_hook(asked))
    try:
        run(model, case)
    except SeenEnough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return {name: count // clips[0] for name, count in rows.items()}


facts = {}
for name, case in CASES.items():
    if missing(case) or case.left_dense:
        continue
    model = build(case)
    network = model.model.diffusion_model
    family, tokens = families.find_family(network), met(model, case)
    sizes = {
        f"{number}.{name}": module.weight.numel()
        for number, layer in enumerate(family.layers(network))
        for name, module in layer.named_modules()
        if hasattr(module, "in_features")
    }
    before, frames, size, behind = case.layout
    # The video, with or without what stands in one sequence with it, and VACE's streams once for each control video. Other
    # tokens are fewer, or more than all of these.
    video, whole = frames * size, before + frames * size + behind
    of_the_video = {count for times in (1, 2) for count in range(video * times, whole * times + 1)}
    facts[name] = {
        "counted": family.token_weights(network),
        "met": sum(sizes[matrix] for matrix, count in tokens.items() if count in of_the_video),
        "rows": {matrix: count for matrix, count in tokens.items() if matrix.startswith("0.")},
    }
print(json.dumps(facts))
