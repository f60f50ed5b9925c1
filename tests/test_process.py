"""The library inside real processes: forks, threads, long runs, and without its compiled module."""

import sys
import threading
import time

import pytest
import torch
from helpers import SANITIZED, assert_ran, bits, owner, owners, random, run_python

import gradfuse

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and forks")
plain_memory = pytest.mark.skipif(SANITIZED, reason="a sanitizer keeps freed memory")

# numpy fills the gradients: torch's own operators hang in a fork of a process that has threads.
USE = """
import os, numpy as np, torch, gradfuse
torch.set_num_threads(4)

params = [torch.zeros(n) for n in (3, 900_000, 70_000)]
for p in params:
    p.grad = torch.zeros_like(p)

def clip():
    for p in params:
        p.grad.numpy()[:] = np.arange(p.numel()) % 7 - 3
    norm = gradfuse.clip_grad_norm_(params, 1.0)
    gradfuse.clip_grad_value_(params, 1e-4)
    gradfuse.adaptive_clip_grad_(params, 0.001)
    return norm.item(), [p.grad.numpy().tobytes() for p in params]

expected = clip()  # the threads are up now
"""


@linux_only
def test_a_forked_child_clips(native):
    script = """
for generation in range(2):
    child = os.fork()
    if child == 0:
        same = clip() == expected
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(clip() != expected)
        os._exit(not same or os.waitpid(grandchild, 0)[1] != 0)
    assert os.waitpid(child, 0)[1] == 0
    assert clip() == expected  # the parent's own threads are still good
print("same")
"""
    assert assert_ran(run_python(USE + script, timeout=60)) == "same\n"


@linux_only
def test_data_loader_workers_clip(native):
    """The workers are forks of a process that has threads."""
    script = """
class Clipping(torch.utils.data.Dataset):
    def __len__(self):
        return 6
    def __getitem__(self, index):
        return clip() == expected

loader = torch.utils.data.DataLoader(
    Clipping(), num_workers=2, multiprocessing_context="fork", timeout=50
)
print(all(bool(same) for same in loader))
"""
    assert assert_ran(run_python(USE + script, timeout=60)) == "True\n"


def train(rank, params):
    """Steps on parameters that other processes step on too; both optimizers move them down."""
    rule = (gradfuse.optim.SGD, gradfuse.optim.AdamW)[rank]
    optimizer = rule(params, lr=1e-3, clip=1.0)
    for _ in range(50):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()


@linux_only
def test_hogwild(native):
    """Spawned processes share the parameters' memory, and nothing keeps their steps apart."""
    params = [torch.ones(n).share_memory_() for n in (3, 200_000)]
    before = [p.clone() for p in params]
    torch.multiprocessing.spawn(train, args=(params,), nprocs=2)
    for p, old in zip(params, before, strict=True):
        assert p.isfinite().all()
        assert (p < old).all()


@pytest.mark.usefixtures("backend")
def test_threads_calling_at_once(device):
    """Each thread has its own parameters. The outcome equals that of one call after the other."""

    def train(seed):
        outcome = []
        for step in range(4):
            grads = [
                random(n, device=device, seed=1000 * seed + step) for n in (600_000, 7, 1, 3000)
            ]
            params = owners(grads)
            clipper = gradfuse.GradClipper(params, 2.0)
            outcome.append(bits(gradfuse.clip_grad_norm_(params, 3.0)))
            outcome.append(clipper.clip_().to_dict())
            gradfuse.clip_grad_value_(params, 0.01)
            gradfuse.adaptive_clip_grad_(params)
            outcome.append(bits(grads))
        return outcome

    seeds = range(4)
    serial = [train(seed) for seed in seeds]
    together = {}
    start = threading.Barrier(len(seeds))

    def run(seed):
        start.wait()
        together[seed] = train(seed)

    workers = [threading.Thread(target=run, args=(seed,)) for seed in seeds]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert [together[seed] for seed in seeds] == serial


def test_threads_sharing_one_clipper(native):
    """The threads only measure, because nothing would order their writes."""
    grads = [random(600_000), random(9)]
    clipper = gradfuse.GradClipper(owners(grads), float("inf"))
    expected = clipper.clip_().to_dict()
    seen = []

    def run():
        seen.extend(clipper.clip_().to_dict() == expected for _ in range(20))

    workers = [threading.Thread(target=run) for _ in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert seen == [True] * 80


class Ticker(threading.Thread):
    """Counts how often it gets the GIL, for which it asks every 0.1 ms."""

    def __init__(self):
        super().__init__(daemon=True)
        self.ticks = 0
        self.stop = False

    def run(self):
        while not self.stop:
            time.sleep(1e-4)
            self.ticks += 1

    def ticked_during(self, call):
        before = self.ticks
        call()
        return self.ticks > before


@pytest.fixture
def ticker():
    """A running Ticker. The switch interval is so long that it runs only if the GIL is released."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    ticker = Ticker()
    ticker.start()
    yield ticker
    ticker.stop = True
    sys.setswitchinterval(interval)
    ticker.join()


def long_calls():
    """Calls that take about a tenth of a second each, because general powers are slow."""
    grads = [random(1000).repeat(3000)]
    params = owners(grads)
    clipper = gradfuse.GradClipper(params, 1e9, 2.5)
    return {
        "get_total_norm": lambda: gradfuse.get_total_norm(grads, 2.5),
        "clip_grad_norm_": lambda: gradfuse.clip_grad_norm_(params, 1e9, 2.5),
        "GradClipper.clip_": clipper.clip_,
        "adaptive_clip_grad_": lambda: gradfuse.adaptive_clip_grad_(params, 1e9, norm_type=2.5),
        "clip_grad_value_": lambda: [gradfuse.clip_grad_value_(params, 1e9) for _ in range(30)],
    }


@pytest.mark.parametrize("name", long_calls())
def test_the_gil_is_released(name, native, ticker):
    call = long_calls()[name]
    assert any(ticker.ticked_during(call) for _ in range(20))


def test_the_ticker_would_show_a_held_gil(ticker):
    assert not any(ticker.ticked_during(lambda: sum(range(500_000))) for _ in range(20))


def resident_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


@linux_only
@plain_memory
def test_ten_thousand_calls_in_flat_memory(native):
    grads = [random(100), random(20, 30).t(), random(3, dtype=torch.float16)]
    params = [*owners(grads), torch.zeros(4)]
    clipper = gradfuse.GradClipper(params, 1.0)

    def step():
        gradfuse.clip_grad_norm_(params, 0.5)
        gradfuse.clip_grads_with_norm_(params, 0.5, gradfuse.get_total_norm(grads))
        gradfuse.clip_grad_value_(params, 0.1)
        gradfuse.adaptive_clip_grad_(params)
        report = clipper.clip_()
        clipper.max_norm = 0.1
        return report.worst(1)

    for _ in range(2000):
        step()
    before = resident_bytes()
    for _ in range(10_000):
        step()
    assert resident_bytes() - before < 4 << 20


@linux_only
@plain_memory
def test_errors_leak_nothing(native):
    bad = [owner(random(50_000)), owner(torch.ones(3, dtype=torch.int64))]

    def step():
        with pytest.raises(TypeError):
            gradfuse.clip_grad_norm_(bad, 0.5)

    for _ in range(300):
        step()
    before = resident_bytes()
    for _ in range(3000):
        step()
    assert resident_bytes() - before < 4 << 20


@linux_only
@plain_memory
def test_no_memory_that_grows_with_the_gradients(native):
    """Gradients of 400 MB, dense, strided and complex, are clipped in less than 16 MB more."""
    script = """
    import resource, torch, gradfuse

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def owner(grad):
        parameter = torch.zeros(1, dtype=grad.dtype).expand(grad.shape)
        parameter.grad = grad
        return parameter

    grads = [
        torch.ones(25_000_000),
        torch.ones(5000, 10_000).t()[:, ::2],
        torch.ones(12_500_000, dtype=torch.complex64),
    ]
    params = [owner(g) for g in grads]
    small = [owner(torch.ones(50_000))]
    def step(ps):
        clipper = gradfuse.GradClipper(ps, 5.0)
        for p in (2.0, 3.0, 1.0):
            gradfuse.get_total_norm([q.grad for q in ps], p)
        clipper.clip_()
        gradfuse.clip_grad_norm_(ps, 4.0)
        gradfuse.clip_grad_value_(ps[:2], 1e-5)
        gradfuse.adaptive_clip_grad_(ps)
    step(small)
    before = peak()
    step(params)
    print(peak() - before)
    """
    kilobytes = int(assert_ran(run_python(script)))
    assert kilobytes < 16 << 10


def test_missing_compiled_module_warns_once_and_runs():
    script = """
    import sys, warnings

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name == "gradfuse._C":
                raise ImportError("no such module, says the test")

    sys.meta_path.insert(0, Blocker())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import torch, gradfuse
        params = [torch.ones(4), torch.ones(2, 3)]
        for p in params:
            p.grad = torch.full(p.shape, 2.0)
        clipper = gradfuse.GradClipper(params, 1.0)
        gradfuse.clip_grad_value_(params, 1.0)
        norm = gradfuse.clip_grad_norm_(params, 1.0)
        gradfuse.clip_grads_with_norm_(params, 1.0, gradfuse.get_total_norm([params[0].grad]))
        gradfuse.adaptive_clip_grad_(params, 0.5)
        report = clipper.clip_()
        compiled = torch.compile(lambda: gradfuse.clip_grad_norm_(params, 0.1), backend="eager")
        compiled()
    assert abs(norm.item() - 10**0.5) < 1e-5, norm
    assert len(report.parameters) == 2
    messages = [str(w.message) for w in caught if "gradfuse" in str(w.message)]
    assert len(messages) == 1, messages
    print(messages[0])
    """
    message = assert_ran(run_python(script, GRADFUSE_NATIVE="1"))
    assert "no such module, says the test" in message
    assert "pip install" in message


def test_a_module_built_for_another_torch_is_not_used(native):
    script = """
    import sys, types, warnings

    stale = types.ModuleType("gradfuse._C")
    stale.torch_version = "1.0.0"
    sys.modules["gradfuse._C"] = stale
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import torch, gradfuse
    print(*[str(w.message) for w in caught if "gradfuse" in str(w.message)], sep="\\n")
    p = torch.zeros(4)
    p.grad = torch.full((4,), 2.0)
    print(gradfuse.clip_grad_norm_(p, 1.0).item())
    """
    warning, norm = assert_ran(run_python(script)).splitlines()
    assert "built for torch 1.0.0, this is torch" in warning
    assert norm == "4.0"


def test_thousands_of_tensors_that_only_python_owns(native):
    """To copy one takes the GIL, which the thread that waits for the others holds."""
    script = """
        import torch, gradfuse
        torch.set_num_threads(2)
        tensors = [torch.ones(3) for _ in range(1500)]
        print(gradfuse.get_total_norm(tensors).item() ** 2)
        params = [torch.nn.Parameter(t) for t in tensors]
        for p in params:
            p.grad = torch.ones(3)
        kept = [p.grad for p in params[::2]]
        gradfuse.clip_grad_norm_(params, 1.0)
        gradfuse.GradClipper(params, 0.5).clip_()
        gradfuse.optim.SGD(params, lr=0.1, clip=0.1).step()
    """
    assert float(assert_ran(run_python(script, timeout=60))) == pytest.approx(4500)
