import subprocess
import sys
import venv
from pathlib import Path

LEND = Path(__file__).resolve().parents[2] / "tools" / "lend_packages.py"


def test_packages_of_a_virtual_environment_are_seen(tmp_path):
    lender, borrower = tmp_path / "lender", tmp_path / "borrower"
    for folder in (lender, borrower):
        venv.create(folder, with_pip=False)
    site = Path("lib", f"python{sys.version_info[0]}.{sys.version_info[1]}", "site-packages")
    (lender / site / "plain.py").write_text("name = 'plain'\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "editable.py").write_text("name = 'editable'\n")
    (lender / site / "editable.pth").write_text(f"{elsewhere}\n")

    python = borrower / "bin" / "python"
    subprocess.run([lender / "bin" / "python", LEND, python], check=True)
    code = "import plain, editable, sys; print(plain.name, editable.name, sys.prefix)"
    out = subprocess.check_output([python, "-c", code], text=True)
    assert out == f"plain editable {borrower}\n"
