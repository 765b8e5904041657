"""What compression cost: perplexity of the dense and of the compressed model on the same windows of each text.

    python examples/evaluate.py OUT --against MODEL --text my-text.txt other-text.txt

Give at least two texts: one like the calibration text, and one that it does not cover. What was forgotten shows there.
"""

from __future__ import annotations

import argparse

import unirank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compressed", nargs="?", default="OUT", help="checkpoint that unirank made")
    parser.add_argument("--against", default="MODEL", help="directory or hub name of the dense model")
    parser.add_argument("--text", nargs="+", default=["my-text.txt"], help="texts to evaluate on")
    parser.add_argument("--window", type=int, default=512, help="tokens a window")
    parser.add_argument("--limit", type=int, default=16, help="windows of each text")
    arguments = parser.parse_args()

    compressed, dense = unirank.open_compressed(arguments.compressed), unirank.load(arguments.against)
    print(f"removed: {compressed.report.removed_of_targets:.2%} of the decoder's weights")
    print(f"{'text':30} {'dense':>10} {'compressed':>10} {'x dense':>7}  windows")
    for text in arguments.text:
        before, after = (
            unirank.evaluate(of.model, of.tokenizer, text=text, window=arguments.window, limit=arguments.limit)
            for of in (dense, compressed)
        )
        ratio = after.perplexity / before.perplexity
        print(f"{after.text:30} {before.perplexity:10.2f} {after.perplexity:10.2f} {ratio:7.2f}  {after.windows}")


if __name__ == "__main__":
    main()
