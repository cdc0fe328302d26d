"""ComfyUI's patcher for a MODEL whose blocks' weights are shared out over the ranks. Runs in the workers.

The blocks' own parameters stay in the host's memory, as the loader made them, and are never moved: of each this rank's
part goes to the device, patched where the MODEL has patches. All else is loaded whole by ComfyUI itself.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy.utils
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ....efficient_vdit_core.parallel.sharding.communicator import Communicator
from ....efficient_vdit_core.parallel.sharding.weight_bytes import lay_out
from ....efficient_vdit_core.parallel.sharding.weights import ShardedWeights, weight_memory
from ..families import uncompiled
from .shard_rules import ShardRule

WHOLE_WEIGHTS, SHARDED_WEIGHTS = WEIGHTS = ["whole", "sharded"]
ROOT = "diffusion_model."
COMPILED = "torch.compile"
# Those of ComfyUI itself; the second one, which streams weights, where ComfyUI has it.
_PATCHERS = ("ModelPatcher", "ModelPatcherDynamic")
# Where a model keeps the parts that one of its clones has loaded.
HELD = "evdit_sharded_weights"
# And the order in which its blocks have run, whichever clone was loaded.
ORDER = "evdit_order_of_blocks"
# ComfyUI's own word for as much as there is.
_ALL = 1e32
GIB = 2**30


class ShardedWeightsPatcher(ModelPatcher):
    """Loads this rank's part of the blocks ``block_names`` (in the model), and counts that as the model's size.

    It cannot be loaded in part, nor unloaded in part: ComfyUI then unloads it whole.
    """

    block_names: tuple[str, ...] = ()
    comm: Communicator
    shared: ShardedWeights | None = None

    @classmethod
    def of(cls, model: ModelPatcher, block_names: tuple[str, ...], comm: Communicator) -> ShardedWeightsPatcher:
        """A clone of ``model``."""
        patched: Any = model.clone()
        patched.__class__ = cls  # what clones are made of, in ComfyUI too
        patched.block_names, patched.comm = block_names, comm
        # Whole weights, to ComfyUI, are other weights: each of the two is loaded anew after the other.
        patched.patches_uuid = uuid.uuid5(model.patches_uuid, "sharded weights")
        patched.size = WeightForecast.of(model, block_names, comm.size).sharded
        return patched

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        made = super().clone(*args, **kwargs)
        made.block_names, made.comm = self.block_names, self.comm
        return made

    def partially_load(self, device_to: Any, extra_memory: float = 0, force_patch_weights: bool = False) -> int:
        if not self._holds():
            self.unpatch_model(self.offload_device)  # what another clone has loaded
        return super().partially_load(device_to, extra_memory, force_patch_weights)

    def load(
        self,
        device_to: Any = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        let_go(self.model)
        self._check_room(device_to)
        super().load(device_to, _ALL, force_patch_weights, full_load=False)
        # In a mapped file weights lie at any address, and by it a CPU's kernels round otherwise.
        copy = mm.is_device_cpu(device_to)
        with self.use_ejected():
            for name, module in self.model.named_modules():
                if not self._in_block(name):
                    module._apply(lambda x: x.to(device_to, copy=copy), recurse=False)
            root, blocks = self.model.diffusion_model, [self.model.get_submodule(name) for name in self.block_names]
            # Not bound to this clone, which the model would then keep.
            before = root.register_forward_pre_hook(partial(_give_way, self.model, self.patches_uuid))
            order = vars(self.model).setdefault(ORDER, {})
            self.shared = ShardedWeights(root, blocks, self.comm, device_to, self._changes(device_to), order)
            self.shared.handles.append(before)
            setattr(self.model, HELD, self.shared)
        self.model.model_loaded_weight_memory = self.model_size()

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        if unpatch_weights:
            let_go(self.model)
        super().unpatch_model(device_to, unpatch_weights)

    def partially_unload(self, *_: Any, **__: Any) -> int:
        return 0

    def __del__(self) -> None:
        if self._holds():
            let_go(self.model)
            self.model.model_loaded_weight_memory = 0
        super().__del__()

    def _holds(self) -> bool:
        return self.shared is not None and getattr(self.model, HELD, None) is self.shared

    def _load_list(self, *args: Any, **kwargs: Any) -> list[Any]:
        return [entry for entry in super()._load_list(*args, **kwargs) if not self._in_block(entry[-3])]

    def _in_block(self, name: str) -> bool:
        return f"{name}.".startswith(tuple(f"{block}." for block in self.block_names))

    def _changes(self, device: Any) -> dict[str, Any]:
        """The blocks' weights that ComfyUI would patch when it loads them, and its settings of their modules."""
        changes = {}
        for *_, name, module, params in super()._load_list():
            if not self._in_block(name):
                continue
            comfy.model_patcher.wipe_lowvram_weight(module)
            module.comfy_force_cast_weights = self.force_cast_weights
            if self.force_cast_weights and hasattr(module, "comfy_cast_weights"):
                module.prev_comfy_cast_weights, module.comfy_cast_weights = module.comfy_cast_weights, True
            for key in (f"{name}.{param}" for param in params):
                if key in self.patches:
                    changes[key.removeprefix(ROOT)] = partial(self._patched, key, device)
        return changes

    def _patched(self, key: str, device: Any) -> Tensor:
        """A weight as ComfyUI patches it; the model keeps its own. (Not every version can give it without setting it.)"""
        self.patch_weight_to_device(key, device_to=device)
        made = comfy.utils.get_attr(self.model, key)
        comfy.utils.set_attr_param(self.model, key, self.backup.pop(key).weight)
        return made

    def _check_room(self, device: Any) -> None:
        if mm.is_device_cpu(device):
            return
        size, free = self.model_size() / GIB, mm.get_free_memory(device) / GIB
        if size > free:
            raise ValueError(
                f"The weights take {size:.1f} GiB on {device} with blocks shared out over {self.comm.size} ranks, but {free:.1f} GiB are "
                "free. Name more GPUs, load a quantised file of the model, or free that GPU."
            )


def let_go(base: Any) -> None:
    """Free what a clone holds of the model ``base`` and its clones, the blocks' parts, if one does."""
    shared: ShardedWeights | None = getattr(base, HELD, None)
    if shared is not None:
        shared.remove()
        setattr(base, HELD, None)


def _give_way(base: Any, mine: uuid.UUID, *_: Any) -> None:
    """Where a clone with whole weights has been loaded since: its weights have other patches than ``mine``."""
    if base.current_weight_patches_uuid != mine:
        let_go(base)


def share_out_weights(model: Any, rule: ShardRule, comm: Communicator) -> Any:
    """A clone of a shardable MODEL that keeps 1/P of its blocks' weights on the device. Raises ValueError where it cannot
    be."""
    check_weights(model, rule)
    if getattr(model, "is_dynamic", lambda: False)():
        raise ValueError(
            "The workers' ComfyUI streams weights, which cannot be shared out as well. Set weights to whole."
        )
    return ShardedWeightsPatcher.of(model, block_names(model, rule), comm)


def check_weights(model: Any, rule: ShardRule) -> None:
    """Raises ValueError where a MODEL's weights cannot be shared out."""
    why = ""
    names = block_names(model, rule)
    if type(model).__name__ not in _PATCHERS or type(model).__module__ != comfy.model_patcher.__name__:
        why = f"its loader keeps them in a way of its own ({type(model).__name__})"
    elif hasattr(model.get_model_object("diffusion_model"), "_orig_mod") or any(
        COMPILED in found for found in model.wrappers.values()
    ):
        why = "the model is compiled (torch.compile), which expects them in one place"
    elif not mm.is_device_cpu(model.offload_device):
        why = "ComfyUI runs with --highvram or --gpu-only and keeps all of them on the GPU; start it without"
    elif any(key.startswith(names) for key in model.weight_wrapper_patches):
        why = "another node changes them in every forward pass"
    if why:
        raise ValueError(f"The weights cannot be shared out: {why}. Set weights to whole, or remove that node.")
    for name in names:
        lay_out(model.model.get_submodule(name))


def block_names(model: Any, rule: ShardRule) -> tuple[str, ...]:
    """The names in the model of all blocks of its rows."""
    diffusion_model = uncompiled(model.get_model_object("diffusion_model"))
    return tuple(
        f"{ROOT}{row.path}.{number}"
        for row in rule.rows
        for number in range(len(getattr(diffusion_model, row.path, ())))
    )


@dataclass(frozen=True)
class WeightForecast:
    """Bytes on each of the ranks: of all weights ``whole``, of them ``sharded``; and ``gathered`` by it in each forward."""

    whole: int
    sharded: int
    gathered: int = 0

    @classmethod
    def where_possible(cls, model: Any, rule: ShardRule, ranks: int) -> WeightForecast:
        """Where the weights cannot be shared out, such as GGUF's, they are whole either way."""
        try:
            check_weights(model, rule)
        except ValueError:
            whole = mm.module_size(model.model)
            return cls(whole, whole)
        return cls.of(model, block_names(model, rule), ranks)

    @classmethod
    def of(cls, model: Any, names: tuple[str, ...], ranks: int) -> WeightForecast:
        about = weight_memory([model.model.get_submodule(name) for name in names], ranks)
        whole = mm.module_size(model.model)
        return cls(whole, max(0, whole - about.whole) + about.parts + about.room, about.parts * (ranks - 1))

    def text(self, weights: str) -> str:
        """A line for the report."""
        whole, sharded, gathered = (f"{size / GIB:.2f} GiB" for size in (self.whole, self.sharded, self.gathered))
        if weights == WHOLE_WEIGHTS:
            but = f"; with weights sharded it would be {sharded}" if self.gathered else ""
            return f"Weights take {whole} on each device{but}."
        return (
            f"Weights take {sharded} on each device in place of {whole}; each gathers {gathered} in every evaluation."
        )
