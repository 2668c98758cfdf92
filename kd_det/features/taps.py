"""
Features at named places of a detector, without a line of its forward copied.

A place is named by

* a level of the backbone's output or of its bottom-up network: ``p3``, ``res4``, ``stem``;
* a dotted module name: ``proposal_generator.rpn_head.conv``, ``backbone.bottom_up.res4.0`` or, for short, ``res4.0``;
* either of the two with ``.pre_activation`` behind it: the exact value before the last ReLU of a residual block
  (of a stage: of its last block).

Hooks stay on the model and do nothing outside :meth:`Taps.recording`.
"""

import contextlib
from dataclasses import dataclass
from typing import Dict, Iterable, List, Optional, Tuple

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock, DeformBottleneckBlock
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kd_det.errors import unknown_name

__all__ = ["PRE_ACTIVATION", "Taps", "deepest_level", "tap_module", "tap_names", "tap_shape"]

PRE_ACTIVATION = "pre_activation"

_RELUS = {torch.relu, torch.relu_, F.relu, Tensor.relu, Tensor.relu_}
_BLOCKS_ENDING_IN_RELU = (BasicBlock, BottleneckBlock, DeformBottleneckBlock)
# Those of other libraries, which need not be installed, with the module that should be the ReLU.
_FOREIGN_BLOCKS = {
    "timm.models.resnet.BasicBlock": "act2",
    "timm.models.resnet.Bottleneck": "act3",
    "timm.models.regnet.Bottleneck": "act3",
    "torchvision.models.resnet.BasicBlock": "relu",
    "torchvision.models.resnet.Bottleneck": "relu",
    "torchvision.models.regnet.ResBottleneckBlock": "activation",
}


class _ReLUInput(TorchFunctionMode):
    """
    A context that runs every ReLU of a block out of place, and keeps the input and output of the latest one. Blocks end
    in an in-place ReLU, so a forward hook on any of their modules sees the value only after it was overwritten. This
    keeps it with its graph for one map of memory more, and changes no output bit.
    """

    def __init__(self):
        super().__init__()
        self.input: Optional[Tensor] = None
        self.output: Optional[Tensor] = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in _RELUS:
            return func(*args, **kwargs)
        self.input = args[0] if args else kwargs["input"]
        self.output = torch.relu(self.input)
        return self.output


class _Complete(Exception):
    """Raised by the hook that fills the last tap, to leave a forward whose rest nobody reads."""


@dataclass(frozen=True)
class _Place:
    module: nn.Module
    key: Optional[str] = None  # of a module that returns a dict of maps
    pre_activation: bool = False


class Taps:
    """
    Records the features at named places while a model runs::

        taps = Taps(model, ["p3", "res4.pre_activation"])
        with taps.recording():
            losses = model(batched_inputs)
        features = taps.pop()  # {"p3": [Tensor], "res4.pre_activation": [Tensor]}
    """

    def __init__(self, model: nn.Module, names: Iterable[str], *, side: str = "model"):
        """
        Args:
            model: a detector with ``.backbone``, or a backbone.
            names: the places; repeated names count once.
            side: what messages call the model, e.g. "student".

        Raises:
            ValueError: a name that names no place; lists the nearest that do.
        """
        self._places = {name: _find_place(model, name, side) for name in dict.fromkeys(names)}
        self._are_levels = set(self._places) <= set(tap_names(model))
        self._values: Dict[str, List[Tuple[Tensor, Optional[int]]]] = {}
        self.is_recording = self._stops = False
        self.handles: list = []  # of the hooks, to remove them
        for name, place in self._places.items():
            _Hook(self, name, place)

    @property
    def names(self) -> List[str]:
        return list(self._places)

    def outside(self, *modules: nn.Module) -> List[str]:
        """The taps that running these modules does not fill."""
        inside = {inner for module in modules for inner in module.modules()}
        return [name for name, place in self._places.items() if place.module not in inside]

    @contextlib.contextmanager
    def recording(self, *, stop_when_complete: bool = False):
        """
        Record what the model computes inside this context, which cannot be nested. An exception inside leaves nothing
        recorded. With ``stop_when_complete``, the forward and the context end as soon as every place was read once,
        where all of them are levels: another module may run again, once a level.
        """
        if self.is_recording:
            raise RuntimeError("these taps are recording already: one forward at a time")
        self._values = {name: [] for name in self._places}
        self.is_recording, self._stops = True, stop_when_complete and self._are_levels
        try:
            yield self
        except _Complete:
            pass
        except BaseException:
            self._values = {}
            raise
        finally:
            self.is_recording = False

    def record(self, name: str, value: Tensor) -> None:
        """Called by the hooks: the value of a place, each time its module has run."""
        # What a compiled network returns has versions of its own.
        self._values[name].append((value, None if torch.compiler.is_compiling() else value._version))
        if self._stops and all(self._values.values()):
            raise _Complete

    def pop(self) -> Dict[str, List[Tensor]]:
        """
        Every place's maps, one for each time its module ran, in order. Reading empties.

        Raises:
            RuntimeError: a place whose module did not run inside :meth:`recording`, or whose value the network
                overwrote after it was read (an in-place ReLU behind an inner convolution).
        """
        values, self._values = self._values, {}
        silent = [name for name in self._places if not values.get(name)]
        if silent:
            raise RuntimeError(f"nothing was recorded at {silent}: their modules did not run in the forward")
        for name, maps in values.items():
            if any(version not in (None, value._version) for value, version in maps):
                raise RuntimeError(
                    f"tap {name!r}: the network overwrote this module's output in place, so its value is gone; "
                    f"tap the block around it, or the block's {PRE_ACTIVATION}."
                )
        return {name: [value for value, _ in maps] for name, maps in values.items()}


class _Hook:
    """
    Reads a module's output or the input of a residual block's last ReLU. Hooks are bound methods of an object, which a
    deep copy of the network copies along with the taps that it belongs to, and they stay on the module: attached anew
    at each step, they would make a compiled network compile anew.
    """

    def __init__(self, taps: Taps, name: str, place: _Place):
        self._taps, self._name, self._key = taps, name, place.key
        self._modes: List[_ReLUInput] = []
        if place.pre_activation:
            taps.handles.append(place.module.register_forward_pre_hook(self.enter))
            taps.handles.append(place.module.register_forward_hook(self.leave, always_call=True))
        else:
            taps.handles.append(place.module.register_forward_hook(self.read))

    def read(self, module, args, output):
        if self._taps.is_recording:
            self._taps.record(self._name, output if self._key is None else output[self._key])

    def enter(self, module, args):
        if self._taps.is_recording:
            self._modes.append(_ReLUInput())
            self._modes[-1].__enter__()

    def leave(self, module, args, output):
        if not self._modes:
            return
        mode = self._modes.pop()
        mode.__exit__(None, None, None)
        if output is None:  # the block raised
            return
        if mode.output is not output:
            raise RuntimeError(
                f"tap {self._name!r}: the output of {type(module).__name__} is not that of a ReLU, so there is no "
                f"pre-activation to read; tap the block's output, {self._name[: -len(PRE_ACTIVATION) - 1]!r}, instead. "
                f"(torch.compile hides the ReLUs of a network; leave it uncompiled to read them.)"
            )
        if output.requires_grad and not mode.input.requires_grad:
            raise RuntimeError(
                f"tap {self._name!r} is inside reentrant activation checkpointing, which hides it from autograd: "
                f"checkpoint with use_reentrant=False."
            )
        self._taps.record(self._name, mode.input)


def tap_names(model: nn.Module) -> List[str]:
    """The levels that can be tapped by name, pre-activations behind their stages. Dotted module names work besides."""
    names = []
    for network in _networks(model):
        stages = _stages(network)
        for level in list(stages) + list(_output_shape(network)):
            names.append(level)
            if level in stages and _ends_in_relu(_last_block(stages[level])):
                names.append(f"{level}.{PRE_ACTIVATION}")
    return list(dict.fromkeys(names))


def deepest_level(model: nn.Module) -> str:
    """The level of the largest stride, the last of several, of a backbone or of what its pyramid is built on."""
    shapes = _output_shape(_networks(model)[-1])
    if not shapes:
        raise ValueError(f"The backbone of {type(model).__name__} declares no levels: name the taps.")
    return max(reversed(shapes), key=lambda level: shapes[level].stride)


def tap_shape(model: nn.Module, name: str, *, side: str = "model") -> ShapeSpec:
    """
    Channels of a place (and stride, for a level), without running the model; a ``ValueError`` for a place that does not
    exist or whose channels no module declares.
    """
    place = _find_place(model, name, side)
    level = name[: -len(PRE_ACTIVATION) - 1] if place.pre_activation else name
    for network in _networks(model):
        shapes = _output_shape(network)
        if level in shapes:
            return shapes[level]
        if level in getattr(network, "_out_feature_channels", {}):
            return ShapeSpec(channels=network._out_feature_channels[level], stride=network._out_feature_strides[level])
    for attribute in ("out_channels", "out_features", "num_features"):
        channels = getattr(_last_block(place.module), attribute, None)
        if isinstance(channels, int):
            return ShapeSpec(channels=channels)
    raise ValueError(
        f"The channels of {side} tap {name!r} are unknown: {type(place.module).__name__} has no out_channels. "
        f"Losses with a connector need a level or a convolution: {', '.join(tap_names(model))}."
    )


def tap_module(model: nn.Module, name: str, *, side: str = "model") -> nn.Module:
    """The module that a place belongs to; for a pre-activation, its residual block."""
    return _find_place(model, name, side).module


def _networks(model: nn.Module) -> List[nn.Module]:
    """The backbone and, for a feature pyramid, what it is built on."""
    networks = [getattr(model, "backbone", model)]
    while isinstance(getattr(networks[-1], "bottom_up", None), nn.Module):
        networks.append(networks[-1].bottom_up)
    return networks


def _output_shape(network: nn.Module) -> Dict[str, ShapeSpec]:
    shape = getattr(network, "output_shape", dict)()
    return shape if isinstance(shape, dict) else {}


def _stages(network: nn.Module) -> Dict[str, nn.Module]:
    """The modules whose outputs are levels by name, also those that ``out_features`` leaves out."""
    if hasattr(network, "stage_modules"):  # a network of another library
        return network.stage_modules
    names = getattr(network, "_out_feature_channels", {})
    return {name: getattr(network, name) for name in names if isinstance(getattr(network, name, None), nn.Module)}


def _last_block(stage: nn.Module) -> nn.Module:
    while isinstance(stage, nn.Sequential) and len(stage):
        stage = stage[-1]
    return stage


def _ends_in_relu(block: nn.Module) -> bool:
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(block).__mro__)
    activations = [getattr(block, _FOREIGN_BLOCKS[name]) for name in names if name in _FOREIGN_BLOCKS]
    return isinstance(block, _BLOCKS_ENDING_IN_RELU) or bool(activations) and isinstance(activations[0], nn.ReLU)


def _find_place(model: nn.Module, name: str, side: str) -> _Place:
    suffix = f".{PRE_ACTIVATION}"
    if name.endswith(suffix):
        place = _find_place(model, name[: -len(suffix)], side)
        stage = place.module if place.key is None else _stages(place.module).get(place.key)
        block = _last_block(stage)
        if not _ends_in_relu(block):
            found = f"level {place.key!r}" if stage is None else type(block).__name__
            raise ValueError(
                f"The {side} has no tap {name!r}: {found} does not end in a ReLU over a residual sum. "
                f"Valid names: {', '.join(tap_names(model))}."
            )
        return _Place(block, pre_activation=True)

    for network in _networks(model):
        # The stage's module comes before the network's output of that name, because it runs earlier. Networks of other
        # libraries are the exception: their modules may give another memory layout (NHWC) than the outputs.
        stages, outputs = _stages(network), _output_shape(network)
        if name in stages and not (name in outputs and hasattr(network, "stage_modules")):
            return _Place(stages[name])
        if name in outputs:
            return _Place(network, key=name)
    modules = dict(model.named_modules())
    for prefix in ("", "backbone.", "backbone.bottom_up."):
        if name and prefix + name in modules:
            return _Place(modules[prefix + name])
    raise ValueError(unknown_name(f"tap of the {side}", name, tap_names(model)) + " Dotted module names work too.")
