"""Build wheel and sdist, look into them, and run the wheel in an empty environment.

The wheel is built from the sdist, so the sdist is complete. The environment is empty but for the
wheel; dependencies are those of this Python, so nothing large is downloaded. Then the resolution
of docs/how-to/install.md is installed: torchattacks beside a current `requests`. `make package`
runs this file.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
IN_WHEEL = {
    "art_denoised/py.typed",
    "art_denoised/__init__.pyi",
    "art_denoised/smoothing/__init__.pyi",
    "art_denoised/demo/digits_classifier.safetensors",
    "art_denoised/reports/templates/report.html",
}
IN_SDIST = {"CITATION.cff", "SECURITY.md", "CHANGELOG.md", "mkdocs.yml", "tests/test_package.py"}
LARGEST = 40  # MiB of the sdist
CERTIFY = """
import torch
import art_denoised as ad
from art_denoised.demo import digits_classifier
smoother = ad.Smoother(digits_classifier(), sigma=0.25)
x = ad.load_data("digits")[0][0][None]
print(ad.__file__, smoother.certify(x, ad.FixedN(100))[0])
"""
ATTACK = """
import requests, torch, torchattacks
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
x_adv = torchattacks.PGD(model, steps=2)(torch.rand(2, 1, 8, 8), torch.tensor([1, 2]))
assert x_adv.shape == (2, 1, 8, 8)
print(torchattacks.__file__, "with requests", requests.__version__)
assert not requests.__version__.startswith("2.25")
"""


def run(*command: str | Path) -> str:
    """Run a program outside the repository, whose folders are not to be imported."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        list(map(str, command)),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=tempfile.gettempdir(),
    ).stdout


def build(folder: Path) -> tuple[Path, Path]:
    """Build an sdist, and a wheel from it."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    return wheel, sdist


def check_contents(wheel: Path, sdist: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    outside = {name for name in names if not name.startswith(("art_denoised/", "art_denoised-"))}
    assert names >= IN_WHEEL, IN_WHEEL - names
    assert not outside, outside
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert inside >= IN_SDIST, IN_SDIST - inside
    assert sdist.stat().st_size < LARGEST * 2**20, f"{sdist.name} has {sdist.stat().st_size} bytes"


def empty(folder: Path) -> Path:
    """Return the Python of a new environment that borrows our dependencies, not this package."""
    venv.create(folder)
    python = folder / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(site) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install(python: Path, *packages: str | Path) -> None:
    options = ["--quiet", "--no-deps", "--force-reinstall"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, *packages)


def main() -> None:
    """Check the package, and print what ran."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel, sdist = build(folder / "dist")
        check_contents(wheel, sdist)
        python = empty(folder / "venv")
        install(python, wheel)
        print(run(python.parent / "art-denoised", "--version").strip())
        ran = run(python, "-c", CERTIFY).strip()
        assert str(folder) in ran, f"another copy was imported: {ran}"
        print(ran)
        install(python, "torchattacks>=3.5.1", "requests>=2.32", "urllib3>=2", "idna>=3")
        print(run(python, "-W", "ignore", "-c", ATTACK).strip())


if __name__ == "__main__":
    main()
