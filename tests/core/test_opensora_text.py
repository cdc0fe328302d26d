import io
import json
import re

import pytest
import torch
from safetensors.torch import save_file

from efficient_vdit_core.limits.texts import MAX_PROMPT
from efficient_vdit_core.models.opensora_plan import captions, convert
from efficient_vdit_core.models.opensora_plan.text import (
    NEGATIVE_PROMPT,
    TEMPLATES,
    TextEncoder,
    clean_caption,
    read_text_encoder,
)

GOLDEN = [
    (
        TEMPLATES["a"].format("A cat walks on the grass"),
        "masterpiece , best quality , ultra-detailed , a cat walks on the grass.",
    ),
    (
        TEMPLATES["a"].format("A cat walks on the grass, realistic style."),
        "masterpiece , best quality , ultra-detailed , a cat walks on the grass, realistic style",
    ),
    (
        NEGATIVE_PROMPT,
        "nsfw, lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
        "low quality, normal quality, artifacts, signature, watermark, username, blurry.",
    ),
    ("一只猫 在草地上 https://a.com/x #123 hello.jpg 640x480", "一只猫 在草地上"),
    # As the reference has it: quotes and signs at an edge stay where a space stood beside them.
    ("123456 - “smart”", '"smart"'),
    (") , 'quoted' 50% ...", "'quoted' 50%"),
    ("x;y, x.jpg -- 192.168.0.1", "x;y,"),
    ("50% _ x.jpg : /", "50% _"),
    ("", ""),
]


@pytest.mark.parametrize(("text", "cleaned"), GOLDEN)
def test_cleaning(text, cleaned):
    assert clean_caption(clean_caption(text)) == cleaned


@pytest.mark.parametrize(("text", "cleaned"), GOLDEN)
def test_plain_captions_need_no_extra_packages(text, cleaned, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bs4", None)
    monkeypatch.setitem(__import__("sys").modules, "ftfy", None)
    assert captions.clean_caption(captions.clean_caption(text)) == cleaned


# Each made one of the rules, or the parser of HTML, take minutes, or fail; the fuzz test holds them to ten seconds.
HOSTILE = ["a", "a.", "1.", "a-", " ", "<a ", "<![", "<!--", "&amp;", "a.com@", "http:/", "中", ".png", "1:", '"']


@pytest.mark.parametrize("piece", HOSTILE)
def test_cleaning_bounds_the_text_first(piece, caplog):
    cleaned = captions.clean_caption(captions.clean_caption(piece * (100_000 // len(piece))))
    assert len(cleaned) <= MAX_PROMPT and "cut off" in caplog.text


@pytest.mark.parametrize(
    "text", ["see a.png.jpg/x and .png, b.mp4c", ".png", ".png.png", "a.jpeg b.JPG", "x.pngy\tz.pdf\n"]
)
def test_file_names_are_left_out_as_by_the_references_rule(text):
    pattern, replacement = captions._FILE_NAMES
    reference = r"[\S]+\.(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
    assert re.sub(pattern, replacement, text) == re.sub(reference, "", text)


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(ValueError, match="half a surrogate pair"):
        captions.clean_caption("a \ud800")


@pytest.fixture(scope="module")
def spiece():
    import sentencepiece

    model = io.BytesIO()
    lines = ["a red circle moves right", "the blue square", "one two three four"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=300, hard_vocab_limit=False, byte_fallback=True, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, spiece):
    from sentencepiece import SentencePieceProcessor
    from transformers import MT5Config, MT5EncoderModel

    folder = tmp_path_factory.mktemp("mt5")
    size = SentencePieceProcessor(model_proto=spiece).get_piece_size()
    config = MT5Config(
        vocab_size=size, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, is_encoder_decoder=False
    )
    torch.manual_seed(0)
    model = MT5EncoderModel(config)
    weights = {k: v.clone() for k, v in model.state_dict().items() if k != "encoder.embed_tokens.weight"}
    torch.save({**weights, "decoder.final_layer_norm.weight": torch.ones(16)}, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "spiece.model").write_bytes(spiece)
    convert.convert_text_encoder(folder, folder / "model.safetensors", dtype=torch.float32)
    return folder


def test_tokens_end_padding_and_length(folder):
    encoder = TextEncoder.from_folder(folder)
    ids, mask = encoder.tokenize(["", "a red circle moves right", "word " * 5000])
    assert ids.shape == (3, 512) and ids[0, 0] == 1 and mask[0].sum() == 1 and ids[0, 1:].eq(0).all()
    length = int(mask[1].sum())
    assert ids[1, length - 1] == 1 and ids[1, length:].eq(0).all()
    assert mask[2].all() and ids[2, 511] == 1


def test_padding_does_not_change_a_prompt(folder):
    encoder = TextEncoder.from_folder(folder)
    both, mask = encoder.encode(["a red circle", "the blue square moves right one two three"])
    alone, _ = encoder.encode(["a red circle"])
    torch.testing.assert_close(both[:1, : int(mask[0].sum())], alone, atol=1e-5, rtol=1e-5)


def test_a_folder_equals_the_one_file_made_from_it(folder, tmp_path):
    (tmp_path / "one.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    prompts = ["a red circle"]
    assert torch.equal(
        TextEncoder.from_folder(tmp_path / "one.safetensors").encode(prompts)[0],
        TextEncoder.from_folder(folder).encode(prompts)[0],
    )
    weights, config, _ = read_text_encoder(tmp_path / "one.safetensors")
    assert config["d_model"] == 16 and not any(k.startswith("decoder.") for k in weights)


def test_conversion_to_bf16_halves_the_file(folder, tmp_path):
    convert.convert_text_encoder(folder, tmp_path / "b.safetensors")
    assert TextEncoder.from_folder(tmp_path / "b.safetensors").model.shared.weight.dtype == torch.bfloat16


def test_missing_tokenizer_and_other_encoders(folder, tmp_path):
    weights, config, _ = read_text_encoder(folder)
    save_file(weights, tmp_path / "no_tokenizer.safetensors")
    with pytest.raises(ValueError, match=r"\(250112, 4096\)"):  # to such a file no tokenizer is worth the search
        read_text_encoder(tmp_path / "no_tokenizer.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no tokenizer"):
        read_text_encoder(tmp_path / "no_tokenizer.safetensors")
    save_file({"text_model.x": torch.zeros(1)}, tmp_path / "clip.safetensors")
    with pytest.raises(ValueError, match="not an mT5 encoder"):
        read_text_encoder(tmp_path / "clip.safetensors")


def test_the_embedding_under_its_second_name(folder, tmp_path):
    weights, config, spiece = read_text_encoder(folder)
    tied = {"encoder.embed_tokens.weight": weights["shared.weight"], "spiece_model": spiece}
    rest = {name: value for name, value in weights.items() if name != "shared.weight"}
    save_file({**rest, **tied}, tmp_path / "a.safetensors", metadata={"config": json.dumps(config)})
    assert torch.equal(read_text_encoder(tmp_path / "a.safetensors")[0]["shared.weight"], weights["shared.weight"])


@pytest.mark.parametrize("kind", [torch.float16, torch.float8_e4m3fn])
def test_what_mt5_cannot_be_computed_in_is_bfloat16(folder, tmp_path, kind):
    weights, config, spiece = read_text_encoder(folder)
    # Products of a size that float16 cannot hold, as the full encoder has them; the norms make it none of the results.
    large = {name: (500 if ".wi_" in name and kind == torch.float16 else 1) * v for name, v in weights.items()}
    files = {}
    for name, dtype in (("wide", torch.float32), ("narrow", kind)):
        files[name] = tmp_path / f"{name}.safetensors"
        cast = {k: v.to(dtype) for k, v in large.items()}
        save_file({**cast, "spiece_model": spiece}, files[name], metadata={"config": json.dumps(config)})
    wide, narrow = (TextEncoder.from_folder(files[name]).encode(["a red circle"])[0] for name in files)
    assert narrow.dtype == torch.bfloat16
    assert (narrow.float() - wide).abs().mean() < 0.1 * wide.abs().mean()


def test_a_tokenizer_that_git_left_out_is_named(folder, tmp_path):
    weights, config, _ = read_text_encoder(folder)
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    for content in (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4309802\n", b""):
        (tmp_path / "spiece.model").write_bytes(content)
        with pytest.raises(ValueError, match="spiece.model is damaged, or only the pointer"):
            read_text_encoder(tmp_path)


def test_a_configuration_of_another_depth_is_named(folder, tmp_path):
    weights, config, spiece = read_text_encoder(folder)
    save_file(
        {**weights, "spiece_model": spiece},
        tmp_path / "model.safetensors",
        {"config": json.dumps({**config, "num_layers": 3})},
    )
    with pytest.raises(ValueError, match="not the encoder that its configuration describes"):
        TextEncoder.from_folder(tmp_path)


def test_one_part_of_an_encoder_is_not_converted(folder, tmp_path):
    weights, config, _ = read_text_encoder(folder)
    late = ("encoder.block.1.layer.1.DenseReluDense.wo.weight", "encoder.final_layer_norm.weight")
    torch.save({k: v for k, v in weights.items() if k not in late}, tmp_path / "pytorch_model-00001-of-00002.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "spiece.model").write_bytes((folder / "spiece.model").read_bytes())
    with pytest.raises(ValueError, match=r"lacks 2 of the encoder's tensors, .*: it is one part of several"):
        convert.convert_text_encoder(tmp_path / "pytorch_model-00001-of-00002.bin", tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


def test_no_prompts_are_refused(folder):
    with pytest.raises(ValueError, match="no prompts"):
        TextEncoder.from_folder(folder).encode([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_kv": None}, "d_kv is None, expected a whole number from 1 to 4,096"),
        ({"num_heads": -1}, "num_heads is -1"),
        ({"num_layers": 20_000}, "num_layers is 20000, expected a whole number from 1 to 256"),
        ({"layer_norm_epsilon": "x"}, "layer_norm_epsilon is 'x', expected a number"),
        ({"feed_forward_proj": "\x1b[31m"}, r"feed_forward_proj is '\\x1b\[31m', expected gated-gelu"),
        ({"is_gated_act": 3}, "is_gated_act is 3, expected true or false"),
    ],
)
def test_a_configuration_of_impossible_values_is_refused_before_a_network_is_built(folder, tmp_path, change, message):
    weights, config, spiece = read_text_encoder(folder)
    metadata = {"config": json.dumps({**config, **change})}
    save_file({**weights, "spiece_model": spiece}, tmp_path / "model.safetensors", metadata)
    with pytest.raises(ValueError, match=message):
        read_text_encoder(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "tokenizer", [torch.empty(0, dtype=torch.uint8), torch.zeros(9, dtype=torch.uint8), torch.zeros(9)]
)
def test_a_tokenizer_of_nothing_is_refused(folder, tmp_path, tokenizer):
    weights, config, _ = read_text_encoder(folder)
    save_file({**weights, "spiece_model": tokenizer}, tmp_path / "model.safetensors", {"config": json.dumps(config)})
    with pytest.raises(ValueError, match="tokenizer of model.safetensors cannot be read"):
        read_text_encoder(tmp_path / "model.safetensors")
