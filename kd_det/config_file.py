"""
Reading configs, with one line for what is wrong: yaml files safely, and with the project's own modules imported first;
LazyConfigs, which are Python and are run.
"""

import contextlib
import copy
import filecmp
import importlib
import inspect
import os
import re
import sys
from pathlib import Path

import yaml
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.utils.file_io import PathManager
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kd_det.compat import model_zoo
from kd_det.errors import IMPORT_HINT, UserError, one_line, unknown_name

__all__ = [
    "add_missing_keys",
    "check_lazy_key",
    "find_config",
    "import_project",
    "instantiate_lazy",
    "is_lazy_config",
    "merge_config_file",
    "merge_options",
    "read_lazy_config",
]

_PACKAGE = Path(__file__).parent
# kd_det's own configs: beside the package in a checkout, inside it where it was installed.
CONFIGS = next((p for p in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if p.is_dir()), _PACKAGE / "configs")

# What Detectron2 reads of a LazyConfig's plain dicts only where it is given, and the arguments of DDP and of the
# checkpointer.
_NEW_KEYS = ("train.seed", "train.cudnn_benchmark", "train.float32_precision", "train.ddp.", "train.checkpointer.")


def find_config(path: str) -> str:
    """The file, or kd_det's own config of that name ("configs/Quickstart/..."), which an installed package holds."""
    own = CONFIGS / path.removeprefix("configs/")
    return str(own) if path.startswith("configs/") and not os.path.exists(path) and own.is_file() else path


def merge_config_file(cfg: CfgNode, path: str) -> None:
    """
    ``cfg.merge_from_file(path)`` that reads files of unknown origin safely, and first imports ``KD.IMPORTS``.

    Detectron2 reads configs with ``yaml.unsafe_load``, because its Base-RetinaNet.yaml holds an expression. Here only
    the model zoo's own files, and exact copies of them, may hold such tags. ``_BASE_`` files may be URLs.

    Raises:
        FileNotFoundError: no such file, or no such base.
        ValueError: not a yaml config, a tag that would run code, a module that cannot be imported, an unknown key
            (names the nearest), or a value of another type.
    """
    if "://" in path:
        raise ValueError(f"the config {path} is a URL, and Detectron2 reads configs from files: download it first")
    if is_lazy_config(path):
        raise ValueError(f"the config {path} is a LazyConfig, expected one of yacs (yaml); see kd-det lazy-train")
    try:
        content = _SafeReader.load_yaml_with_base(path)
    except RecursionError:
        raise ValueError(f"the config {path} inherits from itself, by its _BASE_") from None
    except AssertionError as e:
        raise ValueError(f"{path}: {e}") from e
    kd = content["KD"] if isinstance(content.get("KD"), dict) else {}
    imports = kd.pop("IMPORTS", None) or []
    for name in [imports] if isinstance(imports, str) else imports:
        import_project(cfg, name, folder=os.path.dirname(os.path.abspath(path)), where=f"{path}: KD.IMPORTS")
    known = list(cfg.KD.IMPORTS) if "KD" in cfg else None
    values = {name: node.get("WEIGHT") for name, node in kd.items() if isinstance(node, dict)}
    with _auto_weights(cfg, values):
        _merge(cfg, cfg.merge_from_file, path, where=path)  # every file that is read unsafely is one of the zoo's
    if known is not None:
        cfg.KD.IMPORTS = known  # by their full paths, so that the config can be dumped into another folder


def merge_options(cfg: CfgNode, options: list, *, where: str) -> None:
    """
    ``cfg.merge_from_list(options)``; ``where`` is what messages call the list.

    Raises:
        ValueError: an unknown key (names the nearest), a value of another type, or a key without a value.
    """
    values = {key.split(".")[1]: value for key, value in zip(options[::2], options[1::2]) if _is_weight(key)}
    with _auto_weights(cfg, values):
        _merge(cfg, cfg.merge_from_list, list(options), where=where)


def import_project(cfg: CfgNode, name: str, *, folder: str = ".", where: str = "--import") -> None:
    """
    Import a project's module, which registers its data sets, losses and architectures, and add its config keys: the
    functions ``add_..._config(cfg)`` that it defines are called. The name is appended to ``cfg.KD.IMPORTS``.

    Args:
        cfg: a config with the KD node, changed in place.
        name: a module ("my_project.data"), or a file ("my_losses.py").
        folder: where a file is looked for before the current directory.
        where: what messages call the list that holds the name.

    Raises:
        ValueError: no such module or file, or one that cannot be imported.
    """
    directory, module_name, is_file = os.getcwd(), name, name.endswith(".py")
    if is_file:
        places = [os.path.abspath(os.path.join(place, name)) for place in (folder, ".")]
        name = next(filter(os.path.isfile, places), "")
        if not name:
            raise ValueError(f"{where}: there is no file {' nor '.join(dict.fromkeys(places))}")
        directory, module_name = os.path.dirname(name), Path(name).stem
    if name in cfg.KD.IMPORTS:
        return
    if directory not in sys.path:
        sys.path.insert(0, directory)
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as e:
        raise ValueError(f"{where}: {name!r} cannot be imported: {one_line(e)}") from e
    if is_file and not os.path.samefile(module.__file__, name):
        raise ValueError(f"{where}: {name} has the name of another module, {module.__file__}; rename it")
    for key, function in list(vars(module).items()):
        own = getattr(function, "__module__", "").partition(".")[0] == module_name.partition(".")[0]
        if own and re.fullmatch(r"add_\w*config", key):
            function(cfg)
    cfg.KD.IMPORTS = [*cfg.KD.IMPORTS, name]


def add_missing_keys(cfg: CfgNode, other: CfgNode) -> None:
    """Give a config, in place, the keys that only another one has (a project's own), with the other's values."""
    for key, value in other.items():
        if key not in cfg:
            cfg[key] = copy.deepcopy(value)
        elif isinstance(value, CfgNode) and isinstance(cfg[key], CfgNode):
            add_missing_keys(cfg[key], value)


def is_lazy_config(path: str) -> bool:
    """Whether a file is a LazyConfig: a .py, or the yaml that a training of one leaves in its folder."""
    if path.endswith(".py"):
        return True
    try:
        text = Path(path).read_text()
    except (OSError, ValueError):  # no file, or none of text, which whoever reads it will tell
        return False
    return bool(re.search(r"^model:.*?_target_:", text, re.MULTILINE | re.DOTALL))


def read_lazy_config(path: str) -> DictConfig:
    """
    ``LazyConfig.load(path)``. The file is run: also in yaml, it names what is called.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no Python, or fails; tells how.
    """
    try:
        return LazyConfig.load(path)
    except OSError:
        raise
    except (ModuleNotFoundError, SyntaxError) as e:
        raise ValueError(f"{path}: {one_line(e)}" + f" {IMPORT_HINT}" * isinstance(e, ImportError)) from e
    except Exception as e:  # whatever a program may raise
        raise ValueError(f"{path} fails with {type(e).__name__}: {one_line(e)}{_py_hint(path)}") from e


# What building something from wrong arguments raises.
_MISBUILT = (AssertionError, AttributeError, ImportError, LookupError, OmegaConfBaseException, RuntimeError, TypeError)


def instantiate_lazy(config: DictConfig, *, path: str, what: str):
    """
    What a node of the LazyConfig ``path`` describes, built; ``what`` is what the ``UserError`` calls it, if it cannot
    be.
    """
    try:
        return instantiate(config)
    except _MISBUILT as e:
        raise UserError(f"{what} of {path} cannot be built: {type(e).__name__}: {one_line(e)}{_py_hint(path)}") from e


def _py_hint(path: str) -> str:
    """What the yaml of a LazyConfig cannot hold is in the file that it was made from."""
    is_python = path.endswith(".py")
    return "" if is_python else " (The LazyConfig that was trained, the .py file, may hold what its yaml does not.)"


def check_lazy_key(cfg: DictConfig, key: str, *, where: str) -> None:
    """
    Refuse the key of an option that nothing in a LazyConfig reads; Detectron2 adds it in silence. New keys are the
    arguments that a node's callable takes, any in the plain dicts among its arguments, and those of ``_NEW_KEYS``.
    ``where`` is what the ``ValueError`` calls the options; it names the nearest key.
    """
    if key.startswith(_NEW_KEYS):
        return
    node, path, is_argument = cfg, "", False
    for part in key.split("."):
        if not isinstance(node, DictConfig):
            return  # an index into a list, or no node: left to Detectron2
        known = [str(known) for known in node.keys()]
        target = node.get("_target_")
        if target is not None:
            known += _parameters(target) or [part]
        if part not in known and (target is not None or not is_argument):
            raise ValueError(f"{where}: {unknown_name('config key', path + part, [path + name for name in known])}")
        node, path = OmegaConf.select(node, part), f"{path}{part}."
        is_argument = is_argument or target is not None


def _parameters(target) -> list[str]:
    """The names of a callable's parameters; none where it takes any."""
    try:
        parameters = inspect.signature(locate(target) if isinstance(target, str) else target).parameters
    except Exception:  # no such name, or a callable without a signature: instantiating it will tell
        return []
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return [] if takes_any else list(parameters)


class _SafeReader(CfgNode):
    """Reads a file and its bases; messages name the file that is wrong."""

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict:
        if "://" not in filename and not PathManager.isfile(filename):
            kind = "is a folder, not a yaml file" if PathManager.isdir(filename) else "does not exist"
            raise FileNotFoundError(f"the config {filename} {kind}")
        zoo = (Path(model_zoo.__file__).parent / "configs").rglob(os.path.basename(filename))
        is_the_zoos = os.path.isfile(filename) and any(filecmp.cmp(filename, x, shallow=False) for x in zoo)
        try:
            content = super().load_yaml_with_base(filename, allow_unsafe=is_the_zoos)
        except yaml.constructor.ConstructorError as e:
            raise ValueError(f"the config {filename} is refused: {one_line(e)}") from e
        except (yaml.YAMLError, UnicodeDecodeError) as e:
            raise ValueError(f"{filename} is not a yaml config: {one_line(e)}") from e
        except (TypeError, AttributeError):
            content = None
        except FileNotFoundError as e:
            raise FileNotFoundError(f"{filename}: _BASE_: {one_line(e)}") from e
        except OSError as e:
            raise FileNotFoundError(f"the config {filename} cannot be read: {one_line(e)}") from e
        if not isinstance(content, dict):
            raise ValueError(f"{filename} is not a yaml config: expected keys with values, found none")
        return content


def _merge(cfg: CfgNode, merge, what, *, where: str) -> None:
    try:
        merge(what)
    except (KeyError, AssertionError) as e:
        message = str(e.args[0]) if e.args else type(e).__name__
        key = message.rsplit(": ", 1)[-1]
        if "Non-existent" in message:
            message = f"{unknown_name('config key', key, _keys(cfg), most=6)} {IMPORT_HINT}"
        raise ValueError(f"{where}: {message}") from e
    except (AttributeError, TypeError) as e:
        raise ValueError(f"{where}: a value stands where Detectron2 has a section, or the reverse ({e})") from e
    except (OverflowError, SyntaxError, ValueError) as e:
        raise ValueError(f"{where}: {_with_example(cfg, one_line(e))}") from e


def _with_example(cfg: CfgNode, message: str) -> str:
    """yacs' message of a value of another type, as the value that was found and one that the key takes."""
    found = re.fullmatch(r"Type mismatch \(.*?\) with values \((.*)\) for config key: (\S+)", message)
    if not found:
        return message
    default = cfg
    for part in found[2].split("."):
        default = default[part]
    value = found[1].removeprefix(f"{' '.join(str(default).split())} vs. ")
    examples = {str: "'text'", tuple: "('a', 'b')", list: "['a', 'b']"}  # for defaults that are empty
    example = repr(default) if default or default == 0 else examples.get(type(default), repr(default))
    return f"{found[2]} is {value}, expected a value of type {type(default).__name__}, such as {example}"


@contextlib.contextmanager
def _auto_weights(cfg: CfgNode, values: dict):
    """
    A context in which a loss' ``WEIGHT: "auto"`` can be merged, which Detectron2 refuses for a number. Afterwards the
    weight is what it was, and the loss has a share of the gradient: KD.AUTO_WEIGHT, or 0.5.
    """
    known = {name: node for name, node in cfg.get("KD", {}).items() if isinstance(node, CfgNode)}
    nodes = [known[name] for name, value in values.items() if value == "auto" and "AUTO_WEIGHT" in known.get(name, ())]
    weights = [node.WEIGHT for node in nodes]
    for node in nodes:
        node.WEIGHT = "auto"
    try:
        yield
    finally:
        for node, weight in zip(nodes, weights):
            node.WEIGHT = weight
    for node in nodes:
        node.AUTO_WEIGHT = node.AUTO_WEIGHT or cfg.KD.AUTO_WEIGHT or 0.5


def _is_weight(key) -> bool:
    return bool(re.fullmatch(r"KD\.\w+\.WEIGHT", str(key)))


def _keys(node: CfgNode, prefix: str = "") -> list[str]:
    ret = []
    for key, value in node.items():
        ret += _keys(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else [prefix + key]
    return ret
