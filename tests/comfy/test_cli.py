"""The command line with ComfyUI's own Python, which has no imageio-ffmpeg."""

import subprocess

from comfyui_server import PYTHON, ROOT, RUN_TIMEOUT


def evdit(*words, status: int = 0) -> str:
    command = [str(PYTHON), "-m", "efficient_vdit_core.cli", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=RUN_TIMEOUT)
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def test_the_demo_writes_an_mp4(tmp_path):
    said = evdit("demo", "--out", str(tmp_path / "clip.mp4"))
    assert "29 frames of 256x256" in said and (tmp_path / "clip.mp4").stat().st_size > 5000


def test_compare_reads_what_generate_wrote(tmp_path):
    for name, plan in (("a", "full"), ("b", "2:6")):
        evdit(
            "generate",
            "--prompt",
            "a red circle",
            "--steps",
            "2",
            "--plan",
            plan,
            "--out",
            str(tmp_path / f"{name}.mp4"),
        )
    assert "PSNR" in evdit("compare", str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4"))
