"""What README.md, docs/ and configs/README.md show: commands parse, Python runs, files and config keys exist."""

import argparse
import importlib
import os
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from kd_det import DISTILLATION_LOSS_REGISTRY, add_kd_config
from kd_det.cli.main import COMMANDS
from kd_det.config_file import merge_config_file, merge_options
from tests.tiny import batch, distillation_cfg

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    str(p.relative_to(ROOT)) for p in (ROOT / "README.md", ROOT / "configs/README.md", *ROOT.rglob("docs/**/*.md"))
)
TOOLS = sorted(p.name for p in ROOT.glob("tools/*.py"))
# Commands of a cluster or of the shell: a block that calls them runs, and what they would do does not matter here.
OTHERS = ("make", "pip", "cp", "scontrol", "sbatch", "python", ".venv/bin/python")
RUNNERS = ("torchrun", "srun")
EXAMPLE_KEYS = ("KD.SMOOTH", "KD.SMOOTH.BETA")
SHELL = {"DETECTRON2": "detectron2", "SLURM_JOB_NODELIST": "node", "SLURM_JOB_ID": "7"}
STUB = '#!/bin/sh\nfor x in "$0" "$@"; do printf "%s\\0" "$x"; done >> "$COMMANDS"\nprintf "\\n" >> "$COMMANDS"\n'


def blocks(page: str, *languages: str) -> list[str]:
    text = (ROOT / page).read_text()
    return [code for language, code in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) if language in languages]


def commands(code: str, folder: Path) -> list[list[str]]:
    """What a shell block calls: it runs with stand-ins that note their arguments."""
    log = folder / "commands"
    log.write_text("")
    for place in ("tools", ".venv/bin"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    for name in [f"tools/{tool}" for tool in TOOLS] + ["kd-det", *OTHERS, *RUNNERS]:
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    if not (folder / "configs").exists():
        (folder / "configs").symlink_to(ROOT / "configs")  # for patterns
    env = {**os.environ, **SHELL, "COMMANDS": str(log), "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-u", "-c", code], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line.split("\0")[:-1] for line in log.read_text().splitlines()]


class Parsed(Exception):
    """Carries what a command's parser returned, before the command does anything."""


def arguments(program: str, argv: list[str], monkeypatch) -> dict:
    if program.endswith(".py"):
        module = re.search(r"^from (kd_det\.\S+) import main$", (ROOT / "tools" / program).read_text(), re.M)[1]
    else:
        assert argv[0] in COMMANDS, f"kd-det has no command {argv[0]}"
        module, argv = f"kd_det.cli.{argv[0].replace('-', '_')}", argv[1:]
    parse_args = argparse.ArgumentParser.parse_args

    def stop_there(parser, argv):
        raise Parsed(vars(parse_args(parser, argv)))

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop_there)
        with pytest.raises(Parsed) as parsed:
            importlib.import_module(module).main(argv)
    return parsed.value.args[0]


@cache
def config(path: str = "") -> CfgNode:
    cfg = get_cfg()
    add_kd_config(cfg)
    if (ROOT / path).is_file():
        merge_config_file(cfg, str(ROOT / path))
    return cfg


def check_command(argv: list[str], monkeypatch) -> None:
    program, *rest = argv
    if program.endswith(OTHERS):
        return
    if Path(program).name in RUNNERS:  # the tool is behind the runner's own options
        at = next((i for i, word in enumerate(rest) if word.endswith(".py")), None)
        return check_command(rest[at:] if at is not None else script(rest[-1]), monkeypatch)
    args = arguments(Path(program).name, rest, monkeypatch)
    paths = [word for value in args.values() for word in (value if isinstance(value, list) else [value])]
    for path in paths:
        if isinstance(path, str) and path.startswith("configs/"):
            assert (ROOT / path).is_file(), f"{shlex.join(argv)}: {path} does not exist"
    if args.get("opts"):
        merge_options(config(args.get("config_file") or "").clone(), args["opts"], where=shlex.join(argv))


def script(code: str) -> list[str]:
    """The command in ``srun bash -c "exec python tools/..."``, with a number for what SLURM fills in on the node."""
    words = shlex.split(code)
    return [re.sub(r"\$\w+", "1", word) for word in words[next(i for i, x in enumerate(words) if x.endswith(".py")) :]]


@pytest.mark.parametrize("page", PAGES)
def test_commands(page, tmp_path, monkeypatch):
    found = [argv for code in blocks(page, "", "bash", "sh") for argv in commands(code, tmp_path)]
    for argv in found:
        check_command(argv, monkeypatch)


def test_every_page_was_read():
    assert blocks("README.md", "") and blocks("README.md", "python") and blocks("README.md", "yaml")
    assert {"README.md", "configs/README.md", "docs/long_runs.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_files_and_keys_exist(page):
    text = (ROOT / page).read_text()
    for path in re.findall(r"\b(?:configs|tools|tests|docs|kd_det)/[\w/.-]*\w", text):
        assert (ROOT / path).exists(), f"{page} names {path}"
    for key in re.findall(
        r"\b(?:KD|MODEL|SOLVER|INPUT|TEST|DATALOADER|DATASETS|CLASSIFICATION)(?:\.[A-Z][A-Z0-9_]*)+", text
    ):
        node = config()
        for part in key.split(".") if key not in EXAMPLE_KEYS else ():
            assert part in node, f"{page} names {key}"
            node = node[part]


@pytest.mark.parametrize("page", PAGES)
def test_yaml_blocks_are_configs(page):
    for code in blocks(page, "yaml"):
        config().clone().merge_from_other_cfg(CfgNode(yaml.safe_load(code)))


def test_a_loss_of_ones_own(tmp_path, monkeypatch):
    """The example registers its loss, whose own key counts, and trains a step."""
    cfg = distillation_cfg(tmp_path)
    example = {}
    monkeypatch.setattr(DISTILLATION_LOSS_REGISTRY, "_obj_map", dict(DISTILLATION_LOSS_REGISTRY))
    exec(next(code for code in blocks("README.md", "python") if "DISTILLATION_LOSS_REGISTRY" in code), example)
    example["add_smooth_config"](cfg)
    merge_options(cfg, ["KD.LOSSES", ("SmoothLoss",), "KD.SMOOTH.BETA", 0.25], where="test")
    model = build_model(cfg).train()
    assert model.losses["smooth"].beta == 0.25
    loss = model(batch())["loss_smooth"]
    loss.backward()
    trained = [*model.student.backbone.parameters(), *model.losses.parameters()]
    assert loss > 0 and any(p.grad.abs().sum() > 0 for p in trained if p.grad is not None)


def test_three_lines_in_a_script(tmp_path, monkeypatch):
    """The lines of the example, before a plain Detectron2 build_model."""
    (tmp_path / "distill.yaml").write_text(distillation_cfg(tmp_path, "NSTLoss").dump())
    monkeypatch.chdir(tmp_path)
    script = {}
    exec(next(code for code in blocks("README.md", "python") if "merge_from_file" in code), script)
    assert build_model(script["cfg"]).train()(batch())["loss_nst"] > 0
