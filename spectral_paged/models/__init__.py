"""Models through transformers' attention interface; no modeling code of our own."""
