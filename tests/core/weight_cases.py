"""What gloo ranks compute with weights shared out. Each function takes (rank, ranks) and returns JSON-able facts."""

import contextlib
import copy

import torch
from torch import nn

from efficient_vdit_core.parallel.sharding.communicator import Communicator
from efficient_vdit_core.parallel.sharding.weights import GATHER_WEIGHTS, ShardedWeights, weight_memory

WIDTH = 33
CPU = torch.device("cpu")


class Quantised(torch.Tensor):
    """Numbers of 8 bits and a scale for each row, as one tensor."""

    @staticmethod
    def __new__(cls, numbers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)

    def __init__(self, numbers, scale):
        self.numbers, self.scale = numbers, scale

    def __tensor_flatten__(self):
        return ["numbers", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, about, shape, stride):
        return Quantised(inner["numbers"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is not torch.ops.aten.detach.default:
            raise NotImplementedError(function)
        return Quantised(args[0].numbers, args[0].scale)

    def __deepcopy__(self, memo):
        return nn.Parameter(Quantised(self.numbers.clone(), self.scale.clone()), requires_grad=False)

    def floats(self):
        return self.numbers * self.scale


class Double(nn.Module):
    """A block with what is hard to share out: odd sizes, buffers, several dtypes, strides, one weight in two places."""

    def __init__(self):
        super().__init__()
        self.wide, self.back = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH, bias=False)
        self.again = nn.Linear(WIDTH, 3 * WIDTH)
        self.again.weight = self.wide.weight
        self.thin = nn.Parameter(torch.randn(WIDTH, 5).bfloat16())
        self.eighth = nn.Parameter(torch.randn(5, WIDTH).to(torch.float8_e4m3fn), requires_grad=False)
        self.lying = nn.Parameter(torch.randn(3, 2, WIDTH).permute(2, 0, 1))
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("table", torch.randn(WIDTH))
        self.register_buffer("steps", torch.arange(WIDTH), persistent=False)
        self.nothing = nn.Parameter(torch.empty(0))
        self.strides = []

    def forward(self, x):
        self.strides.append(self.lying.stride())
        x = x + self.back(torch.tanh(self.wide(x) + self.again(x)))
        x = x + (x.bfloat16() @ self.thin @ self.eighth.bfloat16()).float() * self.scale
        return x * self.table + self.lying.sum((1, 2)) + self.steps


class Single(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.inner.weight = tied
        numbers = torch.randint(-127, 127, (WIDTH, WIDTH), dtype=torch.int8)
        self.eight = nn.Parameter(Quantised(numbers, torch.rand(WIDTH, 1) / 64), requires_grad=False)

    def forward(self, x):
        return self.inner(x) + x @ self.eight.floats()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.doubles = nn.ModuleList(Double() for _ in range(6))
        self.singles = nn.ModuleList(Single(self.leave.weight) for _ in range(2))
        self.order, self.fails_at = None, None

    def blocks(self):
        return [*self.doubles, *self.singles]

    def forward(self, x):
        x = self.enter(x)
        blocks = self.blocks()
        for number in self.order or range(len(blocks)):
            if number == self.fails_at:
                raise InterruptedError("cancelled")
            x = torch.tanh(blocks[number](x))
        return self.leave(x)


class Watched(Communicator):
    """Notes when a gather starts and is awaited."""

    def __init__(self, events):
        super().__init__()
        self.events = events

    def start_gather(self, name, part, row):
        self.events.append("start")
        work = super().start_gather(name, part, row)
        outer = self

        class Work:
            def wait(self):
                outer.events.append("wait")
                return work.wait()

        return Work()


def made(comm=None, **kwargs):
    torch.manual_seed(0)
    model = Model().requires_grad_(False).eval()
    whole = copy.deepcopy(model)
    return model, whole, ShardedWeights(model, model.blocks(), comm or Communicator(), CPU, **kwargs)


def inputs(count=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, WIDTH, generator=generator) for _ in range(count)]


def same(model, whole, mode=torch.no_grad):
    with mode():
        return all(torch.equal(model(x), whole(x)) for x in inputs())


def marked(mode):
    """Whether weights that ask for gradients multiply rows with gaps between them as they do whole; made in ``mode`` and
    outside it."""
    torch.manual_seed(0)
    rows, same = torch.randn(4, 20, 48)[:, 5:8], []
    for made_in in (mode, torch.enable_grad):
        with made_in():
            layers, whole = (nn.Sequential(*[nn.Linear(48, 48) for _ in range(3)]) for _ in range(2))
            whole.load_state_dict(layers.state_dict())
        with mode():
            ShardedWeights(layers, list(layers), Communicator(), CPU)
            same.append(torch.equal(layers(rows), whole(rows)))
    return all(same)


def values(rank, ranks):
    found = {}
    for mode in (torch.no_grad, torch.inference_mode):
        model, whole, shared = made()
        at_rest = {name: x for name, x in model.named_parameters(remove_duplicate=False)}
        found[f"same under {mode.__name__}"] = same(model, whole, mode)
        found[f"at rest under {mode.__name__}"] = all(
            x is at_rest[name] for name, x in model.named_parameters(remove_duplicate=False)
        )
        found[f"marked for gradients, under {mode.__name__}"] = marked(mode)
    found["strides kept"] = model.doubles[0].strides == whole.doubles[0].strides
    shared.remove()
    found["same when removed"] = same(model, whole)
    return found


def size_of(x):
    return x.numbers.nbytes + x.scale.nbytes if isinstance(x, Quantised) else x.nbytes


def memory(rank, ranks):
    model, _, shared = made()
    blocks = [
        sum(size_of(x) for x in {id(x): x for x in [*block.parameters(), *block.buffers()]}.values())
        for block in model.blocks()
    ]
    model(inputs()[0])
    told = weight_memory(model.blocks(), ranks)
    sent = shared.comm.sent[GATHER_WEIGHTS]
    found = {
        "blocks": blocks, "held": shared.nbytes, "told": [told.whole, told.parts, told.room], "sent": sent,
        "most whole": shared.most_whole, "weights": [len(block.about.weights) for block in shared.blocks],
    }  # fmt: skip
    shared.remove()
    return {**found, "held when removed": shared.nbytes}


def order(rank, ranks):
    events = []
    model, _, _ = made(Watched(events))
    for number, block in enumerate(model.blocks()):
        block.register_forward_pre_hook(lambda *_, number=number: events.append(f"block {number}"))
    model.enter.register_forward_hook(lambda *_: events.append("embeddings"))
    model(inputs()[0])
    return events


def changes(rank, ranks):
    """A LoRA merged into weights of two blocks, one of them a shared weight, then another strength."""
    found = {}
    for strength in (1.0, 0.5):
        delta = torch.randn(3 * WIDTH, WIDTH, generator=torch.Generator().manual_seed(2)) * strength
        torch.manual_seed(0)
        model = Model().requires_grad_(False)
        whole = copy.deepcopy(model)
        for name in ("again", "wide"):
            module = getattr(whole.doubles[1], name)
            module.weight = nn.Parameter(module.weight + delta * (name == "again"), requires_grad=False)
        source = model.doubles[1].again.weight
        changed = {"doubles.1.again.weight": lambda source=source, delta=delta: source + delta}
        shared = ShardedWeights(model, model.blocks(), Communicator(), CPU, changed)
        found[str(strength)] = same(model, whole)
        shared.remove()
        found[f"{strength} is not the model's"] = not same(model, whole)
    return found


def broken_off(rank, ranks):
    """A pass that ends in the middle, another order of the blocks, a block left out, a second model."""
    model, whole, shared = made()
    model.fails_at = 2
    with contextlib.suppress(InterruptedError):
        model(inputs()[0])
    resting = all(type(block.resting) is list and not block.resting for block in shared.blocks)
    model.fails_at = None
    found = {"at rest": resting, "after it": same(model, whole)}
    for words, numbers in (
        ("another order", [2, 0, 1, 4, 3, 5, 7, 6]),
        ("left out", [0, 2, 4, 7]),
        ("twice", [1, 1, 6, 1]),
    ):
        model.order = whole.order = numbers
        found[words] = same(model, whole)
    model.order = whole.order = None
    other, other_whole, _ = made()
    found["two models"] = same(other, other_whole) and same(model, whole) and same(other, other_whole)
    found["most whole"] = shared.most_whole
    return found


def loaded_anew(rank, ranks):
    """One rank alone has to load a model again, whose blocks do not run in the order in which they were given."""
    model, whole, shared = made(order=(order := {}))
    model.order = whole.order = [6, 0, 1, 7, 2, 3, 4, 5]
    found = {"first": same(model, whole)}
    if rank == 0:
        shared.remove()
        ShardedWeights(model, model.blocks(), Communicator(), CPU, order=order)
    return {**found, "after it": same(model, whole)}


def everything(rank, ranks):
    return {case.__name__: case(rank, ranks) for case in (values, memory, order, changes, broken_off, loaded_anew)}
