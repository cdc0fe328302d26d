"""What the workers of the tests run instead of a model."""

import ctypes
import os
import signal
import sys
import time

import torch

from efficient_vdit_core.parallel.sharding.weights import ShardedWeights


class Host:
    def __init__(self, settings, comm):
        self.settings, self.comm, self.built, self.held = settings, comm, [], []

    def open(self, message):
        if message.get("trouble") == "refuse" and self.comm.rank == message["rank"]:
            raise ValueError("the node NoSuchNode is missing here")
        if message.get("trouble") == "forget":
            self.held = []
        self.built.append(message["key"])
        self.held = [key for key in (*self.held, message["key"]) if key in message["keep"]]
        alone = str(self.comm.rank)
        return {
            "plan": alone if message.get("trouble") == "differ" else "same",
            "dtype": f"float of rank {alone}" if message.get("trouble") == "precision" else "float",
            "held": self.held,
        }

    def offload(self):
        self.built.append("offloaded")
        print("offloaded", file=sys.stderr, flush=True)

    def step(self, message, tensors):
        x = tensors["x"]
        if message["key"] not in self.held:
            raise KeyError(message["key"])
        if "layers" in message:
            return {"rank": self.comm.rank}, {"out": self.through_layers(message, x)}
        if message.get("rank") in (self.comm.rank, "all"):
            self.trouble(message)
        others = [r for r in range(self.comm.size) if r != self.comm.rank]
        for _ in range(message.get("rounds", 1)):
            sends = [[x] if r in others else [] for r in range(self.comm.size)]
            forms = [[(tuple(x.shape), x.dtype)] if r in others else [] for r in range(self.comm.size)]
            got = self.comm.start("test", sends, forms, x.device).wait()
        said = {"rank": self.comm.rank, "pid": os.getpid(), "built": self.built, "held": self.held}
        return said, {"sum": x + sum(got[r][0] for r in others)}

    def through_layers(self, message, x):
        """A model whose weights are shared out; within layer ``at`` trouble comes, while the next one is gathered."""
        torch.manual_seed(0)
        layers = torch.nn.Sequential(*[torch.nn.Linear(len(x), len(x)) for _ in range(message["layers"])])
        whole = layers(x).clone()
        shared = ShardedWeights(layers, list(layers), self.comm, x.device)
        if message.get("rank") == self.comm.rank:
            layers[message["at"]].register_forward_hook(lambda *_: self.trouble(message))
        out = layers(x)
        shared.remove()
        return torch.stack([out, whole])

    def trouble(self, message):
        kind = message["trouble"]
        print(f"rank {self.comm.rank} was asked for {kind}", file=sys.stderr, flush=True)
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if kind == "hold":  # the interpreter's lock, which a C function that is called so does not let go
            ctypes.PyDLL(None).usleep(int(message["seconds"] * 1e6))
        if kind == "sleep":
            time.sleep(message["seconds"])
        if kind == "print":
            print("a line of the log\n" * 50000, flush=True)
        if kind == "raise":
            raise KeyError("a layer that is not there")
        if kind == "mistake":
            raise ValueError("The prompt is too short to be shared out. Write a longer one.")
        if kind == "memory":
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
