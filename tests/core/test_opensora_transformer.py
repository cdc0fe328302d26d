"""The transformer against diffusers' AllegroTransformer3DModel, which is the same network with other RoPE scales."""

import pytest
import torch
from rounding import worst

from efficient_vdit_core.attention import TokenLayout
from efficient_vdit_core.attention.hook.override import make_attention_override
from efficient_vdit_core.attention.hook.state import FORWARD_KEY, ForwardState
from efficient_vdit_core.attention.report.report import AttentionReport
from efficient_vdit_core.attention.sdpa import OVERRIDE_KEY
from efficient_vdit_core.models.opensora_plan.config import OSP_29X720P, DiTConfig
from efficient_vdit_core.models.opensora_plan.rope import apply_rope, rope_table
from efficient_vdit_core.models.opensora_plan.transformer import OpenSoraT2V
from efficient_vdit_core.plan import TilePlan
from efficient_vdit_core.tiles import TokenGrid

SCALES = (1.0, 1.5, 2.0)
TINY = DiTConfig(num_layers=2, num_attention_heads=2, attention_head_dim=24, caption_channels=20)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = OpenSoraT2V(TINY).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def allegro(model):
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.AllegroTransformer3DModel(
        patch_size=2, patch_size_t=1, num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=2,
        cross_attention_dim=48, caption_channels=20, sample_height=8, sample_width=10, sample_frames=3,
        interpolation_scale_t=1.0, interpolation_scale_h=1.5, interpolation_scale_w=2.0,
    )  # fmt: skip
    reference.load_state_dict(model.state_dict(), strict=True)
    return reference.eval()


def allegro_rope(t, h, w, head_dim=24):
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    *tables, gt, gh, gw = get_3d_rotary_pos_embed_allegro(
        embed_dim=head_dim, crops_coords=((0, 0), (h, w)), grid_size=(h, w), temporal_size=t, interpolation_scale=SCALES
    )
    axes = [torch.as_tensor(g, dtype=torch.long) for g in (gt, gh, gw)]
    return tuple(tables), tuple(p.reshape(1, -1).contiguous() for p in torch.cartesian_prod(*axes).unbind(-1))


@pytest.mark.parametrize(("frames", "height", "width"), [(3, 8, 10), (1, 8, 10), (5, 4, 6)])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_the_reference_network(model, allegro, frames, height, width, padded):
    torch.manual_seed(1)
    x, context = torch.randn(2, 4, frames, height, width), torch.randn(2, 7, 20)
    mask = torch.tensor([[1] * 4 + [0] * 3, [1] * 6 + [0]]) if padded else torch.ones(2, 7, dtype=torch.long)
    timestep = torch.tensor([988.909, 3.25])
    with torch.no_grad():
        want = allegro(
            x, encoder_hidden_states=context, timestep=timestep, attention_mask=torch.ones(2, frames, height, width),
            encoder_attention_mask=mask, image_rotary_emb=allegro_rope(frames, height // 2, width // 2), return_dict=False,
        )[0]  # fmt: skip
        got = model(x, timestep, context, mask)
    assert want.abs().max() > 1
    assert (got - want).abs().max() < 1e-5


def test_rope_equals_the_reference_tables():
    from diffusers.models.attention_processor import AllegroAttnProcessor2_0  # noqa: F401  (same module as the rotation)
    from diffusers.models.embeddings import apply_rotary_emb_allegro

    torch.manual_seed(0)
    grid = (4, 5, 6)
    x = torch.randn(1, 120, 2, 96)
    tables, positions = allegro_rope(*grid, head_dim=96)
    want = apply_rotary_emb_allegro(x.transpose(1, 2), tables, positions).transpose(1, 2)
    got = apply_rope(x, rope_table(grid, SCALES, 96, device=x.device))
    # An angle, its cosine and sine, two products and their sum; cosines differ between processors by a step.
    torch.testing.assert_close(got, want, atol=worst(torch.float32, 6) * float(x.abs().max()) * 2**0.5, rtol=0)


def test_masked_text_equals_trimmed_text(model):
    torch.manual_seed(2)
    x, context, timestep = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 9, 20), torch.tensor([500.0])
    mask = torch.tensor([[1] * 5 + [0] * 4])
    with torch.no_grad():
        assert torch.equal(model(x, timestep, context, mask), model(x, timestep, context[:, :5]))
        rows = model(
            x.expand(2, -1, -1, -1, -1),
            timestep.expand(2),
            context.expand(2, -1, -1),
            torch.tensor([[1] * 5 + [0] * 4, [1] * 9]),
        )
        torch.testing.assert_close(rows[:1], model(x, timestep, context[:, :5]), atol=1e-5, rtol=1e-5)


def test_odd_sizes_are_padded_and_cropped(model):
    x = torch.randn(1, 4, 3, 7, 9)
    with torch.no_grad():
        out = model(x, torch.tensor([10.0]), torch.randn(1, 3, 20))
    assert out.shape == x.shape and out.isfinite().all()


def test_a_sparse_forward_equals_one_with_masked_attention(model, oracle):
    torch.manual_seed(3)
    x, context, timestep = torch.randn(1, 4, 5, 4, 6), torch.randn(1, 3, 20), torch.tensor([700.0])
    report = AttentionReport()

    def masked(func, q, k, v, heads, **kwargs):
        if q.shape != k.shape:
            return func(q, k, v, heads, **kwargs)
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        return oracle(q, k, v, 5, 6, [0, 3]).float().transpose(1, 2).flatten(-2)

    with torch.no_grad():
        want = model(x, timestep, context, transformer_options={OVERRIDE_KEY: masked})
        options = {
            OVERRIDE_KEY: make_attention_override(TilePlan.uniform(2), report),
            FORWARD_KEY: ForwardState(TokenLayout(TokenGrid(5, 2, 3))),
        }
        got = model(x, timestep, context, transformer_options=options)
        dense = model(x, timestep, context)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    assert (got - dense).abs().max() > 1e-3
    assert report.sparse == 2 and dict(report.dense) == {"cross-attention": 2}


def test_every_layer_is_named_to_the_attention(model):
    seen = []

    def spy(func, q, k, v, heads, transformer_options, **kwargs):
        seen.append([transformer_options[key] for key in ("block_type", "block_index", "total_blocks", "grid_sizes")])
        return func(q, k, v, heads, **kwargs)

    model(
        torch.randn(1, 4, 2, 4, 6), torch.tensor([1.0]), torch.randn(1, 3, 20), transformer_options={OVERRIDE_KEY: spy}
    )
    assert seen == [["double", i, 2, (2, 2, 3)] for i in (0, 0, 1, 1)]


def test_config_round_trip_and_fallback_scales():
    assert DiTConfig.from_dict(OSP_29X720P.to_dict()) == OSP_29X720P
    values = {
        **OSP_29X720P.to_dict(),
        "interpolation_scale_t": None,
        "interpolation_scale_h": None,
        "interpolation_scale_w": None,
    }
    config = DiTConfig.from_dict({**values, "sample_size_t": 24})
    assert (config.interpolation_scale_t, config.interpolation_scale_h, config.interpolation_scale_w) == (1.5, 3.0, 4.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("downsampler", "k333_s222"), ("use_rope", False), ("norm_type", "layer_norm"), ("patch_size_t", 2)],
)
def test_other_architectures_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        DiTConfig.from_dict({**OSP_29X720P.to_dict(), name: value})
