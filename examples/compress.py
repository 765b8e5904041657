"""Compress a model in one call, and save a checkpoint that transformers loads after `import unirank`.

    python examples/compress.py MODEL --calib my-text.txt --remove 0.2 -o OUT

MODEL is a directory with a Hugging Face checkpoint, or a name on the hub. The analysis is kept in OUT-analysis: the
same command with another --remove and -o, and with --store OUT-analysis, does not calibrate again.
"""

from __future__ import annotations

import argparse

import unirank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="MODEL", help="directory or hub name of the dense model")
    parser.add_argument("--calib", default="my-text.txt", help="calibration text: UTF-8 file of your own domain")
    parser.add_argument("--windows", type=int, default=64, help="calibration windows of 512 tokens")
    parser.add_argument("--remove", type=float, default=0.2, help="fraction of the decoder's weights to remove")
    parser.add_argument("--preset", choices=unirank.presets(), default="unirank")
    parser.add_argument("--store", help="where to keep the analysis; default: OUT-analysis")
    parser.add_argument("-o", "--out", default="OUT", help="directory of the compressed checkpoint")
    arguments = parser.parse_args()

    compressed = unirank.compress(
        arguments.model,
        arguments.remove,
        preset=arguments.preset,
        calibration=unirank.Calibration(text=arguments.calib, windows=arguments.windows),
        store=arguments.store or f"{arguments.out}-analysis",
    )
    compressed.save(arguments.out)
    report = compressed.report
    print(f"{arguments.out}: {report.low_rank} matrices are low-rank now, {report.dense} stayed dense")
    print(f"removed: {report.removed_of_targets:.2%} of the decoder's weights, {report.removed_of_model:.2%} of all")


if __name__ == "__main__":
    main()
