"""What a run says of itself: the settings in the file it writes, the report, the summary at its end."""

import contextlib
import platform
import resource
from dataclasses import asdict

import torch

import hessian
import quant
from datautils import digest
from eval_quantized import versions
from flags import Run
from leanquant import packing


def settings_of(run: Run, config: quant.QuantConfig, bits: dict[str, int], ids: torch.Tensor) -> dict:
    """What the written file says about itself. Nothing in it varies from run to run. bits: of each linear; ids: the calibration text's."""
    method = "rtn" if config.nearest else "gptq" if config.grid == "minmax" else "leanquant"
    return {
        "format_version": packing.FORMAT_VERSION,
        "method": method,
        **{k: v for k, v in asdict(config).items() if k != "levels_dtype"},
        "exponent": config.exponent if method == "leanquant" else None,
        "true_sequential": run.true_sequential,
        "n_layers": run.n_layers,
        "packing": run.packing,
        "skip": run.skip,
        "vocab_bits": run.vocab_bits,
        "bits_for": {name: its for name, its in bits.items() if its not in (config.bits, 16)},
        "calibration": run.dataset,
        "calibration_tokens": digest(ids.numpy().tobytes()),
        "nsamples": run.nsamples,
        "seqlen": run.seqlen,
        "seed": run.seed,
        "base_model": run.model,
        "versions": versions("safetensors"),
    }


def example_row(checkpoint, name: str, row: int, grid: quant.Grid, factor: hessian.Factor, bins: int = 80) -> dict:
    """What scripts/plot.py draws of one `row` of the weight `name`, or of its first group: the weights counted in `bins` between
    `low` and `high`, the levels, and the weights of the columns, one in a hundred, that are outliers of 1 / diag(inv(H))."""
    w = checkpoint.get(name, slice(row, row + 1))[0].float()
    diagonal = torch.empty(len(w))
    diagonal[factor.order.cpu()] = factor.U.column_norms().square().float().cpu()
    w = w[: len(w) // grid.levels.shape[1]]
    diagonal = diagonal[: len(w)]
    outliers = diagonal.argsort()[: max(1, len(w) // 100)]
    return {
        "row": row,
        "low": w.min().item(),
        "high": w.max().item(),
        "counts": torch.histc(w, bins).int().tolist(),
        "levels": grid.levels[row, 0].tolist(),
        "outlier_weights": w[outliers].tolist(),
    }


def write_report(run: Run, contents: dict) -> None:
    if run.report:
        device = {"device": str(run.device)}
        if run.device.type == "cuda":
            device |= {"gpu": torch.cuda.get_device_name(run.device), "peak_device_bytes": torch.cuda.max_memory_allocated(run.device)}
        machine = {
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "ranks": run.ranks.size,
            "peak_host_bytes": peak_host_bytes(),
            **device,
        }
        packing.write_json(run.report, contents | {"machine": machine})


def print_summary(contents: dict, run: Run) -> None:
    phases = ", ".join(f"{name} {seconds:.0f}" for name, seconds in contents["phase_seconds"].items())
    where = f"; saved {run.save_path}" if run.save_path else ""
    print(f"quantized in {contents['quantization_seconds']:.1f} s ({phases}), peak {peak_memory(run.device)}{where}", flush=True)


def peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB"
    return f"{peak_host_bytes() / 1e9:.1f} GB"


def peak_host_bytes() -> int:
    """Peak resident memory of this process."""
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
