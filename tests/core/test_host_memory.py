"""Main memory for a GPU against a driver that remembers: all that is pinned is let go of before it is freed."""

import gc
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from pinning_driver import GPU, SECOND_GPU, PinningDriver
from torch.multiprocessing.reductions import StorageWeakRef

from efficient_vdit_core.attention import host_memory
from efficient_vdit_core.attention.host_memory import HostMemory

SIZE, BYTES = (3, 1000), 6000


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.setattr(host_memory, "_REGISTERED", {})
    return PinningDriver(monkeypatch)


def take(memory, count=1, device=GPU):
    return [memory.empty(SIZE, torch.bfloat16, device) for _ in range(count)]


def test_each_tensor_is_pinned_as_it_is_until_the_end(driver):
    memory = HostMemory("it")
    values = take(memory, 2)
    assert driver.pinned == {value.data_ptr(): BYTES for value in values}
    memory.close()
    assert driver.asked == ["register", "register", f"wait {GPU}", "unregister", "unregister"]
    assert not driver.pinned and not host_memory._REGISTERED
    values[0].fill_(2.0)  # a tensor that lives on is still one
    memory.close()
    assert len(driver.asked) == 5, "there is nothing to wait for"


def test_tensors_may_be_dropped_before_the_end(driver):
    memory = HostMemory("it")
    take(memory, 3)
    gc.collect()
    assert len(driver.pinned) == 3 and driver.none_was_freed()
    memory.close()
    assert not driver.pinned


def test_memory_is_free_behind_the_end(driver):
    memory = HostMemory("it")
    kept = StorageWeakRef(take(memory)[0].untyped_storage())
    assert not kept.expired()
    memory.close()
    assert kept.expired()


def test_a_holder_that_is_only_dropped_ends_too(driver):
    def broken_off():
        take(HostMemory("it"), 2)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        broken_off()
    gc.collect()
    assert driver.asked == ["register", "register", f"wait {GPU}", "unregister", "unregister"]
    assert not driver.pinned and not host_memory._REGISTERED


def test_an_interrupt_between_pinning_and_its_note_loses_nothing(driver):
    memory, driver.interrupts = HostMemory("it"), True
    with pytest.raises(KeyboardInterrupt):
        take(memory)
    gc.collect()
    assert len(driver.pinned) == 1 and driver.none_was_freed()
    memory.close()
    assert not driver.pinned and not host_memory._REGISTERED


def test_a_refusal_leaves_it_pageable_and_no_error_behind(driver, caplog):
    caplog.set_level("INFO", "efficient_vdit")
    memory, driver.room = HostMemory("the residual"), BYTES
    values = take(memory, 4)
    assert driver.asked == ["register", "register", "error taken up"], "one refusal is enough"
    assert driver.pending == 0 and len(driver.pinned) == 1
    for value in values:
        value.fill_(3.0)
    assert caplog.text.count("the residual waits in main memory that the system does not pin (error 2)") == 1
    memory.close()
    assert not driver.pinned and not host_memory._REGISTERED
    driver.room = 2 * BYTES
    take(memory, 2)
    assert len(driver.pinned) == 2, "the next run tries again"
    memory.close()


def test_what_another_registered_is_not_ended(driver):
    driver.register_code = 712
    memory = HostMemory("it")
    take(memory)
    memory.close()
    assert driver.asked == ["register", "error taken up"] and driver.pending == 0


@pytest.mark.parametrize("missing", ["no CUDA", "forked", "no such call"])
def test_a_pytorch_that_cannot_pin(monkeypatch, driver, missing):
    def cudart():
        raise {"no CUDA": AssertionError, "forked": RuntimeError}[missing]

    monkeypatch.setattr(torch.cuda, "cudart", object if missing == "no such call" else cudart)
    memory = HostMemory("it")
    (value,) = take(memory)
    assert value.fill_(1.0).sum() == 3000
    memory.close()
    assert not driver.asked and not host_memory._REGISTERED


def test_what_is_pinned_counts_whatever_happens_behind_it(monkeypatch, driver):
    """The way back to the GPU that was current before may fail."""

    @contextmanager
    def no_way_back(device):
        yield
        raise RuntimeError("CUDA error: unspecified launch failure")

    memory = HostMemory("it")
    with monkeypatch.context() as once:
        once.setattr(torch.cuda, "device", no_way_back)
        take(memory)
    gc.collect()
    assert len(driver.pinned) == 1 and driver.none_was_freed()
    memory.close()
    assert not driver.pinned


@pytest.mark.parametrize("device", ["cpu", "mps", "xpu"])
def test_other_devices_take_plain_memory(driver, device):
    memory = HostMemory("it")
    (value,) = take(memory, device=torch.device(device))
    assert value.device.type == "cpu" and value.shape == SIZE
    memory.close()
    assert not driver.asked


def test_nothing_is_registered_for_an_empty_tensor(driver):
    assert HostMemory("it").empty((0, 4), torch.float32, GPU).shape == (0, 4)
    assert not driver.asked


def test_the_end_waits_for_every_device_that_copied(driver):
    memory = HostMemory("it")
    take(memory)
    memory.used_on(SECOND_GPU)
    memory.close()
    assert {f"wait {GPU}", f"wait {SECOND_GPU}"} == set(driver.asked[1:3])
    assert driver.asked[3:] == ["unregister"]


def test_one_tensor_may_end_before_the_others(driver):
    memory = HostMemory("it")
    first, second = take(memory, 2)
    memory.release(first)
    assert list(driver.pinned) == [second.data_ptr()] and driver.asked[2:] == [f"wait {GPU}", "unregister"]
    memory.release(first)
    memory.close()
    assert not driver.pinned


def test_what_the_driver_does_not_let_go_of_is_never_freed(driver, caplog):
    memory = HostMemory("it")
    kept = StorageWeakRef(take(memory)[0].untyped_storage())
    driver.unregister_code = 1
    memory.close()
    del memory
    gc.collect()
    assert driver.none_was_freed() and not kept.expired() and driver.pending == 0
    assert "does not let go of it (error 1)" in caplog.text


def test_a_device_that_cannot_be_waited_for_keeps_its_memory(monkeypatch, driver):
    memory = HostMemory("it")
    take(memory)

    def recorded(device):
        raise RuntimeError("operation not permitted when stream is capturing")

    with monkeypatch.context() as while_recorded:
        while_recorded.setattr(torch.cuda, "synchronize", recorded)
        memory.close()
    assert len(driver.pinned) == 1 and driver.none_was_freed()
    memory.close()
    assert not driver.pinned


def test_python_ends_it():
    """In a process of its own, whose holder is still there when it ends."""
    script = (
        "import pytest, torch\n"
        "from pinning_driver import GPU, PinningDriver\n"
        "from efficient_vdit_core.attention.host_memory import HostMemory\n"
        "driver, memory = PinningDriver(pytest.MonkeyPatch()), HostMemory('it')\n"
        "kept, ask = memory.empty((9,), torch.uint8, GPU), driver.unregister\n"
        "torch.cuda.cudart().cudaHostUnregister = lambda address: print('ended', ask(address))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=env)
    assert "ended 0" in out.stdout, out.stderr
