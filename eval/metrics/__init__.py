"""The metrics: `mteval` (BLEU, NIST) and `coco` for E2E; `bleu`, `coco`, `ter` for WebNLG, DART."""
