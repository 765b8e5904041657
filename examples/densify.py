"""A plain checkpoint for tools that know no low-rank layers: every pair of factors becomes their product again.

    python examples/densify.py OUT -o DENSE

DENSE has the original class, and the original's size and speed; only its outputs are the compressed model's.
"""

from __future__ import annotations

import argparse

import unirank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compressed", nargs="?", default="OUT", help="checkpoint that unirank made")
    parser.add_argument("-o", "--out", default="DENSE", help="directory of the plain checkpoint")
    arguments = parser.parse_args()

    compressed = unirank.open_compressed(arguments.compressed)
    before = compressed.model.num_parameters()
    dense = unirank.densify(compressed.model)
    dense.save_pretrained(arguments.out)
    compressed.tokenizer.save_pretrained(arguments.out)
    print(
        f"{arguments.out}: {before:,} parameters became {dense.num_parameters():,}; AutoModel loads it without unirank"
    )


if __name__ == "__main__":
    main()
