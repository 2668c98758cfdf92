"""Reading yaml configs without running what a stranger wrote into them."""

import ast
import copy
import logging
import os

import yaml
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from kd_det.errors import one_line, unknown_name

__all__ = ["add_missing_keys", "merge_config_file", "merge_options"]

_TAG = "tag:yaml.org,2002:python/"


def merge_config_file(cfg: CfgNode, path: str) -> None:
    """
    ``cfg.merge_from_file(path)`` for files that nobody has vouched for.

    Detectron2 reads configs with ``yaml.unsafe_load``, because some (its Base-RetinaNet.yaml) hold an expression such
    as ``[x * 2**(1.0/3) for x in [32, 64]]``. Here expressions are arithmetic on numbers and nothing else.

    Args:
        cfg: a config.
        path: a yaml file; its ``_BASE_`` files count, which may be URLs.

    Raises:
        FileNotFoundError: no such file, or no such base.
        ValueError: not a yaml config, an unknown key (says the nearest), a value of another type, or a file that would
            run code.
    """
    _check_file(path, ())
    _merge(cfg, cfg.merge_from_file, path, where=path)


def merge_options(cfg: CfgNode, options: list, *, where: str) -> None:
    """
    ``cfg.merge_from_list(options)``.

    Args:
        cfg: a config.
        options: KEY, VALUE, KEY, VALUE, ...
        where: what messages call the list.

    Raises:
        ValueError: an unknown key (says the nearest), a value of another type, or a key without a value.
    """
    _merge(cfg, cfg.merge_from_list, list(options), where=where)


def add_missing_keys(cfg: CfgNode, other: CfgNode) -> None:
    """Give a config, in place, the keys that only another one has (a project's own), with the other's values."""
    for key, value in other.items():
        if key not in cfg:
            cfg[key] = copy.deepcopy(value)
        elif isinstance(value, CfgNode) and isinstance(cfg[key], CfgNode):
            add_missing_keys(cfg[key], value)


def _merge(cfg: CfgNode, merge, what, *, where: str) -> None:
    try:
        # Detectron2 warns that it reads expressions with yaml.unsafe_load; these have been checked.
        logging.getLogger("fvcore.common.config").addFilter(_no_warning)
        merge(what)
    except (KeyError, AssertionError) as e:
        message = str(e.args[0]) if e.args else type(e).__name__
        key = message.rsplit(": ", 1)[-1]
        if "Non-existent" in message:
            message = unknown_name("config key", key, _keys(cfg), most=6)
        raise ValueError(f"{where}: {message}") from e
    except (AttributeError, TypeError) as e:
        raise ValueError(f"{where}: a value stands where Detectron2 has a section, or the reverse ({e})") from e
    except (OverflowError, SyntaxError, ValueError) as e:
        raise ValueError(f"{where}: {one_line(e)}") from e
    finally:
        logging.getLogger("fvcore.common.config").removeFilter(_no_warning)


def _no_warning(record: logging.LogRecord) -> bool:
    return record.levelno > logging.WARNING


def _keys(node: CfgNode, prefix: str = "") -> list[str]:
    ret = []
    for key, value in node.items():
        ret += _keys(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else [prefix + key]
    return ret


def _check_file(path: str, inherited_by: tuple[str, ...]) -> None:
    if path in inherited_by:
        raise ValueError(f"{path} inherits from itself: _BASE_ leads from {' to '.join((*inherited_by, path))}")
    if "://" in path and not inherited_by:
        raise ValueError(f"the config {path} is a URL, and Detectron2 reads configs from files: download it first")
    if path.endswith(".py"):
        raise ValueError(f"the config {path} is a LazyConfig, expected a yaml file; see tools/lazyconfig_train_net.py")
    if "://" not in path and not PathManager.isfile(path):
        kind = "is a folder, not a yaml file" if PathManager.isdir(path) else "does not exist"
        base = f", the _BASE_ of {inherited_by[-1]}," if inherited_by else ""
        raise FileNotFoundError(f"the config {path}{base} {kind}")
    try:
        with PathManager.open(path, "r") as file:
            content = yaml.load(file, _CheckingLoader)  # a subclass of SafeLoader
    except yaml.constructor.ConstructorError as e:
        raise ValueError(f"the config {path} is refused: {one_line(e)}") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is not a yaml config: {one_line(e)}") from e
    except OSError as e:
        raise FileNotFoundError(f"the config {path} cannot be read: {one_line(e)}") from e
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise ValueError(f"{path} is not a yaml config: expected keys with values, found {found}")
    bases = content.get("_BASE_", [])
    for base in [bases] if isinstance(bases, str) else bases:
        base = os.path.expanduser(base)
        if "://" not in base:
            base = os.path.join(os.path.dirname(path), base)
        _check_file(base, (*inherited_by, path))


class _CheckingLoader(yaml.SafeLoader):
    """Knows of Python's tags only tuples and arithmetic; any other ends in a ``ConstructorError``."""


def _check_expression(loader: _CheckingLoader, node: yaml.Node) -> None:
    arguments = loader.construct_sequence(node, deep=True) if isinstance(node, yaml.SequenceNode) else []
    try:
        _check_arithmetic(ast.parse(*arguments, mode="eval"))
    except (SyntaxError, TypeError, ValueError) as e:
        problem = f"{arguments} is not arithmetic on numbers ({e})"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


_CheckingLoader.add_constructor(_TAG + "object/apply:eval", _check_expression)
_CheckingLoader.add_constructor(_TAG + "tuple", lambda loader, node: tuple(loader.construct_sequence(node, deep=True)))

_ARITHMETIC = (
    ast.Expression, ast.List, ast.Tuple, ast.ListComp, ast.comprehension, ast.Name, ast.Load, ast.Store, ast.Constant,
    ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.UnaryOp, ast.USub,
)  # fmt: skip


def _check_arithmetic(tree: ast.AST) -> None:
    """Also bounds what the expression costs: a config must not hang or fill the memory either."""
    nodes = list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", None)
            if name == "range" and not all(isinstance(x, ast.Constant) for x in node.args):
                raise ValueError("range takes plain numbers")
            known = name in ("range", "int", "float")
        elif isinstance(node, ast.Constant):
            known = isinstance(node.value, (int, float)) and node.value <= 10_000
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
            exponent = list(ast.walk(node.right))
            known = not any(isinstance(x, (ast.Name, ast.Pow, ast.Mult)) for x in exponent)
            known &= all(x.value <= 8 for x in exponent if isinstance(x, ast.Constant))
        else:
            known = isinstance(node, _ARITHMETIC)
        if not known:
            raise ValueError(f"it has {ast.unparse(node) or type(node).__name__}")
    if len(nodes) > 300 or sum(isinstance(node, (ast.comprehension, ast.Pow)) for node in nodes) > 4:
        raise ValueError("it is too long")
