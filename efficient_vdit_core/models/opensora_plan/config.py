"""What a checkpoint's config.json says about an Open-Sora-Plan v1.2 transformer or VAE.

Field names are those of the reference model's config files. Fields that do not change the forward pass are
ignored; values that would need another architecture are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from ...limits.numbers import number, whole
from ...limits.quote import quoted

PREDICTION_TYPES = ("epsilon", "v_prediction")
# What the VAE's latents are multiplied by for the transformer, which sees about unit variance then.
LATENT_SCALE = 0.18215

# Each of these picks another architecture in the reference code, so any other value is refused.
_REQUIRED_TRANSFORMER_VALUES: dict[str, tuple[Any, ...]] = {
    "downsampler": (None,),
    "use_rope": (True, None),
    "norm_type": ("ada_norm_single",),
    "attention_type": ("default",),
    "norm_elementwise_affine": (False,),
    "activation_fn": ("gelu-approximate",),
    "patch_size_t": (1,),
    "attention_bias": (True,),
    "only_cross_attention": (False, None),
    "double_self_attention": (False, None),
}

# The reference's constructor fills these in.
_MAY_BE_NULL = ("prediction_type", "interpolation_scale_t", "interpolation_scale_h", "interpolation_scale_w")

# Far beyond any model of this kind; a network is never built of more, not even without memory.
_MOST_TRANSFORMER = {"num_layers": 1024, "num_attention_heads": 1024, "attention_head_dim": 1536, "in_channels": 1024,
                     "out_channels": 1024, "patch_size": 64, "caption_channels": 65_536, "sample_size_t": 1024}  # fmt: skip
_MOST_VAE = {"hidden_size": 4096, "z_channels": 1024, "embed_dim": 1024, "num_res_blocks": 64, "norm_num_groups": 4096}

_REQUIRED_VAE_VALUES: dict[str, tuple[Any, ...]] = {
    "encoder_conv_in": ("Conv2d",),
    "encoder_conv_out": ("CausalConv3d",),
    "encoder_attention": ("AttnBlock3DFix",),
    "encoder_mid_resnet": ("ResnetBlock3D",),
    "encoder_resnet_blocks": (("ResnetBlock2D", "ResnetBlock2D", "ResnetBlock3D", "ResnetBlock3D"),),
    "encoder_spatial_downsample": (("Downsample", "Spatial2xTime2x3DDownsample", "Spatial2xTime2x3DDownsample", ""),),
    "encoder_temporal_downsample": (("", "", "", ""),),
    "decoder_conv_in": ("CausalConv3d",),
    "decoder_conv_out": ("CausalConv3d",),
    "decoder_attention": ("AttnBlock3DFix",),
    "decoder_mid_resnet": ("ResnetBlock3D",),
    "decoder_resnet_blocks": (("ResnetBlock3D",) * 4,),
    "decoder_spatial_upsample": (("", "SpatialUpsample2x", "Spatial2xTime2x3DUpsample", "Spatial2xTime2x3DUpsample"),),
    "decoder_temporal_upsample": (("", "", "", ""),),
    "double_z": (True,),
    "q_conv": ("CausalConv3d",),
    "use_quant_layer": (True,),
    "attn_resolutions": ((),),
}


@dataclass(frozen=True)
class DiTConfig:
    """Shape of an Open-Sora-Plan v1.2 transformer (class OpenSoraT2V, variant ROPE-L/122).

    Interpolation scales divide the token index on each axis before RoPE; they belong to the checkpoint, not to
    the size of a run. ``prediction_type`` is ``epsilon`` for every upstream v1.2 checkpoint; ``v_prediction`` is
    accepted for models trained that way (Open-Sora-Plan's own later versions, the built-in tiny model).
    """

    num_layers: int = 32
    num_attention_heads: int = 24
    attention_head_dim: int = 96
    in_channels: int = 4
    out_channels: int = 4
    patch_size: int = 2
    caption_channels: int = 4096
    sample_size: tuple[int, int] = (90, 160)
    sample_size_t: int = 8
    interpolation_scale_t: float = 1.0
    interpolation_scale_h: float = 1.5
    interpolation_scale_w: float = 2.0
    norm_eps: float = 1e-6
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        advice = "The config does not describe an Open-Sora-Plan v1.2 transformer; download it again."
        for name, high in _MOST_TRANSFORMER.items():
            whole(getattr(self, name), name, 1, high, advice)
        for size in self.sample_size:
            whole(size, "sample_size", 1, 4096, advice)
        for axis in "thw":
            number(
                getattr(self, f"interpolation_scale_{axis}"),
                f"interpolation_scale_{axis}",
                0,
                1e4,
                above=True,
                why=advice,
            )
        number(self.norm_eps, "norm_eps", 0, 1, why=advice)
        if self.attention_head_dim % 6:
            raise ValueError(
                f"attention_head_dim is {self.attention_head_dim}, expected a multiple of 6: 3D RoPE splits a head "
                "into three chunks of pairs. The config does not describe an Open-Sora-Plan v1.2 transformer."
            )
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type is {quoted(self.prediction_type)}, expected one of {', '.join(PREDICTION_TYPES)}. "
                "Correct it in the checkpoint's config.json."
            )

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream, heads x head_dim."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DiTConfig:
        """Read a config.json. Raises ValueError where it asks for an architecture that v1.2 does not have."""
        _refuse(values, _REQUIRED_TRANSFORMER_VALUES, "transformer")
        values = {k: v for k, v in values.items() if v is not None or k not in _MAY_BE_NULL}
        if type(size := values.get("sample_size")) is int:
            values["sample_size"] = [size, size]
        known = _known_fields(cls, values)
        size_t = known.get("sample_size_t", cls.sample_size_t)
        size_h, size_w = known.get("sample_size", cls.sample_size)
        if max(size_t, size_h, size_w) > 2**20:
            cls(**known)  # refuses them by name
        # The reference constructor's fallbacks for scales that the file leaves null or out.
        fallback: dict[str, Any] = {
            "interpolation_scale_t": float((size_t - 1) // 16 + 1) if size_t % 2 else size_t / 16,
            "interpolation_scale_h": size_h / 30,
            "interpolation_scale_w": size_w / 40,
        }
        return cls(**fallback | known)

    def to_dict(self) -> dict[str, Any]:
        """The config.json content, with the reference class name so that other tools recognise it."""
        return {
            "_class_name": "OpenSoraT2V",
            **_jsonable(asdict(self)),
            "patch_size_t": 1,
            "cross_attention_dim": self.hidden_size,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "use_rope": True,
            "downsampler": None,
            "attention_type": "default",
        }


@dataclass(frozen=True)
class VAEConfig:
    """Shape of the causal video VAE (CausalVAEModel_D4_4x8x8): 4x in time, 8x in height and width."""

    hidden_size: int = 128
    hidden_size_mult: tuple[int, ...] = (1, 2, 4, 4)
    z_channels: int = 4
    embed_dim: int = 4
    num_res_blocks: int = 2
    norm_num_groups: int = 32

    def __post_init__(self) -> None:
        for name, high in _MOST_VAE.items():
            whole(getattr(self, name), name, 1, high, "The config does not describe the v1.2 VAE; download it again.")
        for factor in self.hidden_size_mult:
            whole(factor, "hidden_size_mult", 1, 64, "The config does not describe the v1.2 VAE; download it again.")
        if len(self.hidden_size_mult) != 4:
            raise ValueError(
                f"hidden_size_mult has {len(self.hidden_size_mult)} levels, expected 4 (8x in space, 4x in time). "
                "The config does not describe the v1.2 VAE."
            )
        odd = [c for c in self.channels if c % self.norm_num_groups]
        if odd:
            raise ValueError(
                f"channel counts {odd} are not multiples of norm_num_groups={self.norm_num_groups}. "
                "Set norm_num_groups in the VAE's config.json to a divisor of every channel count."
            )

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the four resolution levels, full resolution first."""
        return tuple(self.hidden_size * m for m in self.hidden_size_mult)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VAEConfig:
        """Read a config.json; unknown keys (losses, learning rates) are ignored, other module types refused."""
        _refuse(values, _REQUIRED_VAE_VALUES, "VAE")
        return cls(**_known_fields(cls, values))

    def to_dict(self) -> dict[str, Any]:
        """The config.json content, module names included, so that upstream code can read it too."""
        modules = {name: accepted[0] for name, accepted in _REQUIRED_VAE_VALUES.items()}
        return {"_class_name": "CausalVAEModel", **_jsonable(asdict(self)), **_jsonable(modules)}


OSP_29X720P = DiTConfig(sample_size_t=8)
OSP_VAE = VAEConfig()

ConfigT = TypeVar("ConfigT", DiTConfig, VAEConfig)


def _known_fields(cls: type[ConfigT], values: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for field in (f for f in fields(cls) if f.name in values):
        value = values[field.name]
        value = found[field.name] = tuple(value) if isinstance(value, list) else value
        if not _of_kind(value, field.default):
            raise ValueError(
                f"The config has {field.name}={quoted(values[field.name])}, expected a value such as {_jsonable(field.default)!r}. "
                "It is damaged or belongs to another model; download it again."
            )
    return found


def _of_kind(value: Any, example: Any) -> bool:
    if isinstance(example, tuple):
        return isinstance(value, tuple) and len(value) == len(example) and all(map(_of_kind, value, example))
    if isinstance(example, int | float):
        return type(value) is int or (isinstance(example, float) and type(value) is float)
    return isinstance(value, type(example))


def _refuse(values: Mapping[str, Any], accepted: Mapping[str, tuple[Any, ...]], part: str) -> None:
    for name, choices in accepted.items():
        if name not in values:
            continue
        got = values[name]
        plain = tuple(map(_without_checkpointing, got)) if isinstance(got, list) else _without_checkpointing(got)
        if plain not in choices:
            raise ValueError(
                f"The {part} config has {name}={quoted(got)}, expected {_jsonable(choices[0])!r}: that is another architecture than "
                "Open-Sora-Plan v1.2. Use the weights of v1.2.0."
            )


def _without_checkpointing(name: Any) -> Any:
    # The suffix only turns on gradient checkpointing in the reference code.
    return name.removesuffix("_GC") if isinstance(name, str) else name


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _jsonable(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value
