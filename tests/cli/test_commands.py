"""The command line from outside: a project's modules, a run that is checked, logged and repeated, and every command."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import LazyConfig, instantiate
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, build_model

from kd_det import student_cfg
from kd_det.cli import add_teacher, argument_parser, check_run, export, load_config, parse_arguments, taps, weights
from kd_det.cli import main as console
from kd_det.cli.lazy_config import load_lazy_config
from kd_det.config_file import CONFIGS, find_config
from tests.tiny import distillation_cfg, tiny_cfg
from tests.tiny_run import run_cfg

ROOT = Path(__file__).parents[2]

PROJECT = """
import os
from detectron2.config import configurable
from detectron2.data.datasets import register_coco_instances
from kd_det import DISTILLATION_LOSS_REGISTRY, DistillationLoss, add_loss_config
import tests.tiny

FOLDER = os.path.join(os.path.dirname(__file__), "images")
register_coco_instances("trees", {}, FOLDER + "/annotations.json", FOLDER)


def add_edge_config(cfg):
    add_loss_config(cfg, "EDGE", weight=1.0, taps=("p2",)).POWER = 2


@DISTILLATION_LOSS_REGISTRY.register()
class EdgeLoss(DistillationLoss):
    name = "edge"

    @configurable
    def __init__(self, *, power, **kwargs):
        super().__init__(**kwargs)
        self.power = power

    @classmethod
    def from_config(cls, cfg, student, teacher):
        return {**super().from_config(cfg, student, teacher), "power": cfg.KD.EDGE.POWER}

    def forward(self, student, teacher, context):
        return sum((s.mean() - t.mean()).abs() ** self.power for s, t in zip(student, teacher))
"""


def run(folder: Path, *command: str, status: int = 0) -> str:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", *command]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stderr if status else done.stdout


@pytest.fixture
def project(tmp_path):
    """A folder with a data set, a loss of its own, and a config of a run of two steps."""
    cfg = run_cfg(tmp_path, SOLVER__MAX_ITER=2, SOLVER__STEPS=(), OUTPUT_DIR="out")
    content = yaml.safe_load(cfg.dump())
    content["DATASETS"].update(TRAIN=["trees"], TEST=["trees"])
    content["KD"].update(LOSSES=["Edge"], EDGE={"POWER": 4}, IMPORTS=["trees.py"])
    (tmp_path / "distill.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "trees.py").write_text(PROJECT)
    return tmp_path


def test_a_project_trains_by_its_config_alone_and_its_folder_is_kept(project):
    """D44, D47, D52: modules beside the config, a second run into the folder, what the log says."""
    train = ("-m", "kd_det", "train", "--config-file")
    (project / "elsewhere").mkdir()
    run(project / "elsewhere", *train, "../distill.yaml", "OUTPUT_DIR", "../out")
    log = (project / "out/log.txt").read_text()
    table = log[log.index("student <- teacher") :]
    assert re.search(r"edge .* p2 \(8 channels, (\d+ x \d+)\) <- p2 \(8 channels, \1\)", table[:500])
    assert log.count("student <- teacher") == 1
    written = yaml.safe_load((project / "out/config.yaml").read_text())
    assert written["KD"]["IMPORTS"] == [str(project / "trees.py")] and written["KD"]["EDGE"]["POWER"] == 4
    assert "NST" not in written["KD"] and "&id" not in (project / "out/config.yaml").read_text()

    before = (project / "out/metrics.json").read_text()
    error = run(project, *train, "distill.yaml", status=1)
    assert "error: OUTPUT_DIR 'out' holds the checkpoints of a run: continue it with --resume" in error
    assert (project / "out/metrics.json").read_text() == before
    (project / "out/mine.txt").touch()
    run(project, *train, "out/config.yaml", "--overwrite", "SOLVER.MAX_ITER", "1", "OUTPUT_DIR", "out")
    assert len((project / "out/metrics.json").read_text().splitlines()) < 1 + len(before.splitlines())
    assert (project / "out/mine.txt").exists() and not (project / "out/model_0000001.pth").exists()
    exported = ("export", "--config-file", "out/config.yaml", "--weights", "out/model_final.pth", "--output", "plain")
    assert "needs Detectron2, not kd_det" in run(project, "-m", "kd_det", *exported)


@pytest.mark.parametrize(
    "opts,message",
    [
        (["KD.EDGE.POWER", "3"], "Unknown config key 'KD.EDGE.POWER'.*--import MODULE, or KD.IMPORTS"),
        (["--import", "no_such_module"], "--import: 'no_such_module' cannot be imported: No module named"),
        (["--import", "no_such.py"], "--import: there is no file .*no_such.py"),
        (["DATASETS.TRAIN", "('trees_train',)"], "Unknown data set 'trees_train'.*--import MODULE, or KD.IMPORTS"),
    ],
)
def test_messages_name_the_way_to_a_projects_names(tmp_path, opts, message):
    """D44."""
    (tmp_path / "run.yaml").write_text(run_cfg(tmp_path).dump())
    args = parse_arguments(argument_parser(), ["--config-file", str(tmp_path / "run.yaml"), *opts])
    with pytest.raises(ValueError, match=message):
        check_run(load_config(args), args)


def test_imported_modules_add_their_keys_once(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "once_loss.py").write_text("def add_once_config(cfg):\n    cfg.KD.ONCE = 1\n")
    (tmp_path / "run.yaml").write_text("KD:\n  ONCE: 5\n  IMPORTS: [once_loss]\n")
    argv = ["--config-file", str(tmp_path / "run.yaml"), "--import", "once_loss"]
    cfg = load_config(parse_arguments(argument_parser(), argv))
    assert cfg.KD.ONCE == 5 and cfg.KD.IMPORTS == ["once_loss"]


def test_a_loss_whose_keys_nothing_reads_is_refused(tmp_path, monkeypatch):
    """D45: without from_config, KD.EDGE.POWER was silently ignored."""
    scope = {"__file__": str(tmp_path / "trees.py"), "__name__": "trees"}
    source = PROJECT.replace("register_coco_instances(", "(").replace('"edge"', '"brim"').replace("EDGE", "BRIM")
    source = source.replace("EdgeLoss", "BrimLoss").replace("power, **kwargs", "power=2, **kwargs")
    start, end = source.index("    @classmethod"), source.index("    def forward")
    exec(source[:start] + source[end:], scope)
    cfg = distillation_cfg(tmp_path)
    scope["add_edge_config"](cfg)
    cfg.KD.LOSSES = ("Brim",)
    with pytest.raises(ValueError, match=r"BrimLoss does not read KD.BRIM.POWER, .*from_config"):
        build_model(cfg)


def counting(monkeypatch) -> list:
    """Every build of a GeneralizedRCNN."""
    built = []
    original = META_ARCH_REGISTRY.get("GeneralizedRCNN").__init__
    monkeypatch.setattr(
        META_ARCH_REGISTRY.get("GeneralizedRCNN"),
        "__init__",
        lambda self, *args, **kwargs: (built.append(1), original(self, *args, **kwargs))[1],
    )
    return built


def test_a_teacher_by_arguments_builds_nothing_while_they_are_parsed(tmp_path, monkeypatch):
    """D41: both networks were built by load_config, in the parent and again in every process."""
    distilled = run_cfg(tmp_path)
    teacher = ["--teacher", distilled.KD.TEACHER.CONFIG_FILE, "--teacher-weights", distilled.KD.TEACHER.WEIGHTS]
    plain = run_cfg(tmp_path, MODEL__META_ARCHITECTURE="GeneralizedRCNN")
    plain.KD.PKD.STUDENT_TAPS = ("p2", "p3", "p7")
    (tmp_path / "student.yaml").write_text(plain.dump())
    built = counting(monkeypatch)
    args = parse_arguments(argument_parser(), ["--config-file", str(tmp_path / "student.yaml"), *teacher])
    cfg = load_config(args)
    assert not built and cfg.MODEL.META_ARCHITECTURE == "Distiller"
    cfg = check_run(cfg, args)
    assert len(built) == 2  # the student and the teacher
    assert cfg.KD.LOSSES == ("PKD",) and cfg.KD.PKD.STUDENT_TAPS == ("p2", "p3")
    # The processes that train read the same options.
    assert load_config(args) == cfg and len(built) == 2
    by_hand = plain.clone()
    add_teacher(by_hand, teacher[1], weights=teacher[3])
    assert (by_hand.KD.LOSSES, by_hand.KD.PKD.STUDENT_TAPS) == (cfg.KD.LOSSES, cfg.KD.PKD.STUDENT_TAPS)


def test_every_command_describes_itself(capsys, monkeypatch):
    """D52: a description, an example, and no option of a training where none is trained."""
    monkeypatch.setattr(sys, "argv", ["kd-det", "--help"])
    console.main()
    listed = capsys.readouterr().out
    for command in console.COMMANDS:
        assert f"  {command} " in listed
        monkeypatch.setattr(sys, "argv", ["kd-det", command, "--help"])
        with pytest.raises(SystemExit) as e:
            console.main()
        text = capsys.readouterr().out
        assert e.value.code == 0 and f"    kd-det {command}" in text
        assert ("--num-gpus" in text) == (command in ("train", "lazy-train", "pretrain"))
    monkeypatch.setattr(sys, "argv", ["kd-det", "trian"])
    with pytest.raises(SystemExit, match="Unknown command 'trian'. Did you mean 'train'"):
        console.main()


def test_the_console_script_is_quick_and_quiet():
    """Its help needs no PyTorch, and no command prints the deprecation warnings of other packages."""
    code = "import sys, kd_det_command; {}kd_det_command.main(); assert ('torch' in sys.modules) == {}"
    for argument, imported in (("--help", False), ("taps", True)):
        before = "import kd_det.cli.taps; kd_det.cli.taps.main = print; " if imported else ""
        command = [sys.executable, "-c", code.format(before, imported), argument]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
        assert (done.returncode, done.stderr) == (0, b"")
    # What a process that is told otherwise shows stays.
    done = subprocess.run([sys.executable, "-W", "error", "-c", "import kd_det_command, warnings;"
                           "warnings.warn('`torch.jit.script` is deprecated', FutureWarning)"],
                          cwd=ROOT, capture_output=True)  # fmt: skip
    assert done.returncode == 1 and b"FutureWarning" in done.stderr


@pytest.mark.parametrize("command", [["-m", "kd_det", "taps", "--help"], ["tools/list_taps.py", "--help"]])
def test_every_way_to_a_command_is_as_quiet(command):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_importing_kd_det_leaves_the_filters_of_warnings_alone():
    """Those of PyTorch and Detectron2, which it imports, are theirs."""
    code = "import detectron2.engine, torchvision, sys, warnings; before = list(warnings.filters); import kd_det; "
    code += "sys.exit(any('torch' in str(f) for f in warnings.filters if f not in before))"
    assert not subprocess.run([sys.executable, "-c", code, "kd_det"], cwd=ROOT, capture_output=True).returncode


def test_configs_are_found_from_anywhere(tmp_path, monkeypatch):
    name = "configs/Quickstart/student_R_18_FPN.yaml"
    monkeypatch.chdir(tmp_path)
    assert Path(find_config(name)).samefile(CONFIGS / "Quickstart/student_R_18_FPN.yaml")
    (tmp_path / "configs/Quickstart").mkdir(parents=True)
    (tmp_path / name).touch()
    assert find_config(name) == name


LAZY_PROJECT = """
from detectron2.config import get_cfg
from detectron2.modeling import build_model
import tests.tiny

def network(path):
    cfg = get_cfg()
    cfg.merge_from_file(path)
    return build_model(cfg)

def batches():
    while True:
        yield tests.tiny.batch()
"""
LAZY = """
from detectron2.config import LazyCall as L
from lazy_project import batches, network

model = L(network)(path={path!r})
dataloader = dict(train=L(batches)())
optimizer, lr_multiplier = dict(), dict()
train = dict(device="cpu", init_checkpoint="", output_dir="out")
"""


def test_lazy_configs_on_equal_terms(tmp_path, capsys, monkeypatch):
    """D51: taps and weights of a LazyConfig, with --teacher and --losses."""
    cfg = distillation_cfg(tmp_path)
    for name, plain in (("student", tiny_cfg()), ("teacher", tiny_cfg(depth=50, width=8))):
        (tmp_path / f"{name}.yaml").write_text(student_cfg(plain).dump())
    (tmp_path / "lazy_project.py").write_text(LAZY_PROJECT)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.py").write_text(LAZY.format(path=str(tmp_path / "student.yaml")))
    argv = ["--config-file", "config.py"]
    with pytest.raises(SystemExit):
        taps.main(argv)
    assert re.search("No module named 'lazy_project'.*--import MODULE", capsys.readouterr().err)
    argv += ["--import", "lazy_project.py"]
    taps.main(argv)
    assert "res4.pre_activation" in capsys.readouterr().out
    teacher = ["--teacher", cfg.KD.TEACHER.CONFIG_FILE, "--teacher-weights", cfg.KD.TEACHER.WEIGHTS]
    taps.main([*argv, *teacher])
    assert "teacher, for images of" in capsys.readouterr().out
    weights.main([*argv, *teacher, "--batches", "1"])
    out = capsys.readouterr().out
    assert "KD.PKD.WEIGHT" in out
    weights.main([*argv, *teacher, "--losses", "PKD", "--batches", "1"])
    assert "KD.PKD.WEIGHT" in capsys.readouterr().out
    path = str(tmp_path / "student.yaml")
    (tmp_path / "teacher.py").write_text(LAZY.format(path=str(tmp_path / "teacher.yaml")))
    weights.main([*argv, "--teacher", str(tmp_path / "teacher.py"), *teacher[2:], "--losses", "PKD", "--batches", "1"])
    assert "KD.PKD.WEIGHT" in capsys.readouterr().out
    torch.save({"model": build_model(tiny_cfg()).state_dict()}, tmp_path / "w.pth")
    export.main([*argv, "--weights", str(tmp_path / "w.pth"), "--output", str(tmp_path / "plain")])
    exported = instantiate(LazyConfig.load(str(tmp_path / "plain/config.yaml")).model)
    exported.load_state_dict(torch.load(tmp_path / "plain/model.pth")["model"])
    assert path in (tmp_path / "plain/config.yaml").read_text()
    with pytest.raises(SystemExit):
        weights.main([*argv, "--losses", "PKD"])
    assert "--losses needs --teacher" in capsys.readouterr().err


def test_a_lazy_students_classes_are_matched_by_name(tmp_path, monkeypatch):
    """The teacher has them in another order; the student's names are those of the data set that is trained on."""
    for name, classes in (("lazy_students", ["a", "b", "c"]), ("lazy_teachers", ["c", "B", "a"])):
        MetadataCatalog.get(name).set(thing_classes=classes)
    teacher = tiny_cfg(depth=50, width=8, DATASETS__TRAIN=("lazy_teachers",))
    cfg = distillation_cfg(tmp_path, teacher=teacher)
    (tmp_path / "student.yaml").write_text(student_cfg(tiny_cfg()).dump())
    (tmp_path / "lazy_names.py").write_text(LAZY_PROJECT)
    monkeypatch.chdir(tmp_path)
    text = LAZY.format(path=str(tmp_path / "student.yaml")).replace("lazy_project", "lazy_names")
    data = "dict(_target_='batches', dataset=dict(_target_='records', names='lazy_students'))"
    (tmp_path / "config.py").write_text(text.replace("L(batches)()", data))
    argv = ["--config-file", "config.py", "--import", "lazy_names.py", "--losses", "SoftTarget"]
    argv += ["--teacher", cfg.KD.TEACHER.CONFIG_FILE, "--teacher-weights", cfg.KD.TEACHER.WEIGHTS]
    model = instantiate(load_lazy_config(parse_arguments(argument_parser(), argv)).model)
    assert model.losses["soft_target"].classes.teacher.tolist() == [2, 1, 0, 3]
