"""The names of the tiny models of comfy/scripts/tiny_models.py, by family."""

WAN = ["wan", "wan with a text as long as a frame", "wan i2v", "wan fun with a reference", "wan with a reference it ignores", "wan phantom",
       "wan with references in context", "wan phantom with a reference in context", "wan flow rvs", "wan 2.2 5B", "wan vace",
       "wan vace twice", "wan camera", "wan humo", "wan s2v", "wan dancer", "wan dancer over the whole music", "wan scail",
       "wan scail without a pose", "wan scail 2", "wan animate"]  # fmt: skip
HUNYUAN = ["hunyuan", "hunyuan with a reference", "hunyuan with padded text", "hunyuan 1.5"]
LTX = ["ltx", "ltx with guides", "ltx with dropped guides", "ltx with guides of full strength", "ltx audio", "ltx 2.5",
       "ltx audio with guides", "ltx audio with a voice"]  # fmt: skip
COGVIDEOX = ["cogvideox", "cogvideox i2v", "cogvideox 1.5"]
MINIMAX = ["h3", "h3 of even size", "h3 with a text as long as a frame", "h3 with guidance", "h3 with first and last frame",
           "h3 with a guide and its sound", "h3 with references", "h3 with vision tokens",
           "h3 with a kept part"]  # fmt: skip
KANDINSKY_6 = ["kandinsky 6", "kandinsky 6 with a reference", "kandinsky 6 with its last frame a reference"]
FAMILIES = [
    *WAN,
    *HUNYUAN,
    *LTX,
    *MINIMAX,
    *COGVIDEOX,
    "mochi",
    "cosmos",
    "cosmos predict2",
    "kandinsky 5",
    *KANDINSKY_6,
]
# One case of each kind of blocks, for what is too slow for all of them.
ONE_OF_EACH = ["wan", "wan i2v", "wan vace", "wan camera", "wan s2v", "wan scail", "wan animate", "hunyuan", "hunyuan 1.5", "ltx",
               "ltx audio", "h3", "h3 with guidance", "cogvideox", "kandinsky 5", "kandinsky 6"]  # fmt: skip
# Cases in which nothing may become sparse.
LEFT_DENSE_NAMES = ["wan causal", "wan dancer with images as long as the video", "ltx with weaker guides"]
