import json
import os
import signal

import pytest
import torch
from safetensors.torch import save_file

from efficient_vdit_core.models.opensora_plan import checkpoint, convert
from efficient_vdit_core.models.opensora_plan.config import DiTConfig, VAEConfig
from efficient_vdit_core.models.opensora_plan.transformer import OpenSoraT2V
from efficient_vdit_core.models.opensora_plan.vae import CausalVAE
from efficient_vdit_core.storage import weight_files

DIT = DiTConfig(
    num_layers=2, num_attention_heads=2, attention_head_dim=12, caption_channels=8, interpolation_scale_h=1.25
)
VAE = VAEConfig(hidden_size=4, hidden_size_mult=(1, 1, 1, 1), num_res_blocks=1, norm_num_groups=2)
NAME = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return OpenSoraT2V(DIT).state_dict()


@pytest.fixture
def folder(tmp_path, weights):
    save_file(weights, tmp_path / NAME)
    (tmp_path / "config.json").write_text(json.dumps(DIT.to_dict()))
    return tmp_path


def same(model, state_dict):
    return all(torch.equal(v, state_dict[k]) for k, v in model.state_dict().items())


def test_a_folder_a_file_and_metadata(folder, weights, tmp_path):
    for path in (folder, folder / NAME):
        model = checkpoint.load_transformer(path)
        assert model.config == DIT and same(model, weights) and not model.training
    weight_files.save_safetensors(tmp_path / "alone" / "x.safetensors", weights, {"config": json.dumps(DIT.to_dict())})
    assert checkpoint.load_transformer(tmp_path / "alone" / "x.safetensors").config == DIT
    assert [f.name for f in (tmp_path / "alone").iterdir()] == ["x.safetensors"]
    assert checkpoint.load_transformer(folder, dtype=torch.bfloat16).proj_out.weight.dtype == torch.bfloat16


def test_shards_and_a_missing_shard(tmp_path, weights):
    names = sorted(weights)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, part in halves.items():
        save_file({n: weights[n] for n in part}, tmp_path / shard)
    index = {"weight_map": {n: shard for shard, part in halves.items() for n in part}}
    (tmp_path / f"{NAME}.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(DIT.to_dict()))
    assert same(checkpoint.load_transformer(tmp_path), weights)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ValueError, match="b.safetensors is not beside it"):
        checkpoint.load_transformer(tmp_path)


@pytest.fixture
def shards(tmp_path, weights):
    """Two of them as diffusers writes them, and their index, beside another model's file."""
    names, stem = sorted(weights), "diffusion_pytorch_model"
    files = [f"{stem}-{i:05}-of-00002.safetensors" for i in (1, 2)]
    about = {"config": json.dumps(DIT.to_dict())}
    for i, file in enumerate(files):
        save_file({n: weights[n] for n in names[i::2]}, tmp_path / file, metadata=about)
    index = {"weight_map": {n: files[i] for i in (0, 1) for n in names[i::2]}}
    (tmp_path / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    save_file({"x": torch.zeros(1)}, tmp_path / "another.safetensors")
    return [tmp_path / file for file in files]


def test_one_shard_stands_for_its_model(shards, weights):
    for shard in shards:
        assert same(checkpoint.load_transformer(shard), weights)
        assert checkpoint.read_transformer_config(shard) == DIT
    (shards[0].parent / "diffusion_pytorch_model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"part 2 of 2 .*index\.json, which names all of them, is not beside it"):
        checkpoint.load_transformer(shards[1])


def test_a_neighbours_configuration_is_not_the_files(folder, weights):
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel", "num_layers": 30}))
    save_file(weights, folder / "alone.safetensors")
    assert checkpoint.read_transformer_config(folder / "alone.safetensors") == checkpoint.OSP_29X720P
    with pytest.raises(ValueError, match="2 layers, but the configuration says num_layers=32"):  # as published
        checkpoint.read_transformer(folder / "alone.safetensors")


@pytest.mark.parametrize(
    "beside", [None, {**DIT.to_dict(), "_class_name": None}, {"_class_name": "WanTransformer3DModel"}]
)
def test_weights_without_a_configuration_say_what_they_are_taken_for(tmp_path, beside, caplog):
    save_file({"a": torch.zeros(1)}, tmp_path / "osp_480p.safetensors")
    if beside:
        (tmp_path / "config.json").write_text(json.dumps(beside))
    for _ in range(2):  # by the header and by the pipeline
        assert checkpoint.read_transformer_config(tmp_path / "osp_480p.safetensors") == checkpoint.OSP_29X720P
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "osp_480p.safetensors" in record.getMessage()
    assert "29x720p" in record.getMessage() and "config.json" in record.getMessage()


def test_weights_with_a_configuration_say_nothing(folder, caplog):
    checkpoint.read_transformer(folder / NAME)
    assert not caplog.records


@pytest.mark.parametrize("left_out", [True, False])
def test_scales_that_are_left_out_are_null(left_out):
    """As in the reference's constructor: they follow from the size that the weights were trained for."""
    scales = {} if left_out else {f"interpolation_scale_{axis}": None for axis in "thw"}
    of = lambda **size: DiTConfig.from_dict({"_class_name": "OpenSoraT2V", **size, **scales})  # noqa: E731
    small = of(sample_size=[60, 80], sample_size_t=24)
    assert (small.interpolation_scale_t, small.interpolation_scale_h, small.interpolation_scale_w) == (1.5, 2.0, 2.0)
    square = of(sample_size=60, sample_size_t=17)
    assert square.sample_size == (60, 60)
    assert (square.interpolation_scale_t, square.interpolation_scale_h, square.interpolation_scale_w) == (2.0, 2.0, 1.5)
    said = DiTConfig.from_dict({"sample_size": [60, 80], "interpolation_scale_h": 1.0})
    assert said.interpolation_scale_h == 1.0
    assert DiTConfig.from_dict(small.to_dict()) == small


def test_endings_in_capitals_are_read(tmp_path, weights):
    save_file(weights, tmp_path / "A.SAFETENSORS", metadata={"config": json.dumps(DIT.to_dict())})
    assert same(checkpoint.load_transformer(tmp_path / "A.SAFETENSORS"), weights)


def test_a_shape_beyond_64_bits_is_a_damaged_file(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        checkpoint.read_transformer(tmp_path / "a.safetensors")


def test_exported_names_are_understood(folder, weights):
    def renamed(name):
        for new, old in (
            ("videodit_blocks.", "transformer_blocks."),
            (".self_atten.", ".attn1."),
            (".cross_atten.", ".attn2."),
        ):
            name = name.replace(old, new)
        return name.replace(".to_out.0.", ".proj_out.").replace(".to_", ".proj_")

    save_file({renamed(k): v for k, v in weights.items()}, folder / NAME)
    assert same(checkpoint.load_transformer(folder), weights)


def test_what_comfyui_saved_loads_again(folder, weights):
    saved = {f"model.diffusion_model.{k}": v for k, v in weights.items()} | {"v_pred": torch.zeros(0)}
    save_file(saved, folder / NAME)
    assert same(checkpoint.load_transformer(folder), weights)


def test_a_written_file_may_be_read_by_whom_a_new_file_may(tmp_path):
    (tmp_path / "plain").touch()
    weight_files.save_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(2)})
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plain", "x.safetensors"]


def test_a_full_disk_keeps_the_old_file(tmp_path):
    import resource

    file = tmp_path / "x.safetensors"
    weight_files.save_safetensors(file, {"a": torch.ones(2)})
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="x.safetensors could not be written"):
            weight_files.save_safetensors(file, {"a": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert weight_files.read_state_dict(file)[0]["a"].tolist() == [1, 1] and [f.name for f in tmp_path.iterdir()] == [
        file.name
    ]


def test_a_truncated_file_says_so(folder):
    size = (folder / NAME).stat().st_size
    for keep in (size - 10, 200, 5, 0):
        with open(folder / NAME, "r+b") as file:
            file.truncate(keep)
        with pytest.raises(ValueError, match="cut short or damaged"):
            checkpoint.load_transformer(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda sd: sd | {"temporal_transformer_blocks.0.x": torch.zeros(1)}, "v1.0 or v1.1"),
        (lambda sd: sd | {"pos_embed.proj.weight": torch.zeros(24, 12, 2, 2)}, "image-to-video"),
        (lambda sd: sd | {"transformer_blocks.0.attn1.norm_q.weight": torch.zeros(1)}, "v1.3"),
        (lambda sd: {"blocks.0.self_attn.q.weight": torch.zeros(1)}, "is Wan"),
        (lambda sd: {"diffusion_model.transformer_blocks.0.attn1.to_q.lora_up.weight": torch.zeros(1)}, "is a LoRA"),
        (lambda sd: {"something": torch.zeros(1)}, "no pos_embed.proj.weight"),
        (lambda sd: {k: v for k, v in sd.items() if "blocks.1.ff" not in k}, "4 tensors are missing"),
        (lambda sd: sd | {"extra": torch.zeros(1)}, "1 are unknown .extra"),
        (lambda sd: sd | {"proj_out.bias": torch.zeros(3)}, "another shape .proj_out.bias"),
    ],
)
def test_other_weights_are_named(folder, weights, edit, message):
    save_file(edit(dict(weights)), folder / NAME)
    with pytest.raises(ValueError, match=rf"^{folder.name} .*{message}"):
        checkpoint.load_transformer(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AllegroTransformer3DModel"}, "Allegro"),
        ({"interpolation_scale_t": 2.2, "interpolation_scale_h": 2.0, "interpolation_scale_w": 2.0}, "Allegro"),
        ({"_class_name": "OpenSoraInpaint"}, "image-to-video"),
        ({"_class_name": "LatteT2V"}, "another version"),
        ({"_class_name": "WanTransformer3DModel"}, "WanTransformer3DModel"),
        ({"num_layers": 3}, "num_layers=3"),
        ({"num_layers": 1000}, "num_layers=1000"),
        ({"num_layers": 20_000}, "num_layers is 20000, expected a whole number from 1 to 1,024"),
        ({"num_attention_heads": -1}, "num_attention_heads is -1, expected"),
        ({"sample_size": [10**30, 4]}, "sample_size is 10{30}, expected"),
        ({"interpolation_scale_h": 0.0}, "interpolation_scale_h is 0.0, expected a number above 0"),
        ({"norm_eps": "1" * 10**6}, "norm_eps='111.*111', expected a value such as"),
        ({"prediction_type": "flow"}, "prediction_type"),
    ],
)
def test_other_configurations_are_named(folder, change, message):
    (folder / "config.json").write_text(json.dumps({**DIT.to_dict(), **change}))
    with pytest.raises(ValueError, match=message):
        checkpoint.load_transformer(folder)


@pytest.mark.parametrize(
    "change",
    [{"num_layers": "2"}, {"sample_size": "90"}, {"sample_size_t": None}, {"norm_eps": "1e-6"}, {"patch_size": None}],
)
def test_values_of_another_kind_are_named(folder, change):
    ((name, _),) = change.items()
    (folder / "config.json").write_text(json.dumps({**DIT.to_dict(), **change}))
    with pytest.raises(ValueError, match=name):
        checkpoint.read_transformer(folder)
    with pytest.raises(ValueError, match="norm_num_groups"):
        VAEConfig.from_dict({"norm_num_groups": 0})


def test_files_that_are_no_weights(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    for path, message in (
        (tmp_path, "holds no weights"),
        (tmp_path / "absent.safetensors", "does not exist"),
        (tmp_path / "notes.txt", "not a weights"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoint.load_vae(path)


@pytest.fixture
def training_checkpoint(tmp_path):
    torch.manual_seed(1)
    averaged, raw = CausalVAE(VAE).state_dict(), CausalVAE(VAE).state_dict()
    content = {
        "epoch": 3,
        "optimizer_state": {},
        "state_dict": {"gen_model": raw},
        "ema_state_dict": {f"module.{k}": v for k, v in averaged.items()}
        | {"module.perceptual_loss.x": torch.zeros(1)},
    }
    (tmp_path / "config.json").write_text(json.dumps(VAE.to_dict()))
    torch.save(content, tmp_path / "checkpoint.ckpt")
    return tmp_path, averaged, raw, content


def test_a_training_checkpoint_gives_its_averaged_weights(training_checkpoint):
    folder, averaged, raw, content = training_checkpoint
    assert same(checkpoint.load_vae(folder), averaged)
    torch.save({**content, "ema_state_dict": {}}, folder / "checkpoint.ckpt")
    assert same(checkpoint.load_vae(folder), raw)


def test_converting_a_training_checkpoint(training_checkpoint, tmp_path):
    folder, averaged, _, _ = training_checkpoint
    target = tmp_path / "out" / "vae.safetensors"
    convert.convert_vae(folder / "checkpoint.ckpt", target)
    loaded = checkpoint.load_vae(target)
    assert loaded.config == VAE and same(loaded, averaged)
    with pytest.raises(ValueError, match="does not end in .safetensors"):
        convert.convert_vae(folder, tmp_path / "vae.bin")


def test_another_models_configuration_is_not_the_vaes(training_checkpoint, tmp_path):
    """In a folder that collects VAEs, as ComfyUI's has them."""
    folder, averaged, _, _ = training_checkpoint
    other = {**VAE.to_dict(), "_class_name": "AutoencoderKL", "hidden_size": 8}
    (folder / "config.json").write_text(json.dumps(other))
    alone = folder / "alone.safetensors"
    weight_files.save_safetensors(alone, averaged, {})
    with pytest.raises(ValueError, match=r"expected \(128"):  # as published
        checkpoint.load_vae(alone)
    (folder / "config.json").write_text(json.dumps(VAE.to_dict()))
    assert same(checkpoint.load_vae(alone), averaged)


def test_files_of_before_pytorch_1_6_are_read(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert weight_files.read_state_dict(tmp_path / "old.bin")[0]["a"].tolist() == [1, 1]


class Malicious:
    def __reduce__(self):
        return (os.system, ("touch should_not_exist",))


def test_code_in_a_checkpoint_never_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Malicious()}, tmp_path / "checkpoint.ckpt")
    with pytest.raises(ValueError, match="never unpickles. Download it again"):
        checkpoint.load_vae(tmp_path)
    assert not (tmp_path / "should_not_exist").exists()


def test_another_vae_is_named(tmp_path):
    save_file({"encoder.conv_in.conv.weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="v1.0 and v1.1"):
        checkpoint.load_vae(tmp_path / "a.safetensors")


def test_a_single_shard_needs_no_index(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "diffusion_pytorch_model-00001-of-00001.safetensors")
    assert weight_files.read_state_dict(tmp_path)[0]["a"].tolist() == [1, 1]


@pytest.mark.parametrize("names", [("a_raw", "ema"), ("high_noise.safetensors.index", "low_noise.safetensors.index")])
def test_two_models_in_a_folder_are_not_chosen_from(tmp_path, names):
    for value, name in enumerate(names):
        if name.endswith(".index"):
            (tmp_path / f"{name}.json").write_text("{}")
        else:
            save_file({"a": torch.full((2,), float(value))}, tmp_path / f"{name}.safetensors")
    with pytest.raises(
        ValueError, match=rf"holds 2 files of weights, such as {names[0]}.* and {names[1]}.*Name the file itself"
    ):
        weight_files.read_state_dict(tmp_path)
    save_file({"a": torch.full((2,), 5.0)}, tmp_path / "diffusion_pytorch_model.safetensors")
    assert weight_files.read_state_dict(tmp_path)[0]["a"].tolist() == [5, 5]


def test_shards_that_lack_what_their_index_names_are_refused(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    index = {"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="lack 1 tensors"):
        weight_files.read_state_dict(tmp_path)


def test_a_tensor_of_more_numbers_than_its_file_is_refused(tmp_path):
    """One number may stand for any shape: 28 kB were a VAE of 32 GB."""
    path = tmp_path / "checkpoint.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(4), "b": [torch.zeros(1).expand(2**30)]}}, path)
    with pytest.raises(ValueError, match="checkpoint.ckpt holds tensors of far more numbers than the file has"):
        weight_files.read_state_dict(path)
    whole = torch.arange(6.0).reshape(2, 3)
    torch.save({"a": whole, "b": whole.T, "c": whole[:, 1], "d": torch.zeros(0), "e": torch.zeros(())}, path)
    assert weight_files.read_state_dict(path)[0].keys() == {*"abcde"}
    torch.save({"position_ids": torch.arange(77).expand(2, -1)}, path)
    assert weight_files.read_state_dict(path)[0]["position_ids"].shape == (2, 77)


def test_containers_that_hold_themselves_or_one_another_often_are_looked_through_once(tmp_path):
    path, itself, doubled = tmp_path / "checkpoint.ckpt", [], []
    itself += [itself, itself]
    for _ in range(60):
        doubled = [doubled, doubled]
    torch.save({"a": torch.zeros(4), "b": itself, "c": doubled}, path)
    assert weight_files.read_torch_file(path)["a"].tolist() == [0] * 4
