"""The pages that are written from the code: the config's keys with their comments, and the commands with their help."""

import argparse
import ast
import importlib
import inspect
import io
import itertools
import tokenize
from collections.abc import Iterator

from detectron2.config import CfgNode, get_cfg
from docutils import nodes

from kd_det import config
from kd_det.backbones import timm_backbone
from kd_det.cli.main import COMMANDS

COMMON = "each loss"
OF_THE_LOSS = ("WEIGHT", "STUDENT_TAPS")  # of the keys that each has, those with a default of its own


def fill_in(app, docname: str, source: list[str]) -> None:
    """Sphinx's event source-read: a line ``<!-- config keys -->`` or ``<!-- commands -->`` becomes what it names."""
    for marker, write in (("<!-- config keys -->", config_reference), ("<!-- commands -->", command_reference)):
        if marker in source[0]:
            source[0] = source[0].replace(marker, write())


def resolve(app, env, node: nodes.Element, content: nodes.Element) -> nodes.Node | None:
    """
    Sphinx's event missing-reference: a name of kd_det is linked to the public name of the same object, such as
    ``kd_det.losses.nst.nst_loss`` to ``kd_det.losses.nst_loss``; one that is not public stays as text. A name that does
    not exist stays unresolved, which is a warning.
    """
    target = node.get("reftarget", "")
    parts = target.split(".")
    if node.get("refdomain") != "py" or parts[0] != "kd_det":
        return None
    documented = env.get_domain("py").objects
    for name, entry in documented.items():
        if name.rsplit(".", 1)[-1] == parts[-1] and name.startswith("kd_det."):
            uri = app.builder.get_relative_uri(node.get("refdoc", env.docname), entry.docname)
            return nodes.reference("", "", content, internal=True, refuri=f"{uri}#{entry.node_id}")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
            for part in parts[end:]:
                found = getattr(found, part)
            return content
        except ImportError:
            continue
        except AttributeError:
            return None
    return None


def config_reference() -> str:
    """Every key of kd_det with its default and its comment, one section a node."""
    cfg = get_cfg()
    config.add_kd_config(cfg)
    texts = dict(_comments(timm_backbone)) | dict(_comments(config))
    lines = ["## Every loss: `KD.<NAME>`", "", "Every loss has these keys. The sections below have the others.", ""]
    common = {key: "of the loss" if key in OF_THE_LOSS else repr(value) for key, value in _common_keys().items()}
    lines += _entries("KD.<NAME>", [(key, default, texts[f"{COMMON}.{key}"]) for key, default in common.items()])
    for node, name in ((cfg.KD, "KD"), (cfg.CLASSIFICATION, "CLASSIFICATION"), (cfg.MODEL.TIMM, "MODEL.TIMM")):
        lines += _sections(node, name, texts)
    return "\n".join(lines)


def _sections(node: CfgNode, name: str, texts: dict[str, str]) -> list[str]:
    common = _common_keys() if "STUDENT_TAPS" in node else ()
    entries, text = [], ""
    for key, value in node.items():
        if isinstance(value, CfgNode) or key in common and not (key in OF_THE_LOSS and value):
            continue
        text = "" if key in common else texts[f"{name}.{key}"] or text  # a comment may stand above several keys
        entries.append((key, repr(value), text))
    lines = ["", f"## `{name}`", "", texts.get(name, ""), "", *_entries(name, entries)]
    for key, value in node.items():
        if isinstance(value, CfgNode):
            lines += _sections(value, f"{name}.{key}", texts)
    return lines


def _entries(name: str, entries: list[tuple[str, str, str]]) -> Iterator[str]:
    """A definition list of keys, their defaults and their texts; keys of one text are one entry."""
    for text, group in itertools.groupby(enumerate(entries), lambda x: x[1][2] or x[0]):
        keys, defaults, _ = zip(*(entry for _, entry in group))
        yield ", ".join([f"`{name}.{keys[0]}`", *(f"`{key}`" for key in keys[1:])])
        yield ": " + ", ".join(f"`{x}`" for x in (defaults if len(set(defaults)) > 1 else defaults[:1]))
        yield f"\n  {text}\n" if isinstance(text, str) else ""


def _common_keys() -> CfgNode:
    return config.add_loss_config(CfgNode({"KD": {}}), "NAME", weight=0.0, has_regions=True)


def _comments(module) -> Iterator[tuple[str, str]]:
    """The comment above each key, by the key's path; those that each loss has have the path ``each loss.KEY``."""
    source = inspect.getsource(module)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [t for t in tokens if t.type == tokenize.COMMENT and not t.line[: t.start[1]].strip()]
    lines = {t.start[0]: t.string.lstrip("# ") for t in comments}

    def above(line: int) -> str:
        first = line
        while first - 1 in lines:
            first -= 1
        return " ".join(lines[x] for x in range(first, line)).replace("``", "`")

    for function in (x for x in ast.parse(source).body if isinstance(x, ast.FunctionDef)):
        paths = {"cfg": "", "node": COMMON}
        pending = ""
        for statement in sorted((x for x in ast.walk(function) if isinstance(x, ast.stmt)), key=lambda x: x.lineno):
            text = above(statement.lineno) or pending
            pending = ""
            if isinstance(statement, ast.For) and text:
                yield from ((f"{COMMON}.{key}", text) for key in config.SCHEDULE_KEYS)
            call = statement.value if isinstance(statement, (ast.Assign, ast.Expr)) else None
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "add_loss_config":
                paths["node"] = f"KD.{call.args[1].value}"
                yield paths["node"], text
            elif isinstance(statement, ast.Assign):
                names = [x.id for x in statement.targets if isinstance(x, ast.Name)]
                for target in statement.targets:
                    if isinstance(target, ast.Attribute):
                        path = ".".join(x for x in _parts(target, paths) if x)
                        paths.update(dict.fromkeys(names, path))
                        yield path, text
                if not any(isinstance(x, ast.Attribute) for x in statement.targets):
                    pending = text  # a comment above a value that the next key takes


def _parts(target: ast.expr, paths: dict[str, str]) -> list[str]:
    if isinstance(target, ast.Attribute):
        return [*_parts(target.value, paths), target.attr]
    return [paths[target.id]]


def command_reference() -> str:
    """The help of every command."""
    lines = []
    for name, line in COMMANDS.items():
        parser: argparse.ArgumentParser = importlib.import_module(f"kd_det.cli.{name.replace('-', '_')}").get_parser()
        parser.prog = f"kd-det {name}"
        lines += [f"## `kd-det {name}`", f"{line[0].upper()}{line[1:]}.", f"```text\n{parser.format_help()}\n```"]
    return "\n\n".join(lines)
