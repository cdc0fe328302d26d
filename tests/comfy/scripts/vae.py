"""What Open-Sora-Plan's VAE has of the stock one's, and what is said while it is made. Prints JSON."""

import json
import logging

from host import call, load_pack, torch  # isort: skip
import comfy.model_management as mm  # isort: skip
import comfy.sd  # isort: skip

pack, said = load_pack(), []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger().addHandler(handler)
(vae,) = call(pack["EVDiTVAELoader"], vae_name="tiny (built in)")
quiet = list(said)
stock = comfy.sd.VAE(sd={})
torch.manual_seed(0)
with torch.inference_mode():  # of latents so far off that the pixels leave their range
    pixels = vae.decode(torch.randn(1, 4, 3, 4, 4) * 30)
    pieces = vae.decode_tiled(torch.randn(1, 4, 3, 8, 8) * 30, tile_x=4, tile_y=4, overlap=1, tile_t=2, overlap_t=1)


def out_of_memory_once(decode):
    """As on a GPU, where ComfyUI then decodes in tiles."""

    def run(*args, **options):
        vae.first_stage_model.decode = decode
        raise mm.OOM_EXCEPTION("out of memory")

    return run


with torch.inference_mode():
    still, decode = torch.randn(1, 4, 1, 8, 8), vae.first_stage_model.decode
    at_once, vae.first_stage_model.decode = vae.decode(still), out_of_memory_once(decode)
    in_tiles = vae.decode(still)
print(json.dumps({
    "missing": sorted(set(vars(stock)) - set(vars(vae))),
    "said": [line for line in quiet if "VAE" in line], "said of none": [line for line in said if "No VAE weights" in line],
    "shapes": [list(pixels.shape), list(pieces.shape)],
    "still": float((in_tiles - at_once).abs().max()),
    "range": [float(pixels.min()), float(pixels.max()), float(pieces.min()), float(pieces.max())],
}))  # fmt: skip
