"""Fine-tune the factors of a compressed model; ranks and number of parameters stay.

    pip install 'unirank[finetune]'
    python examples/finetune.py OUT --text my-text.txt --steps 200 -o TUNED

With --distill 0.5 half of the loss comes from the dense model, which is then in memory beside the compressed one. It is
loaded from where it was when OUT was made, or from --against. A run that was killed goes on in OUT-training.
"""

from __future__ import annotations

import argparse

import unirank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compressed", nargs="?", default="OUT", help="checkpoint that unirank made")
    parser.add_argument("--text", default="my-text.txt", help="training text, or records of conversations")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--window", type=int, default=512, help="tokens a window")
    parser.add_argument("--distill", type=float, default=0.0, help="weight of the dense model's distribution, 0 to 1")
    parser.add_argument("--against", help="the dense model, for --distill")
    parser.add_argument("-o", "--out", default="TUNED", help="directory of the tuned checkpoint")
    arguments = parser.parse_args()

    settings = unirank.Finetune(steps=arguments.steps, window=arguments.window, distill=arguments.distill)
    work = f"{arguments.compressed}-training"
    tuned = unirank.finetune(arguments.compressed, arguments.text, settings, work=work, against=arguments.against)
    tuned.save(arguments.out)
    assert tuned.training is not None
    before, after = tuned.training["held_out_before"], tuned.training["held_out_after"]
    print(f"{arguments.out}: held-out loss {before:.3f} -> {after:.3f} nats a token; ranks as before")


if __name__ == "__main__":
    main()
