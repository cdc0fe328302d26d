"""A model and its VAE of 8 latent channels: from an empty latent to frames, with previews. Prints JSON."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

from host import call, load_pack, of_pack, torch  # isort: skip
import comfy.cli_args  # isort: skip
import folder_paths  # isort: skip
import latent_preview  # isort: skip
import nodes  # isort: skip

pack = load_pack()


checkpoint, export = of_pack("models.opensora_plan.checkpoint"), of_pack("tinyworld.train.export")
tiny = of_pack("assets").tiny_path
vae = of_pack("tinyworld.train.grow").grown(checkpoint.load_vae(tiny("vae", "tiny"), dtype=torch.float32), 8)
small = checkpoint.load_transformer(tiny("transformer", "tiny"), dtype=torch.float32)
torch.manual_seed(0)
large = type(small)(replace(small.config, in_channels=8, out_channels=8))
of_latents = ("pos_embed.proj.weight", "proj_out.weight", "proj_out.bias")
large.load_state_dict({k: v for k, v in small.state_dict().items() if k not in of_latents}, strict=False)

folder = Path(tempfile.mkdtemp())
export.export_vae(vae, folder / "vae")
export.export_transformer(large, folder / "transformer")
for kind, part in (("vae", "vae"), ("diffusion_models", "transformer")):
    folder_paths.add_model_folder_path(kind, str(folder / part))
name = "diffusion_pytorch_model.safetensors"
(model,) = call(pack["EVDiTModelLoader"], model_name=name, weight_dtype="fp32")
(loaded,) = call(pack["EVDiTVAELoader"], vae_name=name)
(built_in,) = call(pack["EVDiTVAELoader"], vae_name="tiny (built in)")

shown = []
comfy.cli_args.args.preview_method = comfy.cli_args.LatentPreviewMethod.Latent2RGB
previewer = latent_preview.get_previewer(torch.device("cpu"), model.model.latent_format)
text = [[torch.randn(1, 9, 64), {}]]
empty = {"samples": torch.zeros(1, 16, 8, 8, 8)}  # of EmptyHunyuanLatentVideo
with torch.inference_mode():
    (made,) = nodes.common_ksampler(model, 0, 2, 1.0, "euler", "simple", text, text, empty)
    shown = previewer.decode_latent_to_preview(made["samples"]).size
    frames = loaded.decode(made["samples"])
    same = (loaded.decode(made["samples"]) - built_in.decode(made["samples"][:, :4])).abs().max()
    refused = ""
    try:
        nodes.common_ksampler(model, 0, 2, 1.0, "euler", "simple", text, text, {"samples": torch.randn(1, 4, 8, 8, 8)})
    except ValueError as error:
        refused = str(error)
    back = loaded.encode(frames[0])
print(json.dumps({"latent": list(made["samples"].shape), "frames": list(frames.shape), "preview": list(shown),
                  "unlike the four alone": float(same), "encoded": list(back.shape), "refused": refused}))  # fmt: skip
