"""
A pretend accelerator, for machines without a GPU.

Tensors that report the device "meta" and keep their values on the CPU. As on a real accelerator,

* an operation on tensors of both devices raises (only 0-dimensional CPU tensors may be mixed in, as CUDA allows);
* everything that makes the host wait for the device is counted, with the line that caused it: item(), bool(tensor),
  nonzero, boolean indexing, copies to the CPU, and copies of pageable memory to the device;
* kernels are counted (views and empty tensors launch none).

    with Accelerator() as accelerator:
        place(model)                       # parameters and buffers move to the device
        losses = model(batched_inputs)     # the values are real
        sum(losses.values()).backward()
    print(accelerator.waits, accelerator.kernels)

Streams, pinned memory, NCCL and autocast on the device are not modelled; autocast is switched off.
"""

import collections
import contextlib
import os
import traceback

import detectron2
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import kd_det

# Autograd refuses a "cuda" tensor on a machine without CUDA; "meta" exists everywhere.
DEVICE = torch.device("meta")

_COPIES = {"aten::_to_copy", "aten::copy_"}
_WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2"}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_NO_KERNEL = {
    f"aten::{name}"
    for name in (
        "view _unsafe_view expand slice select transpose t unsqueeze squeeze as_strided detach alias permute empty "
        "empty_like new_empty diagonal split split_with_sizes unbind unfold lift_fresh empty_strided"
    ).split()
}


class DeviceTensor(torch.Tensor):
    """Reports ``DEVICE``; its values are in ``cpu_values``."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, cpu_values: torch.Tensor):
        ret = torch.Tensor._make_wrapper_subclass(
            cls,
            cpu_values.size(),
            strides=cpu_values.stride(),
            storage_offset=cpu_values.storage_offset(),
            dtype=cpu_values.dtype,
            device=DEVICE,
        )
        ret.cpu_values = cpu_values
        return ret

    def __repr__(self):
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, dict(kwargs or {}), None)


class Accelerator(TorchDispatchMode):
    """
    Attributes:
        waits: how often the host waited, by "what, file:line".
        kernels: the number of kernels launched on the device.
    """

    def __init__(self):
        super().__init__()
        self.reset()

    def reset(self) -> None:
        self.waits: collections.Counter = collections.Counter()
        self.kernels = 0

    def __enter__(self):
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(_Constructors(self))
        self._stack.enter_context(_without_device_autocast())
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, dict(kwargs or {}), self)

    def count_wait(self, what: str) -> None:
        self.waits[f"{what}, {_place()}"] += 1


def _place() -> str:
    """The innermost line of kd_det or of Detectron2."""
    for frame in reversed(traceback.extract_stack()):
        for package in (kd_det, detectron2):
            folder = os.path.dirname(package.__file__)  # not by its name: a checkout may have the name of the package
            if frame.filename.startswith(folder + os.sep):
                return f"{package.__name__}/{os.path.relpath(frame.filename, folder)}:{frame.lineno}"
    return "?"


class _Constructors(TorchFunctionMode):
    """``torch.tensor(..., device=...)`` fills in no values on "meta"; here it does."""

    def __init__(self, accelerator: Accelerator):
        super().__init__()
        self._accelerator = accelerator

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            data = args[0] if args else kwargs["data"]
            if torch.device(kwargs["device"]).type == DEVICE.type and not isinstance(data, torch.Tensor):
                self._accelerator.count_wait("copy to the device")
                del kwargs["device"]
                return DeviceTensor(func(*args, **kwargs))
        if func is torch.Tensor.new_tensor and isinstance(args[0], DeviceTensor):
            self._accelerator.count_wait("copy to the device")
            return DeviceTensor(torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)))
        if func is torch.Tensor.unsqueeze_ and isinstance(args[0], DeviceTensor):
            return torch.unsqueeze(*args, **kwargs)  # a wrapper cannot change its shape in place
        if func is torch.Tensor.tolist and isinstance(args[0], DeviceTensor):
            self._accelerator.count_wait("copy to the host")
            return args[0].cpu_values.tolist()
        return func(*args, **kwargs)


def _run(func, args, kwargs, accelerator):
    name = func._schema.name
    flat, _ = tree_flatten((args, kwargs))
    ours = [x for x in flat if isinstance(x, DeviceTensor)]
    foreign = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, DeviceTensor)]
    on_device, target = bool(ours), kwargs.get("device")
    if target is not None:
        on_device = torch.device(target).type == DEVICE.type
        kwargs["device"] = torch.device("cpu") if on_device else target
    if ours and foreign and name not in _COPIES:
        joined = name in ("aten::cat", "aten::stack")
        if joined or (name not in _INDEXING and any(x.dim() for x in foreign)):
            raise RuntimeError(f"tensors on two devices in {name}: {[tuple(x.shape) for x in foreign]} on the CPU")
    if accelerator is not None:
        if (ours or on_device) and name not in _NO_KERNEL:
            accelerator.kernels += 1
        boolean_index = name in _INDEXING and any(x.dtype == torch.bool for x in ours[1:])
        if ours and (name in _WAITS or boolean_index or (name in _INDEXING and any(x.dim() for x in foreign))):
            accelerator.count_wait(name.removeprefix("aten::"))
        elif name == "aten::_to_copy" and target is not None and on_device != bool(ours):
            accelerator.count_wait("copy to the device" if on_device else "copy to the host")
        elif name == "aten::copy_" and ours and foreign:
            accelerator.count_wait("copy between devices")
    values = tree_map(lambda x: x.cpu_values if isinstance(x, DeviceTensor) else x, (args, kwargs))
    out = func(*values[0], **values[1])
    if isinstance(out, torch.Tensor) and args and isinstance(args[0], DeviceTensor) and out is args[0].cpu_values:
        return args[0]  # in place
    if isinstance(kwargs.get("out"), torch.Tensor):
        return kwargs["out"]
    if not on_device:
        return out
    return tree_map(lambda x: DeviceTensor(x) if isinstance(x, torch.Tensor) else x, out)


@contextlib.contextmanager
def _without_device_autocast():
    autocast = torch.autocast

    class Autocast(autocast):
        def __new__(cls, device_type, *args, **kwargs):
            return contextlib.nullcontext() if device_type == DEVICE.type else super().__new__(cls)

    is_enabled = torch.is_autocast_enabled
    torch.autocast = Autocast
    torch.is_autocast_enabled = lambda *device: device != (DEVICE.type,) and is_enabled(*device)
    try:
        yield
    finally:
        torch.autocast, torch.is_autocast_enabled = autocast, is_enabled


def on_device(tensor: torch.Tensor) -> torch.Tensor:
    """A leaf on the device with a tensor's values and its ``requires_grad``."""
    return DeviceTensor(tensor.detach().clone()).requires_grad_(tensor.requires_grad)


def place(model: nn.Module) -> None:
    """Put a model's parameters and buffers on the device, in place."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                moved = nn.Parameter(DeviceTensor(parameter.data), requires_grad=parameter.requires_grad)
                module._parameters[name] = moved
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = DeviceTensor(buffer.detach())
