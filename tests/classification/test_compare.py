import os

import pytest

from kd_det.classification.compare import compare, final_accuracy

# Stands in for tools/pretrain_backbone.py: seed 0 ends at 50 (at), 70 (nst), seed 1 ten higher.
TOOL = """
import json, os, sys
options = dict(zip(sys.argv[3::2], sys.argv[4::2]))
folder = options["OUTPUT_DIR"]
os.makedirs(folder)
top1 = {"at": 50, "nst": 70}[os.path.basename(sys.argv[2])[:-5]] + 10 * int(options["SEED"])
with open(os.path.join(folder, "metrics.json"), "w") as f:
    last = {"classification/top1": top1, "classification/top5": 90.0}
    for line in ({"time": 0.25}, {"classification/top1": 1.0}, last):
        print(json.dumps(line), file=f)
open(os.path.join(folder, "backbone.pkl"), "w").close()
print("training")
"""


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tool.py").write_text(TOOL)
    for name in ("at", "nst"):
        (tmp_path / f"{name}.yaml").write_text(f"OUTPUT_DIR: out/{name}\n")
    return ["at.yaml", "nst.yaml"]


def rows(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_the_table_holds_mean_spread_and_each_seed(runs):
    header, _, at, nst = rows(compare(runs, [0, 1], [], tool="tool.py"))
    assert header == ["config", "top-1", "top-5", "top-1 of seeds 0 1", "s/step"]
    assert at == ["at", "55.0 ± 7.1", "90.0 ± 0.0", "50.0 60.0", "0.25"]  # sqrt(5^2 + 5^2) = 7.07
    assert nst[:4] == ["nst", "75.0 ± 7.1", "90.0 ± 0.0", "70.0 80.0"]
    assert os.path.isdir("out/at/seed_1")


def test_complete_runs_are_read_not_repeated(runs, capsys):
    first = compare(runs[:1], [0], [], tool="tool.py")
    os.remove("tool.py")
    assert compare(runs[:1], [0], [], tool="tool.py") == first
    assert "out/at/seed_0: already complete, reused" in capsys.readouterr().out
    os.remove("out/at/seed_0/backbone.pkl")
    assert final_accuracy("out/at/seed_0") is None


def test_one_folder_for_all_runs(runs):
    compare(runs, [3], ["OUTPUT_DIR", "elsewhere"], tool="tool.py")
    assert sorted(os.listdir("elsewhere")) == ["at", "nst"] and os.path.isdir("elsewhere/nst/seed_3")


@pytest.mark.parametrize(
    "configs, opts, message",
    [
        (["at.yaml", "none.yaml"], [], r"\.yaml files that exist; missing: none\.yaml\."),
        ([], [], "missing: all"),
        (["at.yaml"], ["OUTPUT_DIR"], "KEY VALUE pairs behind the configs, found OUTPUT_DIR"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_run(runs, configs, opts, message):
    with pytest.raises(ValueError, match=message):
        compare(configs, [0], opts, tool="tool.py")
    assert not os.path.exists("out")


def test_a_failed_run_and_a_config_without_a_folder(runs, tmp_path):
    (tmp_path / "tool.py").write_text("import sys; sys.exit(3)")
    with pytest.raises(ValueError, match="at.yaml with seed 0 ended with status 3"):
        compare(runs, [0], [], tool="tool.py")
    (tmp_path / "at.yaml").write_text("VERSION: 2\n")
    with pytest.raises(ValueError, match="at.yaml sets no OUTPUT_DIR"):
        compare(runs, [0], [], tool="tool.py")
