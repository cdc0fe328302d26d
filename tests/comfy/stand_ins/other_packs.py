"""Samplers that treat a MODEL as those of other packs do: one sets its noise schedule in place, one passes values of its own."""

import comfy.sample
import comfy.samplers
import torch

import nodes

CHOICES = {
    "seed": ("INT", {}),
    "steps": ("INT", {}),
    "cfg": ("FLOAT", {}),
    "positive": ("CONDITIONING",),
    "negative": ("CONDITIONING",),
    "latent_image": ("LATENT",),
}


class ShiftingSampler:
    """As WanMoeKSampler: the MODEL's own schedule gets another shift, and stays the same object."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "sample", "tests"
    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",), "shift": ("FLOAT", {}), **CHOICES}})

    def sample(self, model, shift, seed, steps, cfg, positive, negative, latent_image):
        schedule = model.get_model_object("model_sampling")
        schedule.set_parameters(shift=shift, multiplier=1000)
        model.add_object_patch("model_sampling", schedule)
        return nodes.common_ksampler(model, seed, steps, cfg, "euler", "simple", positive, negative, latent_image)


class _Guider(comfy.samplers.CFGGuider):
    def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006  # as in ComfyUI
        model_options["transformer_options"] |= {"yt_positive": None, "yt_negative": None}
        return super().predict_noise(x, timestep, model_options, seed)


def _midpoints(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """A step of two stages, each told of in the options."""
    options = extra_args["model_options"].setdefault("transformer_options", {})
    inner = model.inner_model.inner_model
    options |= {
        "ExtraOptions": object(),
        "model_sampling": inner.model_sampling,
        "x_init": x,
        "y0_style_pos_weight": 0.0,
    }
    ones = x.new_ones(len(x))
    for i in range(len(sigmas) - 1):
        start, end, at, level = sigmas[i], sigmas[i + 1], x, sigmas[i]
        for row, part in enumerate((0.5, 1.0)):
            options |= {"row": row, "x_tmp": at, "sigma_next": end}
            denoised = model(at, level * ones, **extra_args)
            slope, level = (at - denoised) / level, start + part * (end - start)
            at = x + (level - start) * slope
        x = at
    return x


class MarkingSampler:
    """As RES4LYF's: values for network classes of its own go along with every evaluation."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "sample", "tests"
    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",), **CHOICES}})

    def sample(self, model, seed, steps, cfg, positive, negative, latent_image):
        guider = _Guider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        latent = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"])
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
        noise, sampler = comfy.sample.prepare_noise(latent, seed), comfy.samplers.KSAMPLER(_midpoints)
        samples = guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=seed)
        return ({"samples": samples.to(torch.float32).cpu()},)


NODE_CLASS_MAPPINGS = {"ShiftingSampler": ShiftingSampler, "MarkingSampler": MarkingSampler}
