"""python -m export run=DIR [key=value ...]: export the winner of a run and check its logits against PyTorch's.

Writes exported/<id>/: model.onnx (float32, takes normalised images [N, 3, H, W]), model_rewritten.onnx (the same in
operators that onnxruntime computes fast), model_int8.onnx (quantised as far as accuracy allows), each also as
*_uint8.onnx (normalisation inside, takes uint8 [N, H, W, 3]), model.safetensors (PyTorch), reference.npy (PyTorch's
float64 logits of the test images), mistakes.npy (test images misclassified with the highest confidence), checks/
(parity check of each file), manifest.json (digests, classes, normalisation, parity).
On request also model_fp16.onnx and model.pt2 (AOTInductor). An intact export with the same settings is not repeated.
"""

import sys

from harness.config import ExportConfig, command_line


def export_run(config: ExportConfig) -> int:
    from export.exporter import export_winner
    from harness.run.progress import Progress
    from harness.run.trust import trusted_run

    run = trusted_run(config.run, config.trust)
    progress = Progress(run.path / "run.log")
    with run.locked(), progress.live():
        export_winner(run, config.export, progress)
    progress.check_logged()
    return 0


def main() -> int:
    return command_line.run_command(ExportConfig, export_run, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
