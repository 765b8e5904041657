"""Refine a compressed model layer by layer, so that every layer comes close to the dense one; ranks stay.

    python examples/heal.py OUT --calib my-text.txt --windows 64 -o HEALED

The dense model is loaded from where it was when OUT was made, or from --against. A run that was killed goes on in
OUT-healing, which may be deleted when HEALED is there.
"""

from __future__ import annotations

import argparse

import unirank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compressed", nargs="?", default="OUT", help="checkpoint that unirank made")
    parser.add_argument("--calib", default="my-text.txt", help="text, like the one the model will meet")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--window", type=int, default=512, help="tokens a window")
    parser.add_argument("--against", help="the dense model")
    parser.add_argument("-o", "--out", default="HEALED", help="directory of the healed checkpoint")
    arguments = parser.parse_args()

    calibration = unirank.Calibration(arguments.calib, windows=arguments.windows, window=arguments.window)
    work = f"{arguments.compressed}-healing"
    healed = unirank.heal(arguments.compressed, calibration, work=work, against=arguments.against)
    healed.save(arguments.out)
    assert healed.training is not None
    for index, layer in enumerate(healed.training["layers"]):
        print(f"layer {index}: squared relative error {layer['before']:.4f} -> {layer['after']:.4f}")


if __name__ == "__main__":
    main()
