"""Scripts of tests/comfy/scripts in the python of the ComfyUI under test."""

import json
import os
import select
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
from comfyui_server import COMFYUI, PYTHON, ROOT, RUN_TIMEOUT

SCRIPTS = ROOT / "tests" / "comfy" / "scripts"
ALONE = ("parallel_host",)  # starts ComfyUI by itself, more than once


class Scripts:
    """What runs them, from one process with ComfyUI loaded, which starts with the first. ``more``: variables of their
    environment, beside this process's own at the time of a call."""

    def __init__(self, more: dict[str, str]):
        own = {"PYTHONPATH": str(COMFYUI), "EVDIT_PACK": str(ROOT), **more}
        self.more, self.loaded = own, None

    def run(self, name: str) -> dict:
        """The JSON of the script's last line. Skips the test where the script says why this ComfyUI cannot be asked."""
        environment = {"OMP_NUM_THREADS": "1", **os.environ, **self.more}
        with tempfile.TemporaryDirectory() as folder:
            asked = {"script": str(SCRIPTS / f"{name}.py"), "environment": environment,
                     "out": f"{folder}/out", "err": f"{folder}/err"}  # fmt: skip
            status = (self._alone if name in ALONE else self._forked)(asked)
            out, err = (Path(asked[stream]).read_text() for stream in ("out", "err"))
        assert status == 0, out[-2000:] + err[-4000:]
        found = json.loads(out.strip().splitlines()[-1])
        if "skipped" in found:
            pytest.skip(found["skipped"])
        return found

    def stop(self) -> None:
        if self.loaded is not None:
            os.killpg(self.loaded.pid, signal.SIGKILL)  # with the script that runs
            self.loaded.wait()
            self.loaded = None

    def _alone(self, asked: dict) -> int:
        with open(asked["out"], "w") as out, open(asked["err"], "w") as err:
            command = [str(PYTHON), asked["script"]]
            return subprocess.run(
                command, cwd=COMFYUI, env=asked["environment"], stdout=out, stderr=err, timeout=RUN_TIMEOUT
            ).returncode

    def _forked(self, asked: dict) -> int:
        if self.loaded is None:
            self.loaded = subprocess.Popen(
                [str(PYTHON), str(SCRIPTS / "serve.py")],
                cwd=COMFYUI,
                env=asked["environment"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        print(json.dumps(asked), file=self.loaded.stdin, flush=True)
        answered, _, _ = select.select([self.loaded.stdout], [], [], RUN_TIMEOUT)
        status = self.loaded.stdout.readline() if answered else ""
        if not status:  # it hangs, or ComfyUI could not be loaded, which stderr tells
            self.stop()
            raise AssertionError(f"{asked['script']} did not end within {RUN_TIMEOUT:.0f} s, or ComfyUI did not start")
        return int(status)
