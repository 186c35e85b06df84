"""Bytes of the tensors that live during a run on a CPU: what a GPU would hold, of which there is none to measure it on."""

import weakref
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import activations
import hessian
import leanquant_grid
import modelutils
import quant


class LiveTensors(TorchDispatchMode):
    """Counts, within its block and thread, all storages that operators see."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((result, args, kwargs)):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(storage._cdata)
        self.now += size
        weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.remove(key)
        self.now -= size


def compute_as_a_gpu_does(monkeypatch) -> None:
    """Leave out what only a CPU needs, factors in float32 and blocks for what is kept, and take a GPU's chunks. Not in the search for
    scales, of which a kernel makes no tables: there the plan takes a CPU's."""

    def product(A, B):
        with torch.utils._python_dispatch._disable_current_modes():
            return torch.mm(A.float(), B.float())

    monkeypatch.setattr(hessian, "kernels", SimpleNamespace(on_gpu=lambda tensor: True))
    monkeypatch.setattr(hessian, "_product", product)
    monkeypatch.setattr(activations, "BLOCK_BYTES", 0)
    monkeypatch.setattr(modelutils._WideLinear, "forward", torch.nn.Linear.forward)
    for sizes in (quant.FIT_ELEMENTS, leanquant_grid.KMEANS_ELEMENTS, leanquant_grid.TABLE_ELEMENTS, leanquant_grid.LOCAL_ELEMENTS):
        monkeypatch.setitem(sizes, "cpu", sizes["cuda"])
    monkeypatch.setitem(leanquant_grid.SEARCH_BYTES, "cuda", leanquant_grid.SEARCH_BYTES["cpu"])
