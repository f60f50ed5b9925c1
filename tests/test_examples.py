"""Every script of examples/ runs to its end, trains, and prints what its optimizer saw."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from helpers import SANITIZED, assert_ran, run_python

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = {
    "plain_loop": (None, "skipped steps: 1"),
    "amp_gradscaler": (None, "skipped steps: "),
    "lightning_manual_and_automatic": ("lightning", "Manual after 24 steps: gradient norm (L2)"),
    "hf_trainer": ("transformers", "40 steps, mean loss "),
    "accelerate_loop": ("accelerate", "skipped steps: 0"),
    "bfloat16_layer_norm": (None, "gradient of bias, from 65,536 ones"),
    "self_supervised_digits": ("matplotlib", "| VICReg, a bad batch, SpikeSkip | "),
    "fsdp2_clip": (None, "skipped steps: 1"),
    "torchtitan_clip": (None, "step 40: gradient norm "),
    "accelerate_fsdp": ("accelerate", "epoch 5: loss 0.0"),
    "lightning_model_parallel": ("lightning", "after 12 steps: gradient norm "),
    "adapt_digits": ("sklearn", "| inverted | "),
    "curriculum_digits": ("sklearn", "| competence by the noise | never | "),
}
# These run on two processes.
LAUNCHED = {"fsdp2_clip", "torchtitan_clip", "accelerate_fsdp", "lightning_model_parallel"}
ARGUMENTS = {
    "adapt_digits": ["--seeds", "1", "--steps", "5"],
    "curriculum_digits": ["--seeds", "1", "--steps", "10"],
    "self_supervised_digits": ["--seeds", "1", "--steps", "40", "--out", "{tmp}/figure.svg"],
}


@pytest.mark.skipif(SANITIZED, reason="the packages' own native code is not sanitized")
@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path) -> None:
    package, says = EXAMPLES[name]
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    arguments = [a.format(tmp=tmp_path) for a in ARGUMENTS.get(name, [])]
    path = str(FOLDER / f"{name}.py")
    if name in LAUNCHED:
        launcher = str(Path(__file__).parent / "launched.py")
        launch = ["--standalone", "--nproc-per-node", "2", launcher, path]
        code = f"from torch.distributed.run import main; main({launch})"
    else:
        code = (
            f"import runpy, sys; sys.argv[1:] = {arguments}\n"
            f"runpy.run_path({path!r}, run_name='__main__')"
        )
    done = run_python(
        code,
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
        HF_HUB_OFFLINE="1",
    )
    assert says in assert_ran(done)
    assert "Warning" not in done.stderr


def test_all_are_short_and_listed() -> None:
    scripts = {path.stem: path for path in FOLDER.glob("*.py")}
    assert scripts.keys() == EXAMPLES.keys()
    for name, path in scripts.items():
        limit = 125 if name in ARGUMENTS else 60  # a study has its nets and its table
        assert len(path.read_text().splitlines()) < limit
