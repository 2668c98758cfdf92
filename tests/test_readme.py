"""What README.md, docs/ and configs/README.md show: commands parse, Python runs, files and config keys exist."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from kd_det import DISTILLATION_LOSS_REGISTRY, add_kd_config
from kd_det.config_file import merge_config_file, merge_options
from tests.tiny import batch, distillation_cfg

ROOT = Path(__file__).parents[1]
PAGES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "README.md", ROOT / "configs/README.md", *ROOT.glob("docs/*.md")))
TOOLS = sorted(p.name for p in ROOT.glob("tools/*.py"))
# Commands of a cluster or of the shell: a block that calls them runs, and what they would do does not matter here.
OTHERS = ("make", "pip", "cp", "scontrol", "sbatch")
RUNNERS = ("torchrun", "srun")
STUB = '#!/bin/sh\nfor x in "$0" "$@"; do printf "%s\\0" "$x"; done >> "$COMMANDS"\nprintf "\\n" >> "$COMMANDS"\n'


def blocks(page: str, *languages: str) -> list[str]:
    text = (ROOT / page).read_text()
    return [code for language, code in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) if language in languages]


def commands(code: str, folder: Path) -> list[list[str]]:
    """What a shell block calls: it runs with stand-ins that note their arguments."""
    log = folder / "commands"
    log.write_text("")
    (folder / "tools").mkdir(exist_ok=True)
    for name in [f"tools/{tool}" for tool in TOOLS] + ["kd-det", *OTHERS, *RUNNERS]:
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    if not (folder / "configs").exists():
        (folder / "configs").symlink_to(ROOT / "configs")  # for patterns
    env = {**os.environ, "COMMANDS": str(log), "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-u", "-c", code], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line.split("\0")[:-1] for line in log.read_text().splitlines()]


def arguments(tool: str, argv: list[str]):
    spec = importlib.util.spec_from_file_location(f"readme_{Path(tool).stem}", ROOT / "tools" / Path(tool).name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_parser().parse_args(argv)


def config(path: str) -> CfgNode:
    cfg = get_cfg()
    add_kd_config(cfg)
    if (ROOT / path).is_file():
        merge_config_file(cfg, str(ROOT / path))
    return cfg


def check_command(argv: list[str]) -> None:
    program, *rest = argv
    if Path(program).name in OTHERS:
        return
    if Path(program).name in RUNNERS:  # the tool is behind the runner's own options
        at = next((i for i, word in enumerate(rest) if word.endswith(".py")), None)
        return check_command(rest[at:]) if at is not None else check_script(rest[-1])
    args = vars(arguments(program, rest))
    paths = [word for value in args.values() for word in (value if isinstance(value, list) else [value])]
    for path in paths:
        if isinstance(path, str) and path.startswith("configs/"):
            assert (ROOT / path).is_file(), f"{shlex.join(argv)}: {path} does not exist"
    if args.get("opts"):
        merge_options(config(args.get("config_file") or ""), args["opts"], where=shlex.join(argv))


def check_script(code: str) -> None:
    """The command in ``srun bash -c "exec python tools/..."``."""
    words = shlex.split(code)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    # What SLURM fills in on the node.
    check_command([re.sub(r"\$\w+", "1", word) for word in words[at:]])


@pytest.mark.parametrize("page", PAGES)
def test_commands(page, tmp_path):
    found = [argv for code in blocks(page, "", "bash", "sh") for argv in commands(code, tmp_path)]
    for argv in found:
        check_command(argv)


def test_every_page_was_read():
    assert blocks("README.md", "") and blocks("README.md", "python") and blocks("README.md", "yaml")
    assert {"README.md", "configs/README.md", "docs/long_runs.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_files_and_keys_exist(page):
    text = (ROOT / page).read_text()
    for path in re.findall(r"\b(?:configs|tools|tests|docs|kd_det)/[\w/.-]*\w", text):
        assert (ROOT / path).exists(), f"{page} names {path}"
    for key in re.findall(r"\b(?:KD|MODEL|SOLVER|INPUT|TEST|DATALOADER|DATASETS|CLASSIFICATION)(?:\.[A-Z][A-Z0-9_]*)+", text):
        node = config("")
        for part in key.split("."):
            if key.startswith(("KD.MEAN", "KD.SHAPE")):  # of the example of a user's own loss
                break
            assert part in node, f"{page} names {key}"
            node = node[part]


@pytest.mark.parametrize("page", PAGES)
def test_yaml_blocks_are_configs(page):
    for code in blocks(page, "yaml"):
        merge_config_into(yaml.safe_load(code))


def merge_config_into(content: dict) -> None:
    config("").merge_from_other_cfg(CfgNode(content))
