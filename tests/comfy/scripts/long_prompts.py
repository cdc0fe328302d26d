"""What the log says of prompts that are longer than the model reads, one after the other. Prints JSON."""

import json

from host import call, load_pack, log_lines  # isort: skip

pack, lines = load_pack(), log_lines()
(clip,) = call(pack["EVDiTTextEncoderLoader"], text_encoder_name="tiny (built in)")
told = []
for text in ("a red circle " * 300, "a red circle " * 300, "a blue square " * 300, "a red circle"):
    lines.clear()
    clip.tokenize(text)
    told.append([line for line in lines if "tokens, the model reads" in line])
print(json.dumps(told))
