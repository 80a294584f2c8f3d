"""The five metrics of the E2E NLG challenge: `mteval` (BLEU, NIST) and `coco` (the others)."""
