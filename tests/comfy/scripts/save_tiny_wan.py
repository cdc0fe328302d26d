"""Writes a tiny random Wan as a file that ComfyUI's own loader recognises."""

import sys

target = sys.argv[1]
sys.argv = [sys.argv[0], "--cpu"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import torch  # noqa: E402
from comfy.ldm.wan.model import WanModel  # noqa: E402
from comfy.ops import disable_weight_init  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

torch.manual_seed(0)
model = WanModel(dim=256, num_heads=2, num_layers=2, ffn_dim=256, freq_dim=256, in_dim=16, out_dim=16, text_dim=64, cross_attn_norm=True,
                 model_type="t2v", operations=disable_weight_init, dtype=torch.float32)  # fmt: skip
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.05)
save_file({name: x.contiguous() for name, x in model.state_dict().items()}, target)
