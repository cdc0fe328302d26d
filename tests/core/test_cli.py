"""The evdit command as its users meet it: in its own process."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import efficient_vdit_core
from efficient_vdit_core import cli
from efficient_vdit_core.commands import ISSUES, generate, say
from efficient_vdit_core.limits.packages import install
from efficient_vdit_core.media.video import read_metadata
from efficient_vdit_core.plan import TilePlan

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
TINY = ["generate", "--model", "tiny", "--prompt", "a red circle moving right fast on a white background"]


def evdit(*args, cwd=None, timeout=300):
    return subprocess.run(
        [sys.executable, "-m", "efficient_vdit_core.cli", *args],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.mark.parametrize(
    ("program", "folder"),
    [(ROOT / "efficient_vdit_core", None), (Path("efficient_vdit_core"), ROOT)],
    ids=["path", "here"],
)
def test_a_python_that_is_isolated_runs_it_by_its_folder(tmp_path, program, folder):
    """ComfyUI's portable build for Windows is: neither the current folder nor PYTHONPATH is on its path."""
    command = [sys.executable, "-I", str(program), "doctor", "--json"]
    done = subprocess.run(command, cwd=folder or tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["folders"]["pack"] == str(ROOT)


def test_run_by_its_folder_it_looks_for_modules_where_that_lies(tmp_path):
    """In it Python would find `media` and `plan`, and take them for others' packages."""
    core = tmp_path / "core"
    core.mkdir()
    (core / "__main__.py").write_bytes((ROOT / "efficient_vdit_core" / "__main__.py").read_bytes())
    (core / "__init__.py").touch()
    (core / "cli.py").write_text("import sys\ndef main():\n    print(__name__, *sys.path)\n    return 3\n")
    done = subprocess.run([sys.executable, "-I", "core"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    name, first, *others = done.stdout.split()
    assert (name, first, done.returncode) == ("core.cli", str(tmp_path), 3) and not {"core", str(core)} & {*others}


def test_it_is_a_module_that_can_be_run():
    done = subprocess.run(
        [sys.executable, "-m", "efficient_vdit_core", "--version"], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.stdout == f"evdit {efficient_vdit_core.__version__}\n", done.stderr


def test_help_is_quick_because_it_imports_no_torch():
    code = (
        "import sys; from efficient_vdit_core.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'numpy', 'diffusers', 'transformers', 'imageio', 'PIL') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True
    ).stdout
    assert out.splitlines()[-1] == "[]"
    for command in ("generate", "demo", "doctor", "convert", "tinyworld"):
        assert command in out


def test_generate_writes_a_video_that_tells_how_it_was_made(tmp_path):
    out = tmp_path / "x.webp"
    done = evdit(
        *TINY, "--steps", "2", "--plan", "1:7", "--gamma", "0.5", "--seed", "3", "--zoom", "2", "--out", str(out)
    )
    assert done.returncode == 0, done.stderr
    meta = read_metadata(out)
    assert (meta["model"], meta["seed"], meta["steps"], meta["gamma"], meta["zoom"]) == ("tiny", 3, 2, 0.5, 2)
    assert meta["plan"]["reference_frames"] == 1
    assert f"wrote {out}: 29 frames of 128x128 at 24 fps" in done.stdout
    assert "12 attention calls sparse" in done.stdout and "took" in done.stdout  # 6 layers, 2 steps
    assert [p.name for p in tmp_path.iterdir()] == ["x.webp"]


def test_names_beyond_the_code_page_of_a_pipe_do_not_end_a_command(monkeypatch):
    pipe = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", newline="")
    monkeypatch.setattr("sys.stdout", pipe)
    say("writing 视频é.webp")  # before it is written
    assert pipe.buffer.getvalue() == rb"writing \u89c6\u9891" + "é.webp\n".encode("cp1252")


def test_demo_makes_a_clip_with_all_switched_on(tmp_path):
    done = evdit("demo", "--out", "clip.mp4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    meta = read_metadata(tmp_path / "clip.mp4")
    assert meta["sampler"] == "consistency" and "sparse at mean density" in meta["attention"]
    assert "seen in its pixels" in done.stdout
    said = [line.split()[0] for line in done.stdout.splitlines()]
    assert [word for word in said if word in ("loading", "encoding", "decoding", "writing")] == [
        "loading", "encoding", "decoding", "writing"
    ]  # fmt: skip


def test_doctor_tells_the_same_to_people_and_machines(tmp_path):
    text, machine = evdit("doctor"), evdit("doctor", "--json")
    assert machine.returncode == text.returncode == 0, text.stdout
    findings = json.loads(machine.stdout)
    assert findings["problems"] == []
    assert text.stdout.splitlines()[-1].endswith(f"Put all of this into a report: {ISSUES}")
    assert findings["devices"][0]["name"] == "cpu"
    assert [b["name"] for b in findings["attention_backends"] if b["available"]]
    assert all(b["reason"] for b in findings["attention_backends"])
    assert findings["folders"]["pack"] == str(Path(efficient_vdit_core.__file__).parents[1])
    for name in (*findings["packages"], *findings["versions"], *findings["folders"].values(), "frames"):
        assert name in text.stdout


def test_doctor_tells_what_auto_chose_and_why(tmp_path, monkeypatch):
    from efficient_vdit_core.attention.autotune.choose import default_book
    from efficient_vdit_core.attention.autotune.trial import Choice
    from efficient_vdit_core.commands import doctor

    monkeypatch.setenv("EVDIT_CACHE_DIR", str(tmp_path))
    assert doctor.examine()["folders"]["cache"] == str(tmp_path)
    assert "nothing yet: backends are measured" in doctor.format_findings(doctor.examine())
    (tmp_path / "kept").mkdir()
    monkeypatch.setenv("EVDIT_CACHE_DIR", str(tmp_path / "kept"))
    default_book().choices["cpu, long"] = Choice("frames", {"dense": 20.0, "frames": 2.5})
    default_book().choices["cpu, short"] = Choice("dense", {"dense": 1.0, "frames": 1.25})
    lines = [" ".join(line.split()) for line in doctor.format_findings(doctor.examine()).splitlines()]
    assert lines[lines.index("what auto chose") + 1 :][:4] == [
        "frames cpu, long",
        "ms of a trial: frames 2.50, dense 20.00",
        "dense cpu, short",
        "ms of a trial: dense 1.00, frames 1.25; no sparse backend is faster",
    ]


def test_doctor_survives_a_broken_installation(monkeypatch):
    from efficient_vdit_core.commands import doctor

    monkeypatch.setattr(doctor, "_version", lambda name: None)
    monkeypatch.setattr(doctor, "_devices", lambda: 1 / 0)
    findings = doctor.examine()
    assert any("'torch' is missing" in p and p.endswith(" -m pip install torch") for p in findings["problems"])
    assert any("ZeroDivisionError" in p for p in findings["problems"])
    assert "problems" in doctor.format_findings(findings)


def test_doctor_tells_of_packages_that_are_here_and_do_not_work(monkeypatch):
    from efficient_vdit_core.commands import doctor
    from efficient_vdit_core.media import video

    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    monkeypatch.setattr(video, "has_ffmpeg", lambda: False)  # imageio-ffmpeg without its program
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "av" else "1.0")
    no_video, no_text = doctor.examine()["problems"]
    assert "No .mp4 can be written" in no_video and no_video.endswith(install("av", instead="Write .gif and .webp"))
    assert re.search(r"text encoder's packages do not load \(ModuleNotFoundError: .*sentencepiece", no_text)


def test_doctor_says_what_trains_only_with_a_package():
    from efficient_vdit_core.commands.doctor import OPTIONAL

    assert "any training" in OPTIONAL["accelerate"] and "training Wan, CogVideoX" in OPTIONAL["diffusers"]


@pytest.mark.parametrize(
    ("python", "shown"), [("/opt/python3", "/opt/python3"), (r"C:\My Tools\python.exe", r'"C:\My Tools\python.exe"')]
)
def test_what_is_missing_is_installed_for_this_python(monkeypatch, python, shown):
    monkeypatch.setattr(sys, "executable", python)
    assert install("PIL", "accelerate") == f"Install it: {shown} -m pip install pillow accelerate"
    assert install("ray>=2.52") == f'Install it: {shown} -m pip install "ray>=2.52"'
    assert install("av", instead="Write a .gif") == f"Write a .gif, or install it: {shown} -m pip install av"


def test_doctor_needs_nothing_of_what_it_finds_missing():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'einops')));"
        "from efficient_vdit_core.commands.doctor import examine, format_findings; print(format_findings(examine()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Could not examine devices: ModuleNotFoundError: import of torch halted" in done.stdout
    assert "nothing yet: backends are measured" in done.stdout


def test_a_build_without_a_module_of_the_pack_is_told(monkeypatch, capsys):
    """As where an archive leaves one out by mistake."""

    def run(args):
        raise ModuleNotFoundError("No module named 'x'", name="efficient_vdit_core.distill.runs")

    monkeypatch.setattr(generate, "run", run)
    assert cli.main([*TINY, "--out", "x.gif"]) == 1
    assert "this build of the pack lacks efficient_vdit_core.distill.runs; use a clone" in capsys.readouterr().err


def test_a_package_that_does_not_load_is_told_in_one_line(monkeypatch, capsys):
    def run(args):
        try:
            raise OSError("undefined symbol: cuda")
        except OSError as error:
            raise ImportError("Could not import module 'MT5EncoderModel'.") from error

    monkeypatch.setattr(generate, "run", run)
    assert cli.main([*TINY, "--out", "x.gif"]) == 1
    assert "a package does not load (undefined symbol: cuda); 'evdit doctor'" in capsys.readouterr().err


BAD = [
    (["--out", "x.avi"], "must be one of .mp4, .gif, .webp"),
    (["--out", "no/x.mp4"], "does not exist"),
    (["--frames", "30"], "frames must be 4k+1"),
    (["--frames", "100001"], "frames is 100001, expected a whole number from 1 to 4,093"),
    (["--width", "8192", "--height", "8192"], "height is 8192, expected a whole number from 16 to 4,096"),
    (["--width", "9223372036854775808"], "width is 9223372036854775808, expected"),
    (["--width", "4096", "--height", "4096", "--frames", "4093"], "A video of 4093 frames of 4096x4096 takes about"),
    (["--guidance", "nan"], "guidance is nan, expected a number from 0"),
    (["--device", "meta"], "'meta' cannot be used"),
    (["--steps", "9" * 5000], "argument --steps: invalid int value: '999"),
    (["--height", "100"], "height must be a multiple of 16"),
    (["--steps", "0"], "steps must lie in 1..1000"),
    (["--segments", "30", "--steps", "20"], "steps must be at least segments"),
    (["--gamma", "2"], "gamma must lie in 0..1"),
    (["--seed", "-1"], "seed must lie in"),
    (["--seed", "4294967296"], "seed must lie in 0..4,293,918,720, got 4294967296: PyTorch repeats smaller ones"),
    (["--zoom", "0"], "--zoom must lie in 1..16"),
    (["--width", "2048", "--zoom", "16", "--out", "x.webp"], "webp holds frames of up to 16383 pixels"),
    (
        ["--width", "2048", "--zoom", "16", "--height", "16", "--frames", "1", "--out", "x.mp4"],
        "mp4 holds frames of up to 16384",
    ),
    (["--plan", "1:23"], "has 8; use 1:7"),
    (["--plan", "nothing.json"], "neither a pattern such as 1:7 nor a plan file"),
    (["--model", "no-such-folder"], "There is no model at 'no-such-folder'"),
    (["--model", "."], "is no model folder"),
    (["--device", "cuda:99"], "cannot be used"),
    (["--text-encoder", "gone"], "'gone' does not exist"),
    (["--plan", "a" * 5000], "(File name too long); check the path\n"),
    (["--model", "a/" * 2500], "(File name too long); check the path\n"),
]


@pytest.mark.parametrize("args, words", BAD, ids=[" ".join(a)[:60] for a, _ in BAD])
def test_a_mistake_gives_one_sentence_and_no_file(tmp_path, monkeypatch, capsys, args, words):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*TINY, "--out", "x.gif", *args]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("evdit: error: ") and error.count("\n") == 1 and len(error) <= 401
    assert not list(tmp_path.iterdir())


EARLY = [
    (["generate", "--plan", "3:9"], "has 8; use 3:5"),
    (["generate", "--model", "tiny-8-steps", "--steps", "4"], "steps must be at least segments"),
    (["search", "--speedup", "99"], "reach at most"),
    (["search", "--speedup", "2", "--seed", "4294967296"], "seed must lie in 0..4,293,918,720"),
    (["generate", "--residual-every", "6"], "--residual-every 6 does not fit: no layer leaves anything out"),
    (["generate", "--residual-every", "6", "--plan", "full"], "--residual-every 6 does not fit: no layer leaves"),
    (["generate", "--residual-every", "6", "--plan", "7:0", "--frames", "25"], "does not fit: no layer leaves"),
    (
        ["generate", "--residual-every", "-3", "--plan", "1:7"],
        "--residual-every -3 does not fit. residual_every is -3, expected 0 for none",
    ),
    (["generate", "--residual-every", "3", "--model", "tiny-8-steps-sparse"], "the schedule has 8 steps, expected"),
    (
        ["generate", "--residual-every", "20", "--plan", "1:7"],
        "does not fit: it would be renewed every 20 steps, of 20",
    ),
]


@pytest.mark.parametrize("args, words", EARLY, ids=[" ".join(a) for a, _ in EARLY])
def test_what_the_header_tells_is_refused_before_the_weights_are_read(tmp_path, monkeypatch, capsys, args, words):
    from efficient_vdit_core.pipeline import Pipeline

    monkeypatch.setattr(Pipeline, "from_model", lambda *_, **__: pytest.fail("the weights were read"))
    out = tmp_path / ("x.json" if args[0] == "search" else "x.gif")
    assert cli.main([*args, "--prompt", "a red circle", "--out", str(out)]) == 2
    assert words in capsys.readouterr().err


def test_a_plan_for_another_world_is_refused_before_the_weights_are_read(monkeypatch, capsys):
    from efficient_vdit_core.pipeline import Pipeline

    monkeypatch.setattr(Pipeline, "from_model", lambda *_, **__: pytest.fail("the weights were read"))
    assert cli.main(["tinyworld", "eval", "--world", "crossing", "--plan", "1:7"]) == 2
    assert "has 24; use 1:23" in capsys.readouterr().err


def test_a_path_that_does_not_exist_is_the_users_mistake(tmp_path, capsys):
    assert cli.main(["bench", "plot", str(tmp_path / "gone.json")]) == 2
    assert "gone.json" in capsys.readouterr().err


def test_a_plan_for_another_model_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    TilePlan.uniform(1, layers=32, family="opensora_plan").save("plan.json")
    Path("broken.json").write_text("{")
    for name, words in (("plan.json", "32 layers"), ("broken.json", "not valid JSON")):
        assert cli.main([*TINY, "--out", "x.gif", "--plan", name]) == 2
        assert words in capsys.readouterr().err


def test_a_truncated_checkpoint_is_refused(tmp_path, capsys):
    from efficient_vdit_core import assets

    for part in ("transformer", "vae", "text_encoder"):
        source = Path(assets.tiny_path(part))
        (tmp_path / part).mkdir()
        for file in source.iterdir() if source.is_dir() else [source]:
            (tmp_path / part / file.name).write_bytes(file.read_bytes())
    weights = next((tmp_path / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    out = tmp_path / "x.gif"
    assert cli.main([*TINY, "--model", str(tmp_path), "--steps", "1", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("evdit: error: ") and "Traceback" not in error
    assert not out.exists()


def test_errors_show_their_traceback_on_request():
    with pytest.raises(ValueError, match="4k\\+1"):
        cli.main([*TINY, "--out", "x.gif", "--frames", "30", "--debug"])
    with pytest.raises(ValueError, match="--repeats: it is '0'"):
        cli.main(["bench", "overhead", "--repeats", "0", "--debug"])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_debug_may_stand_at_any_place(tmp_path, capsys, place):
    command = ["tinyworld", "render", "--out", str(tmp_path / "clip.gif")]
    assert cli.main([*command[:place], "--debug", *command[place:]]) == 0
    assert (tmp_path / "clip.gif").is_file()
    with pytest.raises(ValueError, match="the following arguments are required: COMMAND"):
        cli.main(["--debug", "tinyworld"])


def test_other_failures_of_the_machine_are_one_line_too(monkeypatch, capsys):
    def run_into(error):
        monkeypatch.setattr(generate, "run", lambda args: (_ for _ in ()).throw(error))
        return cli.main([*TINY, "--out", "x.gif"])

    assert run_into(OSError(28, "No space left on device", "x.gif")) == 1
    assert "'x.gif' could not be read or written (No space left on device)" in capsys.readouterr().err
    assert run_into(RuntimeError("CUDA out of memory. Tried to allocate")) == 1
    assert "ran out of memory" in capsys.readouterr().err
    for of_the_cpu in (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError("Unable to allocate 3 TiB"),
    ):
        assert run_into(of_the_cpu) == 1
        assert "ran out of memory" in capsys.readouterr().err
    with pytest.raises(RuntimeError):
        run_into(RuntimeError("a defect of ours"))


@pytest.mark.parametrize("prompt", ["", "word " * 1000])
def test_prompts_of_0_and_5000_characters_are_made_with_a_warning(tmp_path, prompt):
    out = tmp_path / "x.gif"
    done = evdit("generate", "--prompt", prompt, "--steps", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert out.exists() and "WARNING: " in done.stderr and "Traceback" not in done.stderr
    assert read_metadata(out)["prompt"] == prompt


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_ctrl_c_stops_at_once_and_leaves_nothing(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "efficient_vdit_core.cli", *TINY, "--steps", "1000", "--out", str(tmp_path / "x.mp4")],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A test run that a script put into the background ignores Ctrl-C, and hands that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    seen = ""
    while not re.search(r"\b[1-9]\d*/1000", seen):
        piece = process.stderr.read(1)
        assert piece, f"it ended before sampling: {seen}"
        seen += piece
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (
        "interrupted; what was finished before stays, and no file is half written" in rest and "Traceback" not in rest
    )
    assert time.monotonic() - start < 30
    assert not list(tmp_path.iterdir())


def test_convert_turns_a_vae_checkpoint_into_safetensors(tmp_path, capsys):
    import torch

    from efficient_vdit_core.models.opensora_plan.checkpoint import load_vae
    from efficient_vdit_core.models.opensora_plan.config import VAEConfig
    from efficient_vdit_core.models.opensora_plan.vae import CausalVAE

    config = VAEConfig(hidden_size=4, hidden_size_mult=(1, 1, 1, 1), num_res_blocks=1, norm_num_groups=2)
    vae = CausalVAE(config)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    torch.save({"epoch": 3, "state_dict": vae.state_dict()}, tmp_path / "checkpoint.ckpt")
    target = tmp_path / "vae.safetensors"
    assert cli.main(["convert", "vae", str(tmp_path / "checkpoint.ckpt"), str(target)]) == 0
    assert str(target) in capsys.readouterr().out
    weights = load_vae(target).state_dict()
    assert all(torch.equal(weights[name], value) for name, value in vae.state_dict().items())


@pytest.mark.parametrize("part", ["vae", "text-encoder"])
def test_convert_refuses_what_it_cannot_read(tmp_path, capsys, part):
    (tmp_path / "checkpoint.ckpt").write_bytes(b"not a checkpoint")
    assert cli.main(["convert", part, str(tmp_path / "checkpoint.ckpt"), str(tmp_path / "x.safetensors")]) == 2
    assert capsys.readouterr().err.startswith("evdit: error: ")
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("part", ["vae", "text-encoder", "lora", "comfyui", "attention"])
def test_convert_refuses_a_target_before_it_reads(tmp_path, capsys, part):
    (tmp_path / "file").touch()
    (tmp_path / "folder.safetensors").mkdir()
    for target in ("file/x.safetensors", "folder.safetensors"):
        assert cli.main(["convert", part, str(tmp_path / "none.ckpt"), str(tmp_path / target)]) == 2
        assert "Cannot write" in capsys.readouterr().err
    assert cli.main(["convert", part, str(tmp_path / "none.ckpt"), str(tmp_path / "x.ckpt")]) == 2
    assert "does not end in .safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "source", "target"),
    [
        ("comfyui", "a.safetensors", "./a.safetensors"),
        ("comfyui", "a.safetensors", "link.safetensors"),
        ("comfyui", "m.safetensors.index.json", "m-00002-of-00002.safetensors"),
        ("comfyui", "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"),
        ("vae", "vae", "vae/x.safetensors"),
        ("lora", ".", "vae/x.safetensors"),
        ("lora", ".", "vae/link.safetensors"),
        ("lora", "vae", "a.safetensors"),
    ],
)
def test_convert_never_writes_over_what_it_reads(tmp_path, monkeypatch, capsys, part, source, target):
    from safetensors.torch import save

    monkeypatch.chdir(tmp_path)
    Path("vae").mkdir()
    shards = [f"m-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name in ("a.safetensors", "vae/x.safetensors", *shards):
        Path(name).write_bytes(save({}))
    Path("m.safetensors.index.json").write_text(json.dumps({"weight_map": {"b": shards[0], "c": shards[1]}}))
    Path("link.safetensors").symlink_to(tmp_path / "a.safetensors")
    Path("vae/link.safetensors").symlink_to(tmp_path / "a.safetensors")
    for module, write in (("distill.lora.comfy_names", "convert_weights"), ("models.opensora_plan.convert", "convert_vae"),
                          ("distill.families.published_lora", "merge_published")):  # fmt: skip
        monkeypatch.setattr(f"efficient_vdit_core.{module}.{write}", lambda *_: pytest.fail("it was written"))
    lora = ["--lora", "a.safetensors"] if part == "lora" else []
    assert cli.main(["convert", part, source, target, *lora]) == 2
    assert "which are read, and would be written over. Choose another name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "options", "told"),
    [
        ("attention", ["--lora", "nosuch"], "--lora is given with convert attention, expected convert lora"),
        ("vae", ["--strength", "1"], "--strength is given with convert vae, expected convert lora"),
        ("comfyui", ["--expert", "low"], "--expert is given with convert comfyui, expected convert lora"),
        ("lora", ["--int8"], "--int8 is given with convert lora, expected convert attention"),
    ],
)
def test_convert_refuses_options_that_it_would_not_hear(tmp_path, capsys, part, options, told):
    assert cli.main(["convert", part, "none", str(tmp_path / "x.safetensors"), *options]) == 2
    assert told in capsys.readouterr().err


def test_a_distilled_model_is_sampled_as_it_was_made(tmp_path):
    """Steps, guidance and plan come from the file; --plan full and --steps go over them."""
    from efficient_vdit_core import assets
    from efficient_vdit_core.models.distilled import read_metadata as read_distilled

    about = read_distilled(assets.tiny_path("transformer", "tiny-8-steps-sparse"))
    assert about is not None and about.tile_plan is not None
    sparsity = 1 - about.tile_plan.density(8, 6)
    assert (about.segments, about.steps, about.guidance) == (8, 8, 3.0) and sparsity > 0.5
    size = ["--prompt", "a red circle", "--height", "16", "--width", "16"]
    metas = []
    for name, more in (("made", []), ("dense", ["--plan", "full", "--steps", "16"])):
        out = tmp_path / f"{name}.mp4"
        assert cli.main(["generate", "--model", "tiny-8-steps-sparse", *size, *more, "--out", str(out)]) == 0
        metas.append(read_metadata(out))
    assert (metas[0]["steps"], metas[0]["segments"], metas[0]["guidance"]) == (8, 8, 1.0)
    assert metas[0]["plan"]["patterns"] == about.plan["patterns"] and "sparse" in metas[0]["attention"]
    assert metas[1]["steps"] == 16 and metas[1]["plan"]["reference_frames"] is None


def test_a_distilled_model_is_searched_at_any_number_of_noise_levels(tmp_path):
    out = tmp_path / "plan.json"
    size = ["--prompt", "a red circle", "--height", "16", "--width", "16"]
    assert (
        cli.main(["search", "--model", "tiny-8-steps", *size, "--probes", "2", "--speedup", "1.5", "--out", str(out)])
        == 0
    )
    assert TilePlan.load(out).density(8, 6) < 0.7


def test_a_search_by_the_output_goes_on_where_it_was_interrupted(monkeypatch, capsys, tmp_path):
    from efficient_vdit_core.search import output

    measured, measure = [], output.relative_error

    def measuring(*given):
        if measuring.stop and len(measured) == 5:
            raise KeyboardInterrupt
        measured.append(measure(*given))
        return measured[-1]

    def asked(name, *more):
        size = ["--prompt", "a red circle", "--height", "16", "--width", "16", "--guidance", "1"]
        by_output = ["--error", "output", "--candidates", "0,1", "--probes", "1", "--speedup", "1.5"]
        return ["search", *size, *by_output, "--out", str(tmp_path / name), *more]

    monkeypatch.setattr(output, "relative_error", measuring)
    measuring.stop = False
    assert cli.main(asked("whole.json")) == 0
    whole = [*measured]
    measured.clear()
    measuring.stop = True
    assert cli.main(asked("plan.json")) == 130 and not (tmp_path / "plan.json").exists()
    assert f"the same command goes on from {tmp_path / 'plan.measured'}" in capsys.readouterr().out
    measuring.stop = False
    with monkeypatch.context() as loading:
        loading.setattr(
            "efficient_vdit_core.pipeline.Pipeline.from_model",
            lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        assert cli.main(asked("misspelt.json")) == 130 and not (tmp_path / "misspelt.measured").exists()
    assert cli.main(asked("plan.json", "--seed", "3")) == 2
    assert "plan.measured was begun with other settings (seed: 0 -> 3)" in capsys.readouterr().err
    assert cli.main(asked("plan.json")) == 0
    assert measured == whole and len(whole) == 12, "none is measured twice"
    assert (tmp_path / "plan.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["plan.json", "whole.json"]


@pytest.mark.parametrize(("name", "beside"), [("plan", "plan_00001.json"), ("p" * 250, "plan_00001.json")])
def test_a_plan_is_not_written_over_one_that_appeared_meanwhile(monkeypatch, capsys, tmp_path, name, beside):
    from efficient_vdit_core.commands import search
    from efficient_vdit_core.pipeline import Pipeline

    out = tmp_path / f"{name}.json"
    monkeypatch.setattr(Pipeline, "from_model", lambda *_, **__: out.write_text("another"))
    monkeypatch.setattr(search, "_measure", lambda *_: None)
    monkeypatch.setattr(search, "_plan", lambda *_: TilePlan.uniform(1))
    assert cli.main(["search", "--prompt", "a red circle", "--speedup", "2", "--out", str(out)]) == 0
    assert out.read_text() == "another" and TilePlan.load(tmp_path / beside) == TilePlan.uniform(1)
    assert f"wrote {tmp_path / beside}" in capsys.readouterr().out


def test_an_interrupted_training_says_how_to_go_on(monkeypatch, capsys, tmp_path):
    from efficient_vdit_core.tinyworld.train.recipe import TinyRecipe

    monkeypatch.setattr(TinyRecipe, "train", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["tinyworld", "train", "--run", str(tmp_path / "run")]) == 130
    told = capsys.readouterr()
    assert "goes on from" in told.out and not told.err


def test_a_forecast_that_is_interrupted_has_nothing_to_go_on_from(monkeypatch, capsys, tmp_path):
    from efficient_vdit_core.commands import recipe_forecast

    monkeypatch.setattr(recipe_forecast, "say_forecast", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    (tmp_path / "c.toml").touch()
    asked = [
        "recipe",
        "three-stage",
        "--config",
        str(tmp_path / "c.toml"),
        "--out",
        str(tmp_path / "run"),
        "--plan-memory",
    ]
    assert cli.main(asked) == 130
    told = capsys.readouterr()
    assert "interrupted" in told.err and "goes on" not in told.out + told.err


def test_a_search_that_could_not_write_is_refused_before_it(monkeypatch, capsys, tmp_path):
    (tmp_path / "there.json").touch()
    cases = (("no/x.json", "does not exist"), ("x.txt", "must end in .json"), ("there.json", "exists already"))
    for name, told in cases:
        asked = ["search", "--prompt", "x", "--threshold", "0.2", "--model", "none", "--out", str(tmp_path / name)]
        assert cli.main(asked) == 2
        assert told in capsys.readouterr().err
    monkeypatch.setattr("efficient_vdit_core.storage.files.os.access", lambda *_: False)
    assert cli.main([*asked[:-1], str(tmp_path / "x.json")]) == 2
    assert "no permission" in capsys.readouterr().err


def test_built_in_models_are_named_where_one_is_not_known(capsys):
    assert cli.main([*TINY, "--model", "tiny-9-steps", "--out", "x.gif"]) == 2
    assert "tiny, tiny-8-steps, tiny-8-steps-sparse" in capsys.readouterr().err
