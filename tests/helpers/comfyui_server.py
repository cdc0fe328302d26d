"""A real ComfyUI for the tests: $COMFYUI_PATH or ~/comfy/ComfyUI, run by $COMFYUI_PYTHON or that checkout's own .venv.

$COMFYUI_FLAGS goes to its command line, such as ``--front-end-root`` with another version of its page.
"""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import websocket
from archive import install

ROOT = Path(__file__).parents[2]
COMFYUI = Path(os.environ.get("COMFYUI_PATH", Path.home() / "comfy" / "ComfyUI"))
PYTHON = Path(os.environ.get("COMFYUI_PYTHON", COMFYUI / ".venv" / "bin" / "python"))
TEXT = 3  # ComfyUI's number of a binary message that holds text
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")
DRAWN = {"IMAGECOMPARE": {"__value__": ["", ""]}}  # what the page sends for widgets that only draw
ENDINGS = ("execution_success", "execution_error", "execution_interrupted")
START_TIMEOUT, RUN_TIMEOUT = 600.0, 1500.0  # seconds; on a busy machine the first import alone takes minutes


def why_no_comfyui() -> str:
    """Why no server can be started, or an empty text."""
    if (COMFYUI / "main.py").is_file() and PYTHON.is_file():
        return ""
    return f"NO COMFYUI at {COMFYUI} with {PYTHON}: set COMFYUI_PATH and COMFYUI_PYTHON"


def _bring_example(folder: Path) -> None:
    """The picture that stands in every ComfyUI's input folder, which templates that start from a picture name."""
    folder.mkdir(exist_ok=True)
    shutil.copy(COMFYUI / "input" / "example.png", folder)


class Server:
    """ComfyUI on a free port, with this pack alone, as the registry ships it, in a base directory of its own.

    ``whole``: the pack as a clone has it. ``more``: variables of its environment. ``flags``: of its command line. Files
    may stand in ``base`` already.
    """

    def __init__(self, base: Path, *, whole: bool = False, more: dict | None = None, flags: tuple[str, ...] = ()):
        self.base, self.log = base, base / "server.log"
        (base / "custom_nodes").mkdir(parents=True, exist_ok=True)
        install(base / "custom_nodes" / "efficient-vdit", whole=whole)
        _bring_example(base / "input")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [
            str(PYTHON),
            "main.py",
            "--cpu",
            "--port",
            str(self.port),
            "--base-directory",
            str(base),
            "--disable-api-nodes",
        ]
        command += [
            "--database-url",
            f"sqlite:///{base}/comfy.db",
            *flags,
            *os.environ.get("COMFYUI_FLAGS", "").split(),
        ]
        environment = {**os.environ, **(more or {})}
        self.process = subprocess.Popen(
            command, cwd=COMFYUI, env=environment, stdout=self.log.open("w"), stderr=subprocess.STDOUT
        )
        self._wait()

    def _wait(self):
        end = time.monotonic() + START_TIMEOUT
        while time.monotonic() < end and self.process.poll() is None:
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        self.stop()
        raise RuntimeError(f"ComfyUI did not start:\n{self.text()[-3000:]}")

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def get(self, path: str):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict):
        """The status and the JSON answer."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.loads(answer.read() or "{}")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or "{}")

    def run(self, prompt: dict, events: list | None = None) -> dict:
        """Queue an API-format prompt and wait; returns its history entry, success or not.

        ``events`` receives every (type, data) that the page would hear over its websocket, pictures as ("preview",
        file's bytes).
        """
        client = uuid.uuid4().hex
        socket = websocket.create_connection(f"ws://127.0.0.1:{self.port}/ws?clientId={client}", timeout=RUN_TIMEOUT)
        try:
            status, answer = self.post("/prompt", {"prompt": prompt, "client_id": client})
            assert status == 200, json.dumps(answer, indent=1)
            for kind, data in _messages(socket):
                if events is not None:
                    events.append((kind, data))
                if kind in ENDINGS and data.get("prompt_id") == answer["prompt_id"]:
                    break
        except (websocket.WebSocketException, ConnectionError) as error:
            raise AssertionError(f"the prompt did not end: {error!r}\n{self.text()[-3000:]}") from None
        finally:
            socket.close()
        return self._history(answer["prompt_id"])

    def _history(self, prompt_id: str) -> dict:
        # The last event is sent a moment before the history is written.
        for _ in range(100):
            history = self.get(f"/history/{prompt_id}")
            if history:
                return history[prompt_id]
            time.sleep(0.1)
        raise AssertionError(f"no history for the prompt that ended:\n{self.text()[-3000:]}")

    def error(self, prompt: dict) -> str:
        """Queue a prompt that must fail while it runs; returns the message that the user sees."""
        entry = self.run(prompt)
        assert entry["status"]["status_str"] == "error", entry["status"]
        return next(
            data["exception_message"] for kind, data in entry["status"]["messages"] if kind == "execution_error"
        )

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _messages(socket):
    """(type, data) of the messages; binary ones are texts to show on a node, (its id, text), or preview pictures, after
    two numbers of 4 bytes."""
    while True:
        message = socket.recv()
        if isinstance(message, str):
            parsed = json.loads(message)
            yield parsed["type"], parsed["data"]
        elif int.from_bytes(message[:4], "big") == TEXT:
            end = 8 + int.from_bytes(message[4:8], "big")
            yield "text", (message[8:end].decode(), message[end:].decode())
        else:
            yield "preview", message[8:]


def to_api(workflow: dict, object_info: dict) -> dict:
    """A UI-format workflow as the server takes it: links resolved, notes dropped, widget values under their names."""
    sources = {link[0]: (str(link[1]), link[2]) for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in ("Note", "MarkdownNote"):
            continue
        assert node["mode"] == 0, f"{node['type']} is muted or bypassed"
        prompt[str(node["id"])] = {
            "class_type": node["type"],
            "inputs": _inputs(node, object_info[node["type"]]["input"], sources),
        }
    return prompt


def _inputs(node: dict, declared: dict, sources: dict) -> dict:
    linked = {i["name"]: list(sources[i["link"]]) for i in node.get("inputs", []) if i.get("link") is not None}
    values, inputs = list(node.get("widgets_values", [])), {}
    for name, kind, options in _fields(declared):
        if not isinstance(kind, list) and kind in DRAWN:
            inputs[name] = DRAWN[kind]
        widget = kind in WIDGETS or isinstance(kind, list)
        # With no value left it is a widget that a later ComfyUI appended: it has a default.
        if widget and not options.get("forceInput") and values:
            inputs |= _widget(name, kind, options, values)
        if name in linked:
            inputs[name] = linked[name]
    assert not values, f"{node['type']} has {len(values)} widget values too many: {values}"
    return inputs


def _fields(declared: dict) -> list[tuple[str, str | list, dict]]:
    both = {**declared.get("required", {}), **declared.get("optional", {})}
    # An input that takes several types ("FLOAT,INT") is a widget of the one that it names.
    options = {name: spec[1] if len(spec) > 1 else {} for name, spec in both.items()}
    return [(name, options[name].get("widgetType", spec[0]), options[name]) for name, spec in both.items()]


def _widget(name: str, kind, options: dict, values: list) -> dict:
    """Take a widget's value, and those of the widgets that its choice brings with it, from the front of ``values``."""
    taken = {name: values.pop(0)}
    if kind == "COMFY_DYNAMICCOMBO_V3":
        chosen = next(option for option in options["options"] if option["key"] == taken[name])
        for inner, kind_inside, more in _fields(chosen["inputs"]):
            taken |= _widget(f"{name}.{inner}", kind_inside, more, values)
    elif values and (options.get("control_after_generate") or name in ("seed", "noise_seed")):
        values.pop(0)
    return taken
